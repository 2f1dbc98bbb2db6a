"""What a study shows, in words: the table of `daae compare` and the page of `daae report` say it the same way."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tools.comparing.analysis import (
    ENOUGH_ERRORS,
    ENOUGH_POINTS,
    Contrast,
    Crossing,
    Interval,
    Margin,
    Ratio,
    margin,
)
from tools.comparing.records import Group, Study, Trial

SAME_SECONDS = 0.05  # two arms trained for the same time if their seconds differ by less than this share
CLAIM = 2.05  # the slides' ratio on ImageNet-1K, asked about and never ours
SURELY = 1.5  # the claim holds here if the ratio is CLAIM or more and its interval stays above this: set beforehand
FEW_ARMS = 4  # whose differences are all told
NAMED = 6  # runs that are missing, by name; of more the number is told
SUMS_UP = 0.03  # within which a ratio is its two factors, the second over whole runs instead of up to the target
QUIET = 0.1  # the share by which a ratio by the clock may differ from the one at the pace measured in turns
BASELINES = {"pixels": "raw 32 px pixels", "untrained": "untrained encoder"}


@dataclass(frozen=True)
class Score:
    """An arm's leading score over its finished seeds, shares of 1."""

    mean: float
    spread: float | None  # standard deviation between seeds; None with one seed, or where no seed matters
    error: float | None  # standard error from the number of test pictures, for one run
    seeds: int

    def words(self) -> str:
        """± is between seeds where there are several, else the standard error of the test set."""
        beside = self.spread if self.spread is not None else self.error
        return percent(self.mean) + ("" if beside is None else f" ± {percent(beside)}")


def over_seeds(scores: Sequence[dict | None]) -> Score | None:
    """scores: {"value", "standard_error"} of each run that has one."""
    found = [each for each in scores if each is not None]
    if not found:
        return None
    values = [each["value"] for each in found]
    errors = [each["standard_error"] for each in found if each.get("standard_error") is not None]
    spread = statistics.stdev(values) if len(set(values)) > 1 else None
    return Score(statistics.fmean(values), spread, statistics.fmean(errors) if errors else None, len(values))


def score_of(trials: Sequence[Trial]) -> Score | None:
    return over_seeds([trial.final for trial in trials])


def arm_score(group: Group) -> Score | None:
    return score_of(group.finished)


def baseline_score(trials: Sequence[Trial], name: str) -> Score | None:
    """Pixels and the untrained encoder, scored on the same pictures as the trained one; arms of a seed share it."""
    scores = ((trial.seed, trial.baseline(name)) for trial in trials if trial.done)
    return over_seeds(list({seed: score for seed, score in scores if score is not None}.values()))


def overtaken(study: Study) -> list[Trial]:
    """The baseline's runs whose scores are the target: its longest, or shorter ones that score more (Study.goal)."""
    if study.target is not None or not study.targeted:
        return study.base.finished
    seeds = {trial.seed for trial in study.base.finished}  # of others the longest run is still to come
    return [trial for trial in study.base.of_length(study.goal) if trial.seed in seeds]


def margins(study: Study, group: Group, *, longest: bool = False) -> dict[str, Margin]:
    """How far an arm is above each baseline that was scored, the baseline arm by the runs that are to be overtaken.

    longest: by its longest runs, whichever arm it is.
    """
    held = overtaken(study) if group is study.base and not longest else group.finished
    score, found = score_of(held), {}
    for name in BASELINES:
        base = baseline_score(group.trials, name)
        if score is not None and base is not None:
            found[name] = margin(score.mean, score.error or 0.0, base.mean, base.error or 0.0)
    return found


def leading_name(study: Study) -> str:
    """What the leading score is, such as "ridge on subcategory, mean of fluent and emojione"."""
    names = ((trial.evaluation or {}).get("leading_name") for trial in study.trials)
    return next((name for name in names if name), "")


