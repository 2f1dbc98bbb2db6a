"""Order, crops and colours are pure functions of (seed, epoch, sample id, view)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sampling
from pipeline.sampling import View

FULL = View(side=64)


def sizes(count: int, height: int = 90, width: int = 120) -> np.ndarray:
    return np.tile([height, width], (count, 1))


def test_uniform_is_uniform_and_uncorrelated_between_columns_and_neighbours():
    draw = sampling.uniform(3, 1, "test", np.arange(100_000), 2)
    assert draw.min() >= 0
    assert draw.max() < 1
    assert draw.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.005)
    assert draw.var(axis=0) == pytest.approx([1 / 12, 1 / 12], abs=0.001)
    assert abs(np.corrcoef(draw.T)[0, 1]) < 0.01
    assert abs(np.corrcoef(draw[:-1, 0], draw[1:, 0])[0, 1]) < 0.01


def test_a_row_depends_on_its_id_alone():
    alone = sampling.uniform(0, 5, "crop", np.array([77]), 4)
    among = sampling.uniform(0, 5, "crop", np.array([3, 77, 12]), 4)
    assert np.array_equal(alone[0], among[1])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"purpose": "other"}])
def test_another_seed_epoch_or_purpose_is_another_stream(change):
    base = {"seed": 0, "epoch": 0, "purpose": "crop"}
    ids = np.arange(2000)
    one, other = sampling.uniform(**base, ids=ids, count=1), sampling.uniform(**(base | change), ids=ids, count=1)
    assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.08


def test_the_hash_is_splitmix64():
    """First outputs for seed 1234567, as published with the algorithm (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        words = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(sampling.GOLDEN)
    assert sampling.mix(words).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_known_values_stay_what_they_are():
    """A changed hash would silently change every run that was ever reported."""
    assert sampling.epoch_order(0, 0, 8).tolist() == [5, 1, 7, 4, 6, 0, 3, 2]
    mixed = [sampling.mixture_order(0, epoch, 4, 6, 2).tolist() for epoch in range(2)]
    assert mixed == [[7, 1, 6, 5, 0, 3, 2], [1, 2, 9, 0, 3, 8, 4]]
    draw = sampling.uniform(1, 2, "crop", np.array([5]), 2)[0]
    assert draw.tolist() == pytest.approx([0.9323233838531452, 0.7314397211179702], abs=1e-15)
    cut = sampling.geometry(View(side=32), "full", 1, 2, np.arange(3), np.array([[90, 120], [300, 200], [40, 400]]))
    assert cut.boxes.tolist() == [[4, 19, 79, 87], [61, 61, 148, 114], [0, 173, 40, 53]]  # nothing fitted the last one
    assert cut.flip.tolist() == [False, False, True]


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 300), batch=st.integers(1, 64), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_shows_each_image_at_most_once_and_drops_less_than_a_batch(count, batch, seed, epoch):
    order = sampling.epoch_order(seed, epoch, count)
    assert sorted(order) == list(range(count))
    seen = [i for step in range(count // batch) for i in sampling.batch_ids(order, step, batch)]
    assert len(set(seen)) == len(seen) == count - count % batch


@settings(deadline=None, max_examples=40)
@given(ranks=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 5))
def test_ranks_share_a_global_batch_without_overlap_whatever_their_number(ranks, step):
    order = sampling.epoch_order(9, 0, 400)
    parts = [sampling.batch_ids(order, step, 64, rank, ranks) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(parts), sampling.batch_ids(order, step, 64))


@settings(deadline=None, max_examples=80)
@given(
    real=st.integers(1, 200), generated=st.integers(0, 2000), repeat=st.integers(1, 12), seed=st.integers(0, 2**63),
    turn=st.integers(0, 50),
)  # fmt: skip
def test_a_mixture_shows_each_real_image_once_an_epoch_and_each_generated_one_once_a_turn(
    real, generated, repeat, seed, turn
):
    epochs = [
        sampling.mixture_order(seed, turn * repeat + part, real, generated, repeat).tolist() for part in range(repeat)
    ]
    for order in epochs:
        assert len(set(order)) == len(order)  # so that no batch holds an image twice
        assert sorted(order)[:real] == list(range(real))
        assert 0 <= len(order) - sampling.mixture_length(real, generated, repeat) <= 1
    drawn = sorted(sample for order in epochs for sample in order if sample >= real)
    assert drawn == list(range(real, real + generated))


def test_the_share_of_real_images_in_a_batch_is_that_of_real_ones_written_down_so_often():
    """T-I1: a third for ten times 50,000 real ones beside a million generated ones; a thousandth of that here."""
    real, generated, repeat, batch, epochs = 50, 1000, 10, 25, 300
    found = np.array([
        (sampling.batch_ids(order, step, batch) < real).sum()
        for order in (sampling.mixture_order(7, epoch, real, generated, repeat) for epoch in range(epochs))
        for step in range(sampling.mixture_length(real, generated, repeat) // batch)
    ])  # fmt: skip
    assert len(found) == epochs * 6
    # Epochs are whole here, so their mean is exact; a single batch varies as a draw without replacement does.
    assert found.mean() / batch == pytest.approx(1 / 3, abs=1e-12)
    assert found.var() == pytest.approx(batch * (1 / 3) * (2 / 3) * (150 - batch) / 149, rel=0.1)
    first = found[::6]
    assert first.mean() / batch == pytest.approx(1 / 3, abs=4 * (2 / 9 / (batch * epochs)) ** 0.5)


@pytest.mark.parametrize("repeat", [1, 10])
def test_without_generated_images_a_mixture_is_the_epoch_as_it_was(repeat):
    """T-I2."""
    for epoch in range(12):
        order = sampling.mixture_order(3, epoch, 77, 0, repeat)
        assert np.array_equal(order, sampling.epoch_order(3, epoch, 77))
    assert sampling.mixture_length(77, 0, repeat) == 77


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 500), width=st.integers(1, 500), low=st.floats(0.01, 1.0))
def test_crops_lie_inside_the_picture_and_obey_the_aspect_where_they_can(height, width, low):
    view = View(side=32, area=(low, 1.0))
    boxes = sampling.geometry(view, "full", 0, 0, np.arange(50), sizes(50, height, width)).boxes
    top, left, high, wide = boxes.T
    assert (high >= 1).all()
    assert (wide >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()
    if min(height, width) > 100 and 0.75 <= width / height <= 4 / 3:
        ratio = wide / high
        assert (ratio > 0.75 * 0.97).all()
        assert (ratio < 4 / 3 * 1.03).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), count=st.integers(1, 40), low=st.integers(1, 300),
    widest=st.integers(0, 900),
)  # fmt: skip
def test_views_drawn_together_are_what_each_is_alone(seed, epoch, count, low, widest):
    views = {
        "full": View(side=64), "tight": View(side=32, area=(0.05, 0.2), flip=0.0),
        "eval": View(side=64, centre=0.875), "square": View(side=32, aspect=(1.0, 1.0), flip=0.9),
    }  # fmt: skip
    draw = np.random.default_rng(seed)
    ids, shapes = draw.integers(0, 10**7, count), draw.integers(low, low + widest + 1, (count, 2))
    together = sampling.geometries(views, seed, epoch, ids, shapes)
    assert together.keys() == views.keys()
    for name, view in views.items():
        alone = sampling.geometry(view, name, seed, epoch, ids, shapes)
        assert np.array_equal(together[name].boxes, alone.boxes)
        assert np.array_equal(together[name].flip, alone.flip)


