"""Order, crops and colours are pure functions of (seed, epoch, sample id, view)."""

from __future__ import annotations

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
    draw = sampling.uniform(1, 2, "crop", np.array([5]), 2)[0]
    assert draw.tolist() == pytest.approx([0.9323233838531452, 0.7314397211179702], abs=1e-15)


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
