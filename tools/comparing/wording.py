"""Numbers of a study in words: the table of `daae compare` and the page of `daae report` say them the same way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tools.comparing.analysis import Contrast, Crossing, Interval, Ratio
from tools.comparing.records import Study
from tools.comparing.scores import arm_score, overtaken, percent, points, score_of

SIGNS = {"": "", "at least": "≥ ", "at most": "≤ "}  # of what is only known from one side
FEW_ARMS = 4  # whose differences are all told


def seconds_words(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count_words(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def number_word(value: float) -> str:
    return {2.0: "two", 3.0: "three"}.get(value, f"{value:g}")


def plain(value: Any) -> str:
    """A setting's value as one would type it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


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


def gap_words(gap: Interval | None) -> str:
    """Points ahead, with the ends of the 95 % interval where there is one."""
    if gap is None:
        return ""
    return points(gap.mean) + (
        "" if gap.low is None or gap.high is None else f" ({points(gap.low)} to {points(gap.high)})"
    )


def standing_words(gap: Interval, other: str) -> str:
    """1.1 points behind OTHER (-3.1 to +0.8)."""
    interval = "" if gap.low is None or gap.high is None else f" ({points(gap.low)} to {points(gap.high)})"
    side = f"ahead of {other}" if gap.mean >= 0 else f"behind {other}"
    return f"{percent(abs(gap.mean))} points {side}{interval}"


def between_others(study: Study) -> str:
    """How the arms stand that are held against the baseline, among themselves; empty where they are one or many."""
    if len(study.groups) > FEW_ARMS:
        return ""
    parts = [f"{one} is {standing_words(gap, other)}" for (one, other), gap in study.differences().items()]
    return f"At the end {listed(parts)}; brackets: 95 % interval, paired by seed." if parts else ""


def ratio_words(contrast: Contrast) -> str:
    """Times as fast, with its interval, short."""
    return times_words(contrast.ratio)


def whole_words(contrast: Contrast) -> str:
    """Times as fast as the baseline's whole runs, short."""
    return times_words(contrast.whole)


def times_words(ratio: Ratio | None) -> str:
    """At least 2.41 (from 1.15)."""
    if ratio is None:
        return "unknown"
    return f"{ratio.side} {ratio.mean:.2f} ({interval_words(ratio) or 'one seed'})".strip()


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
    """Seconds to a target: the geometric mean over seeds, of which ratios are those of joint_ratio, or what is known
    instead."""
    times = [each.seconds for each in found]
    if not times:
        return ""
    missed = [each.low for each in times if not each.high < float("inf")]
    if missed:
        where = "" if len(times) == 1 else f" ({len(missed)} of {len(times)} seeds)"
        return f"not reached in {seconds_words(statistics.fmean(missed))}{where}"
    mean = seconds_words(math.exp(statistics.fmean(math.log(each.high) for each in times)))
    return mean if all(each.exact for each in times) else f"at most {mean}"


def target_name(study: Study) -> str:
    if study.target is not None:
        return f"{percent(study.target)} %"
    runs = overtaken(study)
    score = score_of(runs)
    named = f" of {score.words()} %" if score else ""
    if runs == study.base.finished:
        return f"{study.base.arm}'s final score{named}"
    return f"{study.base.arm}'s best score{named} (its runs of {runs[0].cell.long})"
