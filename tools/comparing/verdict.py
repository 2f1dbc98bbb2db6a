"""What a study shows, in a few sentences: the answer of `daae compare`, `daae report` and `daae reproduce`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tools.comparing.analysis import ENOUGH_ERRORS, ENOUGH_POINTS, Contrast, Ratio
from tools.comparing.doubts import unlike
from tools.comparing.records import Group, Study, Trial
from tools.comparing.scores import (
    BASELINES,
    arm_score,
    baseline_score,
    margins,
    overtaken,
    points,
    score_of,
    weak_arms,
)
from tools.comparing.wording import (
    count_words,
    crossing_words,
    interval_words,
    listed,
    number_word,
    ratio_words,
    seconds_words,
    target_name,
    times_words,
    whole_words,
)

CLAIM = 2.05  # the slides' ratio on ImageNet-1K, asked about and never ours
SURELY = 1.5  # the claim holds here if the ratio is CLAIM or more and its interval stays above this: set beforehand

Tone = Literal["good", "open", "bad"]


@dataclass(frozen=True)
class Verdict:
    sentence: str
    meaning: str  # what follows from it, or what to do to know more
    tone: Tone
    parts: tuple[str, ...] = ()  # what the sentence is made of, where it tells numbers
    names: tuple[str, ...] = ()  # of arms, which stay as they are at the head of a sentence


def sentences(answer: Verdict) -> list[str]:
    """Its sentence in parts, each a sentence."""
    if not answer.parts:
        return [answer.sentence]
    kept = [part.startswith(answer.names) for part in answer.parts]
    return [f"{p if k else p[0].upper() + p[1:]}." for p, k in zip(answer.parts, kept, strict=True)]


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
    sentence, names = "; ".join(parts) + ".", tuple(group.arm for group in study.groups)
    if weak:
        meaning = f"{too_short(weak)} Until they do, none of this says anything about the claim."
        return Verdict(sentence, meaning, "bad", parts, names)
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
    return Verdict(sentence, " ".join([meaning, *(note[0].upper() + note[1:] for note in notes)]), tone, parts, names)


def lesser(clock: Contrast, paced: Contrast | None) -> Contrast:
    """Of the two ways to count seconds the one that says less for the arm."""
    if paced is None or paced.ratio is None or clock.ratio is None:
        return clock
    return min(clock, paced, key=lambda each: each.ratio.mean if each.ratio else 0.0)


def asks_the_claim(study: Study, group: Group) -> bool:
    """The slides claim something of DAAE beside MAE, and of nothing else."""
    return study.targeted and (study.base.objective, group.objective) == ("mae", "daae")


def _unlabelled(trials: Sequence[Trial]) -> bool:
    return all(trial.evaluation is None and not trial.evaluations for trial in trials)


def too_short(weak: Sequence[str]) -> str:
    """The rule by which an experiment counts."""
    does = "does" if len(weak) == 1 else "do"
    return (
        f"The run is too short or broken: {listed(list(weak))} {does} not beat raw pixels and the untrained encoder by "
        f"{100 * ENOUGH_POINTS:.0f} points and {number_word(ENOUGH_ERRORS)} standard errors."
    )


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
        each = [seconds_words(seconds) for seconds in (mine, theirs)]
        when = (
            f"After {each[0]} of training each" if each[0] == each[1] else f"After {each[0]} and {each[1]} of training"
        )
        gap = contrast.difference
        interval = "" if gap.low is None or gap.high is None else (
            f", 95 % interval {points(gap.low)} to {points(gap.high)}"
        )  # fmt: skip
        best = score_of(overtaken(study))
        best = f"; {points(other.mean - best.mean)} from its best" if best and best.mean > one.mean else ""
        parts.append(
            f"{when}, {group.arm} scores {other.words()} % and {base.arm} {one.words()} % "
            f"({points(gap.mean)} points{interval}{best})"
        )
    if study.targeted:
        parts.append(_speed(study, group.arm, contrast))
        if paced is not None and paced.ratio is not None:
            parts.append(f"with steps timed in turns that is {ratio_words(paced)}")
        if study.target is None:
            parts += _by_longest(study, group.arm)
    return parts


def _by_longest(study: Study, arm: str) -> list[str]:
    """The two other ways to count: to what the baseline's longest runs score, from when it first scored that, and from
    the end of these runs, as the slides do."""
    base, longest = study.base, study.contrasts(longest=True)[arm]
    if longest.whole is None or not any(pair.base_early for pair in longest.pairs):
        return []
    when = f"after {crossing_words([pair.base for pair in longest.pairs])}"
    held, score = overtaken(study), arm_score(base)
    if held == base.finished or score is None:
        whole = f"compared with its whole runs {arm} is {whole_words(longest)} times as fast"
        return [f"{base.arm} itself first scored that {when}, and {whole}"]
    first = "" if longest.ratio is None else f" (compared with that {arm} is {ratio_words(longest)} times as fast)"
    return [
        f"compared with {base.arm}'s longest runs, as the slides count, {arm} is {whole_words(longest)} times as fast "
        f"to their {score.words()} %, which flatters it: {base.arm} itself first scored that {when}{first}"
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
        for count, what in ((early, "was there at its first score"), (never, "did not get there")):
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
    beyond, tone = _beyond_chance(study, group, ratios)
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
        return f"{beyond} The claim of {CLAIM:g}x does not hold {here}: it lies above the interval.", "bad"
    return (
        f"{beyond} Whether {CLAIM:g}x holds {here} is open: the rule asks for {CLAIM:g} or more and an interval above "
        f"{SURELY:g}, and found is {times_words(least)}.",
        "open",
    )


def _beyond_chance(study: Study, group: Group, ratios: Sequence[Ratio]) -> tuple[str, Tone]:
    """By every way to count the seconds."""
    behind = [test for test, gap in study.ahead_by_test(group).items() if gap.mean < 0]
    mean = f" in the mean of the test sets, though not on {listed(behind)}" if behind else ""
    if all(each.low is not None and each.low > 1 for each in ratios):
        return f"{group.arm} is faster than {study.base.arm} beyond chance{mean}.", "good"
    if all(each.high is not None and each.high < 1 for each in ratios):
        return f"{group.arm} is slower than {study.base.arm} beyond chance.", "bad"
    return "The difference in speed could be chance.", "open"
