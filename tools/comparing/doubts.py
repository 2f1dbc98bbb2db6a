"""Why a reader may doubt a study: what its numbers leave out, and what is not there yet."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from tools.comparing import answers
from tools.comparing.analysis import ENOUGH_ERRORS, ENOUGH_POINTS, Contrast
from tools.comparing.records import Study, recipe
from tools.comparing.scores import BASELINES, arm_score, equally_long, margins, overtaken, points, weak_arms
from tools.comparing.wording import gap_words, listed, number_word, plain, ratio_words, seconds_words, standing_words

NAMED = 6  # runs that are missing, by name; of more the number is told
SUMS_UP = 0.03  # within which a ratio is its two factors, the second over whole runs instead of up to the target
QUIET = 0.1  # the share by which a ratio by the clock may differ from the one at the pace measured in turns


def warnings(study: Study) -> list[str]:
    """What a reader must know before believing a number."""
    return [
        *_too_near_the_untrained(study),
        *_baseline_at_its_best(study),
        *_tests_that_disagree(study),
        *_weak_on_one_test(study),
        *_pixels_ahead(study),
        *_behind_elsewhere(study),
        *_faster_rivals(study),
        *_other_settings(study),
        *_without_baselines(study),
        *_unequal_times(study),
        *_few_seeds(study),
        *_unsteady_machine(study),
        *_unlike_code(study),
        *_read_in_mid_schedule(study),
        *unlike(study),
        *(note for experiment in study.experiments for note in experiment.get("notes") or ()),
    ]


def _too_near_the_untrained(study: Study) -> Iterator[str]:
    for group in study.groups:
        short = [
            f"{points(each.points)} points from the {BASELINES[name]} ({each.errors:.1f} standard errors)"
            for name, each in margins(study, group).items()
            if not each.enough
        ]
        if short:
            yield (
                f"{group.arm} is only {listed(short)}; {100 * ENOUGH_POINTS:.0f} points and "
                f"{number_word(ENOUGH_ERRORS)} standard errors are asked for. The run is too short or broken."
            )


def _baseline_at_its_best(study: Study) -> Iterator[str]:
    """Where its longest runs score less than shorter ones."""
    held, longest = overtaken(study), study.base.finished
    score = arm_score(study.base)
    if held == longest or score is None:
        return
    yield (
        f"{study.base.arm}'s runs of {longest[0].cell.long} score less than those of {held[0].cell.long} "
        f"({score.words()} %, for several times the work): the target is its best score."
    )
    short = [
        f"{points(each.points)} points from the {BASELINES[name]}"
        for name, each in margins(study, study.base, longest=True).items()
        if not each.enough
    ]
    if short:
        yield (
            f"{study.base.arm}'s longest runs are only {listed(short)}: with their score as the target the experiment "
            "would not count."
        )


def _tests_that_disagree(study: Study) -> Iterator[str]:
    for group in study.groups[1:]:
        gaps, told = study.ahead_by_test(group), []
        if len({gap.mean > 0 for gap in gaps.values()}) < 2:
            continue
        for test, gap in gaps.items():
            alone = study.contrasts_on(test).get(group.arm)
            speed = "" if alone is None or alone.ratio is None else f", {ratio_words(alone)} times as fast to its best"
            told.append(f"on {test} {standing_words(gap, study.base.arm)}{speed}")
        yield f"The test sets disagree: at the end {group.arm} is {'; '.join(told)}. The score is their mean."


def _weak_on_one_test(study: Study) -> Iterator[str]:
    """Where the mean of the test sets counts as learned and one of them would not."""
    weak = weak_arms(study)
    for test in study.tests if len(study.tests) > 1 else ():
        alone = study.on(test)
        short = {
            group.arm: min(each.points for each in margins(alone, group).values())
            for group in alone.groups
            if group.arm in weak_arms(alone) and group.arm not in weak
        }
        if short:
            least = listed([points(each) for each in short.values()])
            yield (
                f"On {test} alone {listed(list(short))} would not count: {least} points above the better of raw pixels "
                "and the untrained encoder."
            )


def _pixels_ahead(study: Study) -> Iterator[str]:
    found = [
        f"{probe} ({pixels.words()} %, {arm} {score.words()} %)" for probe, pixels, arm, score in answers.beaten(study)
    ]
    if found:
        yield f"Raw pixels score more than every arm by {listed(found)}."


def _behind_elsewhere(study: Study) -> Iterator[str]:
    """What the experiment asked besides, and where the arm that the verdict is about is surely behind."""
    told = [group.arm for group in study.groups[1:2]]
    for arm, who, cells in answers.rows(study):
        behind = [
            f"{name} ({gap_words(cell.ahead)} points)"
            for name, cell in cells.items()
            if cell.ahead is not None and cell.ahead.high is not None and cell.ahead.high < 0
        ]
        if behind and arm in told:
            yield f"{who} is behind {study.base.arm}'s longest runs in {listed(behind)}."


def _faster_rivals(study: Study) -> Iterator[str]:
    """Arms that are sooner at the target than the one that the verdict is about."""
    contrasts, arms = study.contrasts(), [group.arm for group in study.groups]
    told = contrasts.get(arms[1]) if len(arms) > 1 else None
    if told is None or told.ratio is None:
        return
    for arm, each in contrasts.items():
        if each.ratio is not None and each.ratio.mean > told.ratio.mean:
            yield f"{arm} is at the target sooner than {arms[1]}: {ratio_words(each)} times as fast as {arms[0]}."


def _other_settings(study: Study) -> Iterator[str]:
    """What two methods could have in common, and have not."""
    if len(study.groups) < 2 or study.groups[1].objective == study.base.objective:
        return
    one, other = (recipe(group.trials[0]) for group in study.groups[:2])
    apart = [
        f"{name} ({plain(value)}; {plain(other[name])})"
        for name, value in one.items()
        if name in other and other[name] != value and name != "objective" and not name.startswith("budget.")
    ]
    if apart:
        yield (
            f"{study.base.arm} and {study.groups[1].arm} differ in what both methods know as well: {listed(apart)}. "
            "Recipes are compared, not one idea."
        )


def _without_baselines(study: Study) -> Iterator[str]:
    for group in study.groups:
        if arm_score(group) is not None and not margins(study, group):
            yield (
                f"{group.arm} was scored without its baselines, so nothing says whether it learned anything: "
                f"`daae evaluate {group.finished[0].folder or 'RUN'}` scores raw pixels and the untrained encoder too."
            )


def _unequal_times(study: Study) -> Iterator[str]:
    scored = [group for group in study.groups if arm_score(group) is not None]
    seconds = [statistics.fmean(trial.seconds for trial in group.finished) for group in scored]
    if seconds and not equally_long(seconds):
        yield (
            f"The arms were trained for different times ({seconds_words(min(seconds))} to "
            f"{seconds_words(max(seconds))}): final scores are not at equal seconds; read the curves instead."
        )


def _few_seeds(study: Study) -> Iterator[str]:
    seeds = [len(group.finished) for group in study.groups if arm_score(group) is not None]
    if len(seeds) > 1 and min(seeds) == 1:
        yield "An arm has one seed only, so it has no interval: differences may be chance. Add --seeds 0 1 2."
    failed = [trial.name for trial in study.trials if trial.state == "failed"]
    if failed:
        yield f"{listed(failed)} failed: means are over the seeds that are left."


def _unsteady_machine(study: Study) -> Iterator[str]:
    """Where the runs' own clocks and steps timed in turns differ, or a ratio is not the product of its factors."""
    paced = study.paced_contrasts()
    for arm, each in study.contrasts().items() if study.targeted else ():
        clock, turns = each.ratio, paced[arm].ratio if arm in paced else None
        if clock and turns and abs(clock.mean / turns.mean - 1) > QUIET:
            yield (
                f"{arm} is {ratio_words(each)} times as fast by the clock and {ratio_words(paced[arm])} with steps "
                "timed in turns: the machine was not equally fast for both. The lesser counts."
            )
        elif clock and turns and (uneven := _uneven_seeds(each, paced[arm])):
            yield (
                f"The machine was not equally fast within every seed: by the clock and with steps timed in turns {arm} "
                f"is {listed(uneven)} times as fast."
            )
        if clock and not clock.side and each.epochs and each.pace:
            product = each.epochs.mean * each.pace
            if abs(product / clock.mean - 1) > SUMS_UP:
                yield (
                    f"{arm}: epochs {each.epochs.mean:.2f} x seconds an epoch of whole runs {each.pace:.2f} is "
                    f"{product:.2f}, and the ratio by the clock {clock.mean:.2f}: the machine's speed changed in them."
                )


