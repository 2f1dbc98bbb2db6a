"""RandAugment and random erasing: timm's arithmetic on Pillow's pictures, and chance that belongs to the sample."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from pipeline import augment
from pipeline.augment import CHANGES, erase, rand_augment
from tests.images import picture

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 48
IDS = np.arange(100, 1100)
# timm's names in the order of ours.
NAMES = (
    "AutoContrast Equalize Invert Rotate PosterizeIncreasing SolarizeIncreasing SolarizeAdd ColorIncreasing "
    "ContrastIncreasing BrightnessIncreasing SharpnessIncreasing ShearX ShearY TranslateXRel TranslateYRel"
).split()
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def pictures(count: int) -> list[Image.Image]:
    return [picture(seed, SIDE, SIDE) for seed in range(count)]


def stacked(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(each) for each in images]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0.0, 4.2, 9.7])
@pytest.mark.parametrize("name", NAMES)
def test_each_change_is_timms(name: str, level: float, sign: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(auto_augment, "random", SimpleNamespace(random=lambda: 0.1 if sign > 0 else 0.9))
    settings = {"img_mean": tuple(map(int, augment.FILL)), "interpolation": Image.Resampling.BICUBIC}
    theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=settings)
    images = pictures(4)
    expected = stacked([theirs(each) for each in images]).int()
    strength = torch.full((4, 1, 1, 1), level), torch.full((4, 1, 1, 1), float(sign))
    found = CHANGES[NAMES.index(name)](stacked(images).float(), *strength).clamp(0, 255).to(torch.uint8).int()
    apart = (found - expected).abs()
    if name in MOVES:  # another cubic filter
        assert apart.float().mean() < 1.0
        assert (apart > 1).float().mean() < 0.1
        assert apart.max() < 40
    else:
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01


def test_what_becomes_of_an_image_is_its_own():
    images = stacked(pictures(8)).repeat(4, 1, 1, 1)
    ids = np.arange(32)
    whole = rand_augment(images, 3, 1, ids)
    order = np.random.default_rng(0).permutation(32)
    assert torch.equal(rand_augment(images[order], 3, 1, ids[order]), whole[order])
    assert torch.equal(rand_augment(images[5:6], 3, 1, ids[5:6]), whole[5:6])
    for other in (rand_augment(images, 4, 1, ids), rand_augment(images, 3, 2, ids)):
        assert not torch.equal(other, whole)
    # Each of two changes is made with probability 1/2; of those that are, one in fifteen does nothing to see.
    changed = (whole != images).flatten(1).any(dim=1).float().mean()
    assert 0.5 < changed < 0.95


def test_levels_are_spread_about_the_magnitude(monkeypatch: pytest.MonkeyPatch):
    seen, signs = [], []

    def note(x: torch.Tensor, level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        seen.append(level.flatten())
        signs.append(sign.flatten())
        return x

    monkeypatch.setattr(augment, "CHANGES", (note,) * 15)
    rand_augment(torch.zeros(1000, 2, 2, 3, dtype=torch.uint8), 0, 0, IDS, magnitude=7.0, deviation=0.5)
    levels = torch.cat(seen)
    assert 900 < len(levels) < 1100  # a half of two for each of a thousand
    assert levels.mean() == pytest.approx(7.0, abs=0.06)
    assert levels.std() == pytest.approx(0.5, abs=0.05)
    assert torch.cat(signs).mean().abs() < 0.12
    seen.clear()
    rand_augment(torch.zeros(1000, 2, 2, 3, dtype=torch.uint8), 0, 0, IDS, magnitude=10.0)
    assert torch.cat(seen).max() == 10.0


def test_a_rectangle_of_a_quarter_of_the_images_becomes_noise():
    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    pixels = torch.full((1000, 32, 32, 3), 9.0)
    found = erase(pixels.clone(), 0.25, 0, 0, IDS, noise())
    erased = (found != 9.0).all(dim=-1)  # (B, S, S)
    struck = erased.flatten(1).any(dim=1)
    assert struck.float().mean() == pytest.approx(0.25, abs=0.04)
    for mask in erased[struck][:50]:
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        high, wide = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert mask.sum() == high * wide  # one whole rectangle
        assert 0.015 < high * wide / 1024 < 0.36
    values = found[found != 9.0]
    assert values.mean().abs() < 0.02
    assert values.std() == pytest.approx(1.0, abs=0.02)
    alone = erase(pixels[:300].clone(), 0.25, 0, 0, IDS[:300], noise())
    assert torch.equal((alone != 9.0), (found[:300] != 9.0))  # where does not depend on the neighbours
    assert torch.equal(erase(pixels[:10].clone(), 0.0, 0, 0, IDS[:10], noise()), pixels[:10])
