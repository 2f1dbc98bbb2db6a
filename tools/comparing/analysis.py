"""What curves and seeds say: time to a target score, ratios paired by seed with their interval, and their factors.

Pure functions on numbers. A time that was not seen is kept as the bound that it is: a run that never reached the target
took *more than* its seconds, one that was there at its first score took *at most* that long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
Z_95 = 1.959964

ENOUGH_POINTS, ENOUGH_ERRORS = 0.05, 3.0  # by which a trained encoder has to beat pixels and an untrained one


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; within 1e-4 of the exact value. Raises ValueError below one degree."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: an interval needs two values at least")
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    # Cornish-Fisher, Abramowitz & Stegun 26.7.5.
    return Z_95 + (Z_95**3 + Z_95) / (4 * degrees) + (5 * Z_95**5 + 16 * Z_95**3 + 3 * Z_95) / (96 * degrees**2)


@dataclass(frozen=True)
class Curve:
    """A run's leading score while it was trained, in order of time."""

    seconds: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()  # shares of 1
    images: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.seconds)


@dataclass(frozen=True)
class Bounds:
    """A positive number known exactly (low == high) or only from one side (low == 0, or high == inf)."""

    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high

    @property
    def known(self) -> bool:
        return self.low > 0 or self.high < math.inf

    @property
    def words(self) -> str:
        """What to say before `number`."""
        return "" if self.exact else "more than " if self.high == math.inf else "at most "

    @property
    def number(self) -> float:
        return self.low if self.high == math.inf else self.high

    def times(self, factor: float) -> Bounds:
        return Bounds(self.low * factor, self.high * factor)

    def over(self, other: Bounds) -> Bounds:
        high = math.inf if other.low == 0 else self.high / other.low
        return Bounds(self.low / other.high, high)


NOTHING_KNOWN = Bounds(0.0, math.inf)


@dataclass(frozen=True)
class Crossing:
    """When a curve first reached a target."""

    seconds: Bounds
    images: Bounds

    @property
    def reached(self) -> bool:
        return self.seconds.high < math.inf


def time_to_target(curve: Curve, target: float) -> Crossing:
    """When the curve first reaches `target`: between two scores linear in the logarithm of the seconds.

    Images are then read off in proportion to seconds, so that seconds per image stay what was measured. The curve is
    not smoothed and does not have to rise: the first crossing counts, for every arm alike.
    """
    for at, score in enumerate(curve.scores):
        if score < target:
            continue
        if at == 0:
            return Crossing(Bounds(0.0, curve.seconds[0]), Bounds(0.0, curve.images[0]))
        before, after = curve.seconds[at - 1], curve.seconds[at]
        share = (target - curve.scores[at - 1]) / (score - curve.scores[at - 1])
        seconds = before * (after / before) ** share
        images = curve.images[at - 1]
        if after > before:
            images += (curve.images[at] - images) * (seconds - before) / (after - before)
        return Crossing(Bounds(seconds, seconds), Bounds(images, images))
    if not len(curve):
        return Crossing(NOTHING_KNOWN, NOTHING_KNOWN)
    return Crossing(Bounds(curve.seconds[-1], math.inf), Bounds(curve.images[-1], math.inf))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval; one seed has a mean and no interval."""

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of paired differences and Student's interval around it."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    half = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios over seeds, with its 95 % interval.

    Where some ratios are bounds, mean and end are those of the bounds: "at least" has no upper end and "at most" no
    lower one. The mean of lower bounds is no larger than that of the ratios; bounds also scatter less, so that the end
    that is left is right in 96 % of studies of five seeds where 97.5 % are meant (tests/test_analysis.py).
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    side: Literal["", "at least", "at most"] = ""


def ratio_interval(ratios: Sequence[float], side: Literal["", "at least", "at most"] = "") -> Ratio:
    """Geometric mean of paired ratios, and Student's interval of their logarithms turned back into ratios."""
    logs = mean_interval([math.log(ratio) for ratio in ratios])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Ratio(
        math.exp(logs.mean), None if side == "at most" else low, None if side == "at least" else high, logs.count, side
    )


def joint_ratio(ratios: Sequence[Bounds]) -> Ratio | None:
    """Of seeds of which some are bounds; None where they point both ways or one of them knows nothing."""
    if not ratios:
        return None
    if all(each.exact for each in ratios):
        return ratio_interval([each.low for each in ratios])
    if all(each.low > 0 for each in ratios):
        return ratio_interval([each.low for each in ratios], "at least")
    if all(each.high < math.inf for each in ratios):
        return ratio_interval([each.high for each in ratios], "at most")
    return None


@dataclass(frozen=True)
class Factors:
    """A ratio of times as the product of its two causes, each baseline over arm: above 1 the arm needs less.

    ratio == epochs * seconds_per_epoch, since an epoch's seconds are taken over the same stretch up to the target.
    """

    ratio: float
    epochs: float
    seconds_per_epoch: float


def decompose(base: Crossing, arm: Crossing, base_epoch: float, arm_epoch: float) -> Factors | None:
    """How much of a time ratio is fewer epochs and how much is cheaper epochs; None where a time is only a bound.

    base_epoch, arm_epoch: images per epoch.
    """
    if not (base.seconds.exact and arm.seconds.exact):
        return None
    base_epochs, arm_epochs = base.images.low / base_epoch, arm.images.low / arm_epoch
    return Factors(
        ratio=base.seconds.low / arm.seconds.low,
        epochs=base_epochs / arm_epochs,
        seconds_per_epoch=(base.seconds.low / base_epochs) / (arm.seconds.low / arm_epochs),
    )