def test_crop_areas_follow_the_same_law_as_torchvision():
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    picture = torch.empty(3, 300, 400)
    theirs = [RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    boxes = sampling.geometry(FULL, "full", 0, 0, np.arange(4000), sizes(4000, 300, 400)).boxes
    for column in range(4):
        mine, other = boxes[:, column], np.array([box[column] for box in theirs])
        error = np.hypot(mine.std(), other.std()) / np.sqrt(4000)
        assert abs(mine.mean() - other.mean()) < 4 * error
        assert mine.std() == pytest.approx(other.std(), rel=0.06)


def test_a_shared_crop_and_the_centre_crop():
    ids = np.arange(20)
    own = sampling.geometry(FULL, "full", 0, 0, ids, sizes(20))
    small = sampling.geometry(FULL, "small", 0, 0, ids, sizes(20))
    assert not np.array_equal(own.boxes, small.boxes)
    centre = sampling.geometry(View(side=64, centre=0.5), "eval", 0, 0, ids[:1], sizes(1, 90, 120))
    assert centre.boxes.tolist() == [[22, 37, 45, 45]]
    assert not centre.flip.any()


def test_colour_strengths_stay_in_their_ranges_and_rows_left_alone_are_neutral():
    view = View(side=32, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2)
    drawn = sampling.colours(view, "small", 0, 0, np.arange(20_000))
    assert drawn.factors.min() >= 0.6
    assert drawn.factors.max() <= 1.4
    assert np.abs(drawn.hue).max() <= 0.1
    neutral = (drawn.factors == 1).all(axis=1) & (drawn.hue == 0)
    assert neutral.mean() == pytest.approx(0.2, abs=0.01)
    assert drawn.gray.mean() == pytest.approx(0.2, abs=0.01)
    assert (np.sort(drawn.order, axis=1) == np.arange(4)).all()


def test_blur_and_solarise_are_drawn_last_so_that_the_other_colours_stay_what_they_were(monkeypatch):
    ids, counts, uniform = np.arange(20_000), [], sampling.uniform
    monkeypatch.setattr(sampling, "uniform", lambda *a, **k: counts.append(a[4]) or uniform(*a, **k))
    plain = View(side=112, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2)
    whole = dataclasses.replace(plain, blur=0.5, solarise=0.2)
    one, other = (sampling.colours(view, "v", 3, 7, ids) for view in (plain, whole))
    assert counts == [10, 13]
    for name in ("factors", "hue", "order", "gray"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.blur is None
    assert one.solarise is None
    assert other.blur is not None
    assert other.solarise is not None
    sigma = other.blur[other.blur > 0]
    assert len(sigma) / len(ids) == pytest.approx(0.5, abs=0.02)
    assert 0.05 <= sigma.min() < 0.06  # half of SimCLR's 0.1 to 2 pixels at 224
    assert 0.99 < sigma.max() <= 1.0
    assert sigma.mean() == pytest.approx(0.525, abs=0.01)
    assert other.solarise.mean() == pytest.approx(0.2, abs=0.01)
    alone = sampling.colours(whole, "v", 3, 7, np.array([77]))
    assert alone.blur is not None
    assert alone.blur[0] == other.blur[77]