def spread_words(study: Study) -> str:
    """What stands behind a ±; empty where nothing was scored."""
    errors = [score.error for group in study.groups if (score := arm_score(group)) is not None and score.error]
    if not errors:
        return ""
    return (
        "± is between seeds, their standard deviation; the standard error of one run's score, by the number of test "
        f"pictures, is {percent(statistics.fmean(errors))} points, which stands there instead with one seed and for "
        "raw pixels."
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    return f"{100 * share:+.1f}"


def seconds_words(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count_words(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def ratio_words(contrast: Contrast) -> str:
    """Times as fast, with its interval, short."""
    return _times(contrast.ratio)


def _times(ratio: Ratio | None) -> str:
    if ratio is None:
        return "unknown"
    return f"{ratio.side} {ratio.mean:.2f} ({interval_words(ratio) or 'one seed'})".strip()


def whole_words(contrast: Contrast) -> str:
    """Times as fast as the baseline's whole runs, short."""
    return _times(contrast.whole)


def interval_words(ratio: Ratio) -> str:
    """The ends of its interval that are known; empty with one seed, which has none."""
    if ratio.low is not None and ratio.high is not None:
        return f"{ratio.low:.2f} to {ratio.high:.2f}"
    if ratio.low is not None:
        return f"from {ratio.low:.2f}"
    return "" if ratio.high is None else f"up to {ratio.high:.2f}"


def crossings(study: Study, arm: str) -> list[Crossing]:
    """When each seed of an arm reached the target; empty where there is nothing to hold it against."""
    contrasts = study.contrasts()
    if arm in contrasts:
        return [pair.arm for pair in contrasts[arm].pairs]
    first = next(iter(contrasts.values()), None)
    return [pair.base for pair in first.pairs] if first is not None and arm == study.base.arm else []


def target_words(study: Study, arm: str) -> str:
    """Seconds to the target: a mean over seeds, or what is known instead."""
    return crossing_words(crossings(study, arm)) if study.targeted else ""


def crossing_words(found: Sequence[Crossing]) -> str:
    """Seconds to a target: a mean over seeds, or what is known instead."""
    times = [each.seconds for each in found]
    if not times:
        return ""
    if all(each.exact for each in times):
        return seconds_words(statistics.fmean(each.low for each in times))
    missed = [each.low for each in times if not each.high < float("inf")]
    if missed:
        where = "" if len(times) == 1 else f" ({len(missed)} of {len(times)} seeds)"
        return f"not reached in {seconds_words(statistics.fmean(missed))}{where}"
    return f"within {seconds_words(max(each.high for each in times))}"


def target_name(study: Study) -> str:
    if study.target is not None:
        return f"{percent(study.target)} %"
    runs = overtaken(study)
    score = score_of(runs)
    named = f" of {score.words()} %" if score else ""
    if runs == study.base.finished:
        return f"{study.base.arm}'s final score{named}"
    return f"{study.base.arm}'s best score{named} (its runs of {runs[0].cell.long})"


# ------------------------------------------------------------------------------------------------------- the verdict

Tone = Literal["good", "open", "bad"]


@dataclass(frozen=True)
class Verdict:
    sentence: str
    meaning: str  # what follows from it, or what to do to know more
    tone: Tone
    parts: tuple[str, ...] = ()  # what the sentence is made of, where that is more than one thing


def sentences(answer: Verdict) -> list[str]:
    """Its sentence in parts, each with a full stop. First letters stay as they are: many are an arm's name."""
    if not answer.parts:
        return [answer.sentence]
    return [f"{part}." for part in answer.parts]


def verdict(study: Study) -> Verdict:
    """The answer first: scores at equal seconds and the time ratio with its interval, or why there is none."""
    finished = [trial for trial in study.trials if trial.done]
    if not finished:
        which = "the run is not" if len(study.trials) == 1 else f"none of {len(study.trials)} runs is"
        return Verdict(
            f"No verdict yet: {which} finished.",
            "Run the same command again to go on.", "open",
        )  # fmt: skip
    if all(trial.final is None for trial in finished):
        return Verdict(
            "No verdict on quality: nothing was scored"
            + (", since the images have no labels or no score was asked for." if _unlabelled(finished) else "."),
            "What follows is the loss, the speed and the pictures. "
            + ("" if _unlabelled(finished) else "`daae evaluate RUN` scores a run."),
            "open",
        )  # fmt: skip
    contrasts, weak = study.contrasts(), weak_arms(study)
    first = study.groups[1] if len(study.groups) > 1 else None  # no other arm stands in for it
    if first is None or first.arm not in contrasts:
        return _alone(study, weak)
    paced = study.paced_contrasts().get(first.arm)
    parts = tuple(_parts(study, first, contrasts[first.arm], paced))
    sentence = "; ".join(parts) + "."
    if weak:
        meaning = f"{too_short(weak)} Until they do, none of this says anything about the claim."
        return Verdict(sentence, meaning, "bad", parts)
    clocks = [contrasts[first.arm], *([] if paced is None or paced.ratio is None else [paced])]
    meaning, tone = _meaning(study, first, clocks)
    failed = sum(trial.state == "failed" for trial in study.trials)
    left = len(study.missing) + sum(not trial.done for trial in study.trials) - failed
    notes = [f"{count_words(left, 'run')} still to finish."] if left else []
    if failed:
        notes.append(f"{count_words(failed, 'run')} failed: the seeds that are left are no fair draw of all.")
    if any(not margins(study, group) for group in study.groups if arm_score(group) is not None):
        notes.append("An arm was scored without its baselines.")
    if unlike(study):
        notes.append("The runs do not compare, for reasons named below.")
    if tone == "good" and notes:
        tone = "open"
    return Verdict(sentence, " ".join([meaning, *(note[0].upper() + note[1:] for note in notes)]), tone, parts)


def lesser(clock: Contrast, paced: Contrast | None) -> Contrast:
    """Of the two ways to count seconds the one that says less for the arm."""
    if paced is None or paced.ratio is None or clock.ratio is None:
        return clock
    return min(clock, paced, key=lambda each: each.ratio.mean if each.ratio else 0.0)


def gap_words(gap: Interval | None) -> str:
    """Points ahead, with the ends of the 95 % interval where there is one."""
    if gap is None:
        return ""
    return points(gap.mean) + (
        "" if gap.low is None or gap.high is None else f" ({points(gap.low)} to {points(gap.high)})"
    )


def between_others(study: Study) -> str:
    """How the arms stand that are held against the baseline, among themselves; empty where they are one or many."""
    if len(study.groups) > FEW_ARMS:
        return ""
    parts = [f"{one} is {gap_words(gap)} points ahead of {other}" for (one, other), gap in study.differences().items()]
    return f"At the end {listed(parts)}; brackets: 95 % interval, paired by seed." if parts else ""


def asks_the_claim(study: Study, group: Group) -> bool:
    """The slides claim something of DAAE beside MAE, and of nothing else."""
    return study.targeted and (study.base.objective, group.objective) == ("mae", "daae")


def _unlabelled(trials: Sequence[Trial]) -> bool:
    return all(trial.evaluation is None and not trial.evaluations for trial in trials)


def weak_arms(study: Study) -> list[str]:
    """Arms with a finished run that do not beat both baselines by enough."""
    return [g.arm for g in study.groups if any(not each.enough for each in margins(study, g).values())]


def too_short(weak: Sequence[str]) -> str:
    """The rule by which an experiment counts."""
    does = "does" if len(weak) == 1 else "do"
    return (
        f"The run is too short or broken: {listed(list(weak))} {does} not beat raw pixels and the untrained encoder by "
        f"{100 * ENOUGH_POINTS:.0f} points and {_number(ENOUGH_ERRORS)} standard errors."
    )


def _number(value: float) -> str:
    return {2.0: "two", 3.0: "three"}.get(value, f"{value:g}")


def _alone(study: Study, weak: list[str]) -> Verdict:
    """No two arms to compare: say what there is."""
    group = next((group for group in study.groups if arm_score(group) is not None), None)
    score = None if group is None else arm_score(group)
    if group is None or score is None:
        return Verdict(
            "No verdict yet: no arm has finished its longest runs.", "Run the same command again to go on.", "open"
        )
    seconds = statistics.fmean(trial.seconds for trial in group.finished)
    parts = []
    for name, words in BASELINES.items():
        base = baseline_score(group.trials, name)
        if base is not None:
            parts.append(f"{words} {base.words()} %")
    beside = f" ({'; '.join(parts)})" if parts else ""
    sentence = f"{group.arm} scores {score.words()} %{beside} after {seconds_words(seconds)} of training."
    if weak:
        return Verdict(sentence, too_short(weak), "bad")
    if len(study.groups) > 1:
        return Verdict(
            sentence, f"{study.groups[1].arm} has finished no seed that {study.base.arm} has: nothing to compare yet.",
            "open",
        )  # fmt: skip
    return Verdict(sentence, "One recipe alone says nothing about speed: `daae compare` puts two side by side.", "open")


def _parts(study: Study, group: Group, contrast: Contrast, paced: Contrast | None) -> list[str]:
    """Score at equal seconds, then the time to the target."""
    base, one, other = study.base, arm_score(study.base), arm_score(group)
    parts = []
    if one is not None and other is not None and contrast.difference is not None:
        mine, theirs = (statistics.fmean(t.seconds for t in g.finished) for g in (group, base))
        equal = abs(mine - theirs) <= SAME_SECONDS * max(mine, theirs)
        when = f"After {seconds_words(theirs)} of training each" if equal else (
            f"After {seconds_words(mine)} and {seconds_words(theirs)} of training"
        )  # fmt: skip
        gap = contrast.difference
        interval = "" if gap.low is None or gap.high is None else (
            f", 95 % interval {points(gap.low)} to {points(gap.high)}"
        )  # fmt: skip
        parts.append(
            f"{when}, {group.arm} scores {other.words()} % and {base.arm} {one.words()} % "
            f"({points(gap.mean)} points{interval})"
        )
    if study.targeted:
        parts.append(_speed(study, group.arm, contrast))
        if paced is not None and paced.ratio is not None:
            parts.append(f"with steps at the pace measured in turns that is {ratio_words(paced)}")
        if study.target is None:
            parts += _by_longest(study, group.arm)
    return parts


def _by_longest(study: Study, arm: str) -> list[str]:
    """The two other ways to count: to what the baseline's longest runs score, from when it first scored that, and from
    the end of these runs, as the slides do."""
    base, longest = study.base, study.contrasts(longest=True)[arm]
    if longest.whole is None or not any(pair.base_early for pair in longest.pairs):
        return []
    when = crossing_words([pair.base for pair in longest.pairs])
    when = when if when.startswith("within") else f"after {when}"
    held, score = overtaken(study), arm_score(base)
    if held == base.finished or score is None:
        whole = f"beside its whole runs {arm} is {whole_words(longest)} times as fast"
        return [f"{base.arm} itself first scored that {when}, and {whole}"]
    first = "" if longest.ratio is None else f" (beside that {arm} is {ratio_words(longest)} times as fast)"
    return [
        f"beside {base.arm}'s longest runs, as the slides count, {arm} is {whole_words(longest)} times as fast to "
        f"their {score.words()} %, which {base.arm} itself first scored {when}{first}"
    ]


def _speed(study: Study, arm: str, contrast: Contrast) -> str:
    """Arm reaches the target 1.62 times as fast …, or what is known instead and why."""
    target, ratio, pairs = target_name(study), contrast.ratio, contrast.pairs
    if not pairs:
        return f"the time to {target} is unknown, since nothing was scored"
    if ratio is None:
        return f"how much sooner {arm} reaches {target} is unknown: {_unseen(study, arm, contrast)}"
    side = f"{ratio.side} " if ratio.side else ""
    why = f", since {_unseen(study, arm, contrast)}" if ratio.side else ""
    if ratio.count == 1:
        return (
            f"{arm} reaches {target} {side}{ratio.mean:.2f} times as fast, from one seed and without an interval{why}"
        )
    claimed = any(group.arm == arm and asks_the_claim(study, group) for group in study.groups)
    seeds = f"; {CLAIM:g} or more in {contrast.as_fast(CLAIM)} of {len(pairs)} seeds" if claimed else ""
    speed = f"{side}{ratio.mean:.2f} times as fast (95 % interval {interval_words(ratio)}{seeds})"
    return f"{arm} reaches {target} {speed}{why}"


def _unseen(study: Study, arm: str, contrast: Contrast) -> str:
    """Why some times are bounds: who was there by the first score, and who never."""
    pairs, reasons = contrast.pairs, []
    for name, crossings in ((arm, [p.arm for p in pairs]), (study.base.arm, [p.base for p in pairs])):
        early = sum(each.reached and not each.seconds.exact for each in crossings)
        never = sum(not each.reached for each in crossings)
        for count, what in ((early, "was there by its first score"), (never, "did not get there")):
            where = f" in {count} of {len(pairs)} seeds" if len(pairs) > 1 else ""
            reasons += [f"{name} {what}{where}"] if count else []
    return listed(reasons)


def _meaning(study: Study, group: Group, clocks: Sequence[Contrast]) -> tuple[str, Tone]:
    """Whether the claim holds here, by the rule set beforehand: CLAIM or more, surely more than SURELY. Of other arms
    whether one is surely faster. clocks: the runs' own, and steps timed in turns where they were."""
    ratios = [each.ratio for each in clocks if each.ratio is not None]
    claimed = asks_the_claim(study, group)
    if not study.targeted:
        return "No target was asked for, so speed is shown by scores at equal seconds only.", "open"
    if clocks[0].ratio is None:
        return (
            f"So whether {CLAIM:g}x holds cannot be told." if claimed else "So which is faster cannot be told.",
            "open",
        )
    if ratios[0].count == 1:
        told = f"a gain from chance, nor whether {CLAIM:g}x is real" if claimed else "a gain from chance"
        return f"One seed cannot tell {told}: --seeds 0 1 2 can.", "open"
    least = min(ratios, key=lambda each: each.mean)
    beyond, tone = _beyond_chance(ratios)
    if not claimed:
        return beyond, tone
    here = "on these images and at this size"
    if all(each.low is not None and each.mean >= CLAIM and each.low > SURELY for each in ratios):
        low = min(each.low or 0.0 for each in ratios)
        less = "" if low >= CLAIM else f"; true ratios down to {low:.2f} are not excluded"
        return (
            f"The claim of {CLAIM:g}x holds {here}, by the rule set beforehand: the ratio is {CLAIM:g} or more and its "
            f"interval stays above {SURELY:g}{less}.",
            "good",
        )
    if least.high is not None and least.high < CLAIM:
        return f"The claim of {CLAIM:g}x does not hold {here}: it lies above the interval. {beyond}", "bad"
    return f"Whether {CLAIM:g}x holds {here} cannot be told: it lies inside the interval. {beyond}", "open"


def _beyond_chance(ratios: Sequence[Ratio]) -> tuple[str, Tone]:
    """By every way to count the seconds."""
    if all(each.low is not None and each.low > 1 for each in ratios):
        return "Faster beyond chance.", "good"
    if all(each.high is not None and each.high < 1 for each in ratios):
        return "Slower beyond chance.", "bad"
    return "The difference in speed could be chance.", "open"


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


def warnings(study: Study) -> list[str]:
    """What a reader must know before believing a number."""
    found = []
    for group in study.groups:
        short = [
            f"{points(each.points)} points from the {BASELINES[name]} ({each.errors:.1f} standard errors)"
            for name, each in margins(study, group).items()
            if not each.enough
        ]
        if short:
            found.append(
                f"{group.arm} is only {listed(short)}; {100 * ENOUGH_POINTS:.0f} points and {_number(ENOUGH_ERRORS)} "
                "standard errors are asked for. The run is too short or broken."
            )
    held, longest = overtaken(study), study.base.finished
    if held != longest and (score := arm_score(study.base)) is not None:
        found.append(
            f"{study.base.arm}'s runs of {longest[0].cell.long} score less than those of {held[0].cell.long} "
            f"({score.words()} %, for several times the work): it is held by its best."
        )
        short = [
            f"{points(each.points)} points from the {BASELINES[name]}"
            for name, each in margins(study, study.base, longest=True).items()
            if not each.enough
        ]
        if short:
            found.append(
                f"{study.base.arm}'s longest runs are only {listed(short)}: were it held by them, the experiment would "
                "not count."
            )
    for group in study.groups[1:]:
        gaps = study.ahead_by_test(group)
        if len({gap.mean > 0 for gap in gaps.values()}) > 1:
            each = listed([f"{gap_words(gap)} points on {test}" for test, gap in gaps.items()])
            found.append(
                f"The test sets disagree: {group.arm} leads {study.base.arm} by {each}. The score is their mean."
            )
    scored = [group for group in study.groups if arm_score(group) is not None]
    for group in scored:
        if not margins(study, group):
            found.append(
                f"{group.arm} was scored without its baselines, so nothing says whether it learned anything: "
                f"`daae evaluate {group.finished[0].folder or 'RUN'}` scores raw pixels and the untrained encoder too."
            )
    seconds = [statistics.fmean(trial.seconds for trial in group.finished) for group in scored]
    if seconds and max(seconds) - min(seconds) > SAME_SECONDS * max(seconds):
        found.append(
            f"The arms were trained for different times ({seconds_words(min(seconds))} to "
            f"{seconds_words(max(seconds))}): final scores are not at equal seconds; read the curves instead."
        )
    if len(scored) > 1 and min(len(group.finished) for group in scored) == 1:
        found.append("An arm has one seed only, so it has no interval: differences may be chance. Add --seeds 0 1 2.")
    failed = [trial.name for trial in study.trials if trial.state == "failed"]
    if failed:
        found.append(f"{listed(failed)} failed: means are over the seeds that are left.")
    paced = study.paced_contrasts()
    for arm, each in study.contrasts().items():
        clock, turns = each.ratio, paced[arm].ratio if arm in paced else None
        if study.targeted and clock and turns and abs(clock.mean / turns.mean - 1) > QUIET:
            found.append(
                f"{arm} is {ratio_words(each)} times as fast by the clock and {ratio_words(paced[arm])} with steps at "
                "the pace measured in turns: the machine was not equally fast for both. The lesser counts."
            )
        if study.targeted and clock and not clock.side and each.epochs and each.pace:
            product = each.epochs.mean * each.pace
            if abs(product / clock.mean - 1) > SUMS_UP:
                found.append(
                    f"{arm}: epochs {each.epochs.mean:.2f} x seconds an epoch of whole runs {each.pace:.2f} is "
                    f"{product:.2f}, and the ratio by the clock {clock.mean:.2f}: the machine's speed changed in them."
                )
    envs = [env for trial in study.trials if trial.done for env in trial.envs]
    codes = {str(env["code"]) for env in envs if env.get("code")}
    if len(codes) > 1 or any(code.endswith("+changes") for code in codes):
        found.append(f"The runs are of code that differs or was never committed ({listed(sorted(codes))}).")
    versions = {str(env["versions"]["torch"]) for env in envs if "torch" in env.get("versions", {})}
    if len(versions) > 1:
        found.append(f"The runs were trained with different versions of torch ({listed(sorted(versions))}).")
    if study.targeted and any(c.pairs for c in study.contrasts().values()) and not any(g.lengths for g in study.groups):
        found.append(
            "Times to the target are read from scores in the middle of a schedule, whose rate is still high there. "
            "Several --seconds train a run of each length, and then a score counts at its own end."
        )
    return found + unlike(study)


def _named(names: list[str]) -> str:
    """The first few by name."""
    return listed([*names[:NAMED], *([f"{len(names) - NAMED} more"] if len(names) > NAMED else [])])


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