@dataclass(frozen=True)
class Outcome:
    """What one finished or unfinished run gives to a comparison."""

    curve: Curve
    final: float | None  # leading score at the end, a share of 1
    images: float
    seconds: float
    epoch_images: float  # images in an epoch

    @property
    def seconds_per_epoch(self) -> float | None:
        return self.seconds * self.epoch_images / self.images if self.images else None


@dataclass(frozen=True)
class Pair:
    """One seed of an arm beside the same seed of the baseline."""

    seed: int
    target: float
    base: Crossing
    arm: Crossing
    ratio: Bounds
    factors: Factors | None
    base_seconds: float  # of the baseline's whole run, wherever in it the target was first met

    @property
    def base_early(self) -> bool:
        """The baseline met the target before its run was over."""
        return self.base.seconds.low < (1 - 1e-9) * self.base_seconds

    @property
    def whole(self) -> Bounds:
        """The baseline's whole run over the arm's time to the target."""
        return Bounds(self.base_seconds, self.base_seconds).over(self.arm.seconds)


@dataclass(frozen=True)
class Contrast:
    """An arm against the baseline, over the seeds that both have."""

    seeds: tuple[int, ...]
    difference: Interval | None  # of final scores, shares of 1
    pairs: tuple[Pair, ...]
    ratio: Ratio | None  # baseline's seconds to the target over the arm's; None where seeds are bounds both ways
    whole: Ratio | None  # all of the baseline's seconds over the arm's to the target, wherever the baseline met it
    epochs: Ratio | None  # how much of the ratio is fewer epochs; a bound where the ratio is one
    seconds_per_epoch: float | None  # and how much cheaper epochs, up to the target; None unless all are exact
    pace: float | None  # seconds per epoch of whole runs, baseline over arm, whatever the scores did

    @property
    def never(self) -> int:
        """Seeds in which the arm did not reach the target."""
        return sum(not pair.arm.reached for pair in self.pairs)

    def as_fast(self, ratio: float) -> int:
        """Seeds in which the arm was at the target in at most 1/ratio of the baseline's seconds."""
        return sum(pair.ratio.low >= ratio for pair in self.pairs)


def contrast(
    base: Mapping[int, Outcome],
    arm: Mapping[int, Outcome],
    target: float | None,
    goals: Mapping[int, Outcome] | None = None,
) -> Contrast:
    """Compare by seed. target: a score, or None for the baseline's own final score with the same seed.

    goals: the baseline's runs that are to be overtaken, where those are not its longest.
    """
    seeds = tuple(seed for seed in base if seed in arm)
    differences, pairs, paces, epochs = [], [], [], []
    for seed in seeds:
        one, other = base[seed], arm[seed]
        if one.final is not None and other.final is not None:
            differences.append(other.final - one.final)
        if one.seconds_per_epoch and other.seconds_per_epoch:
            paces.append(one.seconds_per_epoch / other.seconds_per_epoch)
        goal = one if goals is None else goals.get(seed, one)
        wanted = goal.final if target is None else target
        if wanted is not None and len(goal.curve) and len(other.curve):
            first, second = time_to_target(goal.curve, wanted), time_to_target(other.curve, wanted)
            factors = decompose(first, second, goal.epoch_images, other.epoch_images)
            ratio = first.seconds.over(second.seconds)
            pairs.append(Pair(seed, wanted, first, second, ratio, factors, goal.seconds))
            epochs.append(first.images.times(1 / goal.epoch_images).over(second.images.times(1 / other.epoch_images)))
    factors = [pair.factors for pair in pairs if pair.factors is not None]
    exact = bool(pairs) and len(factors) == len(pairs)
    return Contrast(
        seeds=seeds,
        difference=mean_interval(differences) if differences else None,
        pairs=tuple(pairs),
        ratio=joint_ratio([pair.ratio for pair in pairs]),
        whole=joint_ratio([pair.whole for pair in pairs]),
        epochs=joint_ratio(epochs),
        seconds_per_epoch=ratio_interval([each.seconds_per_epoch for each in factors]).mean if exact else None,
        pace=ratio_interval(paces).mean if paces else None,
    )


@dataclass(frozen=True)
class Margin:
    """How far a score is above a baseline's."""

    points: float  # a share of 1
    errors: float  # in standard errors of the difference
    enough: bool


def margin(score: float, error: float, baseline: float, baseline_error: float) -> Margin:
    """Whether a score beats a baseline by five points and three standard errors.

    The two are scored on the same pictures; taking their errors as independent makes the demand the stricter one.
    """
    points, spread = score - baseline, math.hypot(error, baseline_error)
    errors = points / spread if spread else math.copysign(math.inf, points) if points else 0.0
    # A rounding error must not decide at exactly five points.
    return Margin(points, errors, points >= ENOUGH_POINTS - 1e-9 and errors >= ENOUGH_ERRORS)


def steady_rate(rows: Sequence[Mapping], skip_steps: int = 50) -> float | None:
    """Images per second without a run's first steps, from rows of metrics.jsonl; a short run keeps what it has.

    rows: step, images and train_seconds, as counted from the start of the run.
    """
    if not rows:
        return None
    last = rows[-1]
    late = next((row for row in rows if row["step"] >= skip_steps), None)
    # Skipping is worth its noise only where most of the run remains.
    if late is not None and last["step"] >= 2 * late["step"]:
        return (last["images"] - late["images"]) / (last["train_seconds"] - late["train_seconds"])
    return last["images"] / last["train_seconds"] if last["train_seconds"] else None
