"""Times to a target, intervals and factors, against numbers worked out by hand or by scipy."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tools.comparing.analysis import (
    Bounds,
    Curve,
    Outcome,
    contrast,
    decompose,
    joint_ratio,
    margin,
    mean_interval,
    ratio_interval,
    steady_rate,
    t_quantile,
    time_to_target,
)
from tools.comparing.verdict import CLAIM, SURELY

RISING = Curve(seconds=(100.0, 400.0, 900.0), scores=(0.20, 0.30, 0.35), images=(1000.0, 4000.0, 9000.0))


@pytest.mark.parametrize("degrees", [*range(1, 31), 31, 40, 60, 120, 1000])
def test_t_quantile_is_scipys(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-4)


def test_one_value_has_no_quantile():
    with pytest.raises(ValueError, match="two values"):
        t_quantile(0)


def test_the_target_is_crossed_linearly_in_log_seconds():
    # Half way from .20 to .30 is the geometric mean of 100 and 400 s; images follow the seconds.
    crossing = time_to_target(RISING, 0.25)
    assert crossing.reached
    assert crossing.seconds.low == crossing.seconds.high == pytest.approx(200.0)
    assert crossing.images.low == pytest.approx(2000.0)


def test_a_score_that_is_the_target_is_its_time():
    assert time_to_target(RISING, 0.30).seconds.low == pytest.approx(400.0)


def test_the_first_crossing_counts_though_the_curve_falls_again():
    curve = Curve((10.0, 20.0, 40.0, 80.0), (0.1, 0.3, 0.2, 0.4), (1.0, 2.0, 4.0, 8.0))
    assert time_to_target(curve, 0.2).seconds.low == pytest.approx(math.sqrt(200))


def test_scores_of_the_same_second_do_not_divide_by_nothing():
    crossing = time_to_target(Curve((10.0, 10.0), (0.1, 0.3), (5.0, 5.0)), 0.2)
    assert (crossing.seconds.low, crossing.images.low) == (10.0, 5.0)


def test_a_target_never_reached_is_a_lower_bound():
    crossing = time_to_target(RISING, 0.36)
    assert not crossing.reached
    assert crossing.seconds == Bounds(900.0, math.inf)


def test_a_target_reached_before_the_first_score_is_an_upper_bound():
    crossing = time_to_target(RISING, 0.10)
    assert crossing.reached
    assert crossing.seconds == Bounds(0.0, 100.0)


def test_an_empty_curve_says_nothing():
    assert not time_to_target(Curve(), 0.1).seconds.known


def test_bounds_divide():
    exact, more, within = Bounds(200.0, 200.0), Bounds(400.0, math.inf), Bounds(0.0, 50.0)
    assert exact.over(Bounds(100.0, 100.0)) == Bounds(2.0, 2.0)
    assert exact.over(more) == Bounds(0.0, 0.5)  # the arm never got there: at most half as fast
    assert exact.over(within) == Bounds(4.0, math.inf)
    assert more.over(more) == Bounds(0.0, math.inf)
    assert (exact.over(more).words, exact.over(more).number) == ("at most ", 0.5)
    assert (exact.over(within).words, exact.over(within).number) == ("more than ", 4.0)


def test_bounds_of_several_seeds_join_only_where_they_point_one_way():
    exact, more, less = Bounds(2.0, 2.0), Bounds(8.0, math.inf), Bounds(0.0, 0.5)
    whole = joint_ratio([exact, Bounds(8.0, 8.0)])
    least, most = joint_ratio([exact, more]), joint_ratio([exact, less])
    assert whole is not None
    assert least is not None
    assert most is not None
    assert (whole.side, whole.mean) == ("", pytest.approx(4.0))
    assert whole.low is not None
    assert whole.high is not None
    # The end that a bound leaves is that of the bounds themselves; the other is open.
    assert (least.side, least.mean, least.low, least.high) == ("at least", whole.mean, whole.low, None)
    assert (most.side, most.mean, most.low) == ("at most", pytest.approx(1.0), None)
    assert most.high == pytest.approx(math.exp(12.7062 * math.log(2)), rel=1e-4)
    assert joint_ratio([more, less]) is None
    assert joint_ratio([exact, Bounds(0.0, math.inf)]) is None
    assert joint_ratio([]) is None


def test_the_end_that_bounds_leave_covers_the_mean():
    """Studies of five seeds whose larger ratios (29 % of them) are seen as bounds."""
    generator = random.Random(0)
    below = 0
    for _ in range(2000):
        ratios = [math.exp(generator.gauss(math.log(2.0), 0.4)) for _ in range(5)]
        seen = [Bounds(r, r) if r < 2.5 else Bounds(2.5, math.inf) for r in ratios]
        found = joint_ratio(seen)
        assert found is not None
        assert found.low is not None
        below += found.low <= 2.0
    assert 0.95 < below / 2000 < 0.98


def test_ratio_interval_by_hand():
    # Logs are ±ln 2 with mean 0 and deviation ln 2 · sqrt 2: half the width is 12.7062 · ln 2.
    found = ratio_interval([2.0, 0.5])
    assert found.mean == pytest.approx(1.0)
    assert found.high == pytest.approx(math.exp(12.7062 * math.log(2)), rel=1e-4)
    assert found.low == pytest.approx(math.exp(-12.7062 * math.log(2)), rel=1e-4)


def test_interval_is_scipys():
    values = [0.021, 0.035, 0.012, 0.040]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    found = mean_interval(values)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_one_seed_has_a_ratio_and_no_interval():
    found = ratio_interval([1.7])
    assert found.mean == pytest.approx(1.7)
    assert (found.low, found.high, found.count) == (None, None, 1)


def test_factors_by_hand():
    # Baseline: 20 epochs of 10 s. Arm: 8 epochs of 13 s. Half the epochs and more, each dearer: 200 / 104.
    base = time_to_target(Curve((100.0, 200.0), (0.1, 0.3), (1000.0, 2000.0)), 0.3)
    arm = time_to_target(Curve((52.0, 104.0), (0.1, 0.3), (400.0, 800.0)), 0.3)
    found = decompose(base, arm, base_epoch=100.0, arm_epoch=100.0)
    assert found is not None
    assert found.ratio == pytest.approx(200 / 104)
    assert found.epochs == pytest.approx(2.5)
    assert found.seconds_per_epoch == pytest.approx(10 / 13)


@given(
    times=st.tuples(*[st.floats(1.0, 1e4)] * 2),
    rates=st.tuples(*[st.floats(1.0, 1e5)] * 2),
    target=st.floats(0.11, 0.29),
)
def test_the_factors_multiply_to_the_ratio(times, rates, target):
    base, arm = (
        time_to_target(Curve((time, 3 * time), (0.1, 0.3), (time * rate, 3 * time * rate)), target)
        for time, rate in zip(times, rates, strict=True)
    )
    found = decompose(base, arm, 1280.0, 1280.0)
    assert found is not None
    assert found.epochs * found.seconds_per_epoch == pytest.approx(found.ratio, rel=1e-9)
    assert found.seconds_per_epoch == pytest.approx(rates[1] / rates[0], rel=1e-6)


def outcome(scores: tuple[float, ...], rate: float = 10.0) -> Outcome:
    seconds = (100.0, 200.0, 400.0)
    return Outcome(Curve(seconds, scores, tuple(s * rate for s in seconds)), scores[-1], 400 * rate, 400.0, 1000.0)


def test_contrast_pairs_by_seed_and_takes_the_baselines_own_end_as_target():
    base = {0: outcome((0.1, 0.2, 0.3)), 1: outcome((0.1, 0.2, 0.4)), 7: outcome((0.1, 0.2, 0.3))}
    arm = {0: outcome((0.2, 0.3, 0.35), 8.0), 1: outcome((0.3, 0.4, 0.41), 8.0), 5: outcome((0.9, 0.9, 0.9))}
    found = contrast(base, arm, None)
    assert found.seeds == (0, 1)
    assert [pair.target for pair in found.pairs] == [0.3, 0.4]
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(0.03)
    assert found.ratio is not None
    assert found.ratio.mean == pytest.approx(2.0)
    assert found.epochs is not None
    assert (found.epochs.mean, found.seconds_per_epoch) == (pytest.approx(2.5), pytest.approx(0.8))
    assert found.pace == pytest.approx(0.8)
    assert found.never == 0


def test_contrast_with_a_seed_that_never_arrives_has_a_bound_and_no_interval():
    base = {0: outcome((0.1, 0.2, 0.3)), 1: outcome((0.1, 0.2, 0.3))}
    found = contrast(base, {0: outcome((0.2, 0.3, 0.35)), 1: outcome((0.1, 0.2, 0.29))}, None)
    assert found.never == 1
    assert found.seconds_per_epoch is None
    assert found.ratio is not None
    assert found.epochs is not None
    assert (found.ratio.side, found.ratio.mean) == ("at most", pytest.approx(math.sqrt(2.0)))  # one of 2, one at most 1
    # The factor of the epochs is a bound as well; times what an epoch costs it is the ratio's.
    assert (found.epochs.side, found.epochs.mean * found.pace) == ("at most", pytest.approx(found.ratio.mean))
    assert (found.as_fast(2.0), found.as_fast(2.01)) == (1, 0)


@pytest.mark.parametrize("scores", [(0.28, 0.295, 0.31, 0.31, 0.31), (0.28, 0.29, 0.30, 0.31, 0.32)])
def test_an_arm_that_is_the_baseline_itself_is_rarely_called_twice_as_fast(scores):
    """Five seeds, five lengths, runs that scatter by 0.8 points: the standard set, if both arms were one recipe."""
    generator, seconds = random.Random(0), (30.0, 60.0, 120.0, 240.0, 480.0)

    def trained() -> dict[int, tuple[float, ...]]:
        return {seed: tuple(generator.gauss(score, 0.008) for score in scores) for seed in range(5)}

    def outcomes(runs: dict[int, tuple[float, ...]], upto: int) -> dict[int, Outcome]:
        until = seconds[:upto]
        return {
            seed: Outcome(Curve(until, each[:upto], until), each[upto - 1], until[-1], until[-1], 1.0)
            for seed, each in runs.items()
        }

    held, logs = 0, []
    for _ in range(500):
        one, other = trained(), trained()
        best = max(range(5), key=lambda at: statistics.fmean(each[at] for each in one.values())) + 1
        found = contrast(outcomes(one, 5), outcomes(other, 5), None, outcomes(one, best)).ratio
        if found is None:
            continue
        logs.append(math.log(found.mean))
        held += found.mean >= CLAIM and found.low is not None and found.low > SURELY
    assert len(logs) > 250  # of others bounds point both ways
    assert held <= 5  # 1 in 100; 0 and 1 in 500
    assert 0.8 < math.exp(statistics.fmean(logs)) < 1.25


def test_contrast_without_scores_still_knows_the_pace():
    blind = Outcome(Curve(), None, 4000.0, 400.0, 1000.0)
    found = contrast({0: blind}, {0: Outcome(Curve(), None, 2000.0, 400.0, 1000.0)}, None)
    assert found.pairs == ()
    assert (found.difference, found.ratio) == (None, None)
    assert found.pace == pytest.approx(0.5)


def test_a_margin_needs_five_points_and_three_errors():
    assert margin(0.30, 0.01, 0.25, 0.01).enough  # 5 points, 3.5 errors
    assert not margin(0.29, 0.001, 0.25, 0.001).enough  # 28 errors, but 4 points
    assert not margin(0.32, 0.02, 0.25, 0.02).enough  # 7 points, but 2.5 errors
    assert margin(0.30, 0.01, 0.25, 0.01).errors == pytest.approx(5 / math.sqrt(2))


def test_the_rate_leaves_out_the_first_steps_of_a_long_run_only():
    rows = [
        {"step": 10, "images": 100, "train_seconds": 10.0},  # slow: 10 images/s
        {"step": 50, "images": 500, "train_seconds": 14.0},
        {"step": 200, "images": 2000, "train_seconds": 29.0},  # 1500 images in 15 s
    ]
    assert steady_rate(rows) == pytest.approx(100.0)
    assert steady_rate(rows[:2]) == pytest.approx(500 / 14)
    assert steady_rate([]) is None