def _uneven_seeds(clock: Contrast, turns: Contrast) -> list[str]:
    """Seeds whose ratio by the clock is not the one of steps timed in turns."""
    others = {pair.seed: pair.ratio for pair in turns.pairs}
    pairs = [(pair.seed, pair.ratio, others[pair.seed]) for pair in clock.pairs if pair.seed in others]
    return [
        f"{one.low:.2f} and {other.low:.2f} (seed {seed})"
        for seed, one, other in pairs
        if one.exact and other.exact and abs(one.low / other.low - 1) > QUIET
    ]


def _unlike_code(study: Study) -> Iterator[str]:
    envs = [env for trial in study.trials if trial.done for env in trial.envs]
    codes = {str(env["code"]) for env in envs if env.get("code")}
    if len(codes) > 1 or any(code.endswith("+changes") for code in codes):
        yield f"The runs are of code that differs or was never committed ({listed(sorted(codes))})."
    versions = {str(env["versions"]["torch"]) for env in envs if "torch" in env.get("versions", {})}
    if len(versions) > 1:
        yield f"The runs were trained with different versions of torch ({listed(sorted(versions))})."


def _read_in_mid_schedule(study: Study) -> Iterator[str]:
    read = any(contrast.pairs for contrast in study.contrasts().values())
    if study.targeted and read and not any(group.lengths for group in study.groups):
        yield (
            "Times to the target are read from scores in the middle of a schedule, whose rate is still high there. "
            "Several --seconds train a run of each length, and then a score counts at its own end."
        )


def unlike(study: Study) -> list[str]:
    """Why the runs of a study do not compare, though somebody put them side by side."""
    found, done = [], [trial for trial in study.trials if trial.done]
    envs = [env for trial in done for env in trial.envs]
    machines = {(env.get("device"), env.get("cores")) for env in envs if env.get("device")}
    if len(machines) > 1:
        found.append(f"The runs were timed on {len(machines)} different machines: their seconds do not compare.")
    data = {trial.env.get("data") for trial in study.trials if trial.env.get("data")}
    if len(data) > 1:
        found.append(f"The runs saw {len(data)} different data sets: neither scores nor losses compare.")
    exams = {
        (trial.evaluation["leading_name"], trial.evaluation["leading"].get("count"))
        for trial in done
        if trial.evaluation is not None and trial.evaluation.get("leading")
    }
    if len(exams) > 1:
        asked = listed(sorted(f"{name} ({count:,} pictures)" if count else str(name) for name, count in exams))
        found.append(f"The runs were asked different things: {asked}.")
    return found


def missing(study: Study) -> list[str]:
    """What is not there, and how to get it."""
    found = []
    for trial in study.trials:
        if not trial.done:
            steps = f" at step {trial.step:,}" + (f" of {trial.steps:,}" if trial.steps else "")
            reason = f" ({trial.reason})" if trial.reason else ""
            found.append(f"{trial.name} is not finished: {trial.state}{steps}{reason}.")
    gone = [trial.name for trial in study.trials if trial.done and trial.folder is None]
    if gone:
        found.append(f"Loss curves and pictures of {_named(gone)}: the run folder is gone.")
    if study.missing:
        names = _named([cell.words for cell in study.missing])
        found.append(f"Not started yet: {names}. The same `daae compare` goes on.")
    finished = [trial for trial in study.trials if trial.done]
    if finished and all(trial.final is None for trial in finished):
        found.append(
            "Scores: the images have no labels, or the runs were not evaluated. `daae evaluate RUN --data LABELLED` "
            "scores a run on labelled images."
        )
    elif finished and all(len(curve) < 2 for group in study.groups for curve in group.curves()):
        what = ", for the time to a target" if study.targeted else ""
        found.append(f"Scores during training: there are none. --evaluations 6 takes them{what}.")
    return found


def _named(names: list[str]) -> str:
    """The first few by name."""
    return listed([*names[:NAMED], *([f"{len(names) - NAMED} more"] if len(names) > NAMED else [])])
