"""RandAugment, CLSA's strong changes and random erasing: Pillow's arithmetic, and chance that belongs to the sample."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment

from pipeline import augment
from pipeline.augment import LEVELS, MEAN_COLOUR, RAND_AUGMENT, STRONG, Pool, erase, rand_augment, strengthen
from pipeline.colour import recolour
from pipeline.sampling import View, colours
from pipeline.views import MEAN, Batch, make_views, normalise, patchify
from tests.images import picture

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 48
IDS = np.arange(100, 1100)
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def pictures(count: int) -> list[Image.Image]:
    return [picture(seed, SIDE, SIDE) for seed in range(count)]


def stacked(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(each) for each in images]))


def changed(pool: Pool, name: str, images: list[Image.Image], level: float, sign: int) -> torch.Tensor:
    entry = pool[name]
    assert entry is not None
    change, rule = entry
    amount = rule(np.full(len(images), level), np.full(len(images), float(sign)), images[0].width)
    amounts = torch.from_numpy(amount.astype(np.float32)).view(len(images), -1, 1, 1)
    return change(stacked(images).float(), amounts).clamp(0, 255).to(torch.uint8).int()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0.0, 4.2, 9.7])
@pytest.mark.parametrize("name", RAND_AUGMENT)
def test_each_change_is_timms(name: str, level: float, sign: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(auto_augment, "random", SimpleNamespace(random=lambda: 0.1 if sign > 0 else 0.9))
    settings = {"img_mean": tuple(map(int, MEAN_COLOUR)), "interpolation": Image.Resampling.BICUBIC}
    theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=settings)
    images = pictures(4)
    expected = stacked([theirs(each) for each in images]).int()
    apart = (changed(RAND_AUGMENT, name, images, level, sign) - expected).abs()
    if name in MOVES:  # another cubic filter
        assert apart.float().mean() < 1.0
        assert (apart > 1).float().mean() < 0.1
        assert apart.max() < 40
    else:
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01


def by_pillow(name: str, image: Image.Image, level: int, sign: int) -> Image.Image:
    """A strong change as CLSA defines it: at level ten Brightness, Color, Contrast and Sharpness are 0.9 (+ 0.05),
    Posterize 4 (+ 4), Rotate 30, shears and shifts 0.3, Solarize 256."""
    share, side = level / 10, image.width
    if name in ("AutoContrast", "Equalize"):
        return getattr(ImageOps, name.lower())(image)
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(0.9 * share + 0.05)
    if name == "Posterize":
        return ImageOps.posterize(image, int(4 * share) + 4)
    if name == "Solarize":
        return ImageOps.solarize(image, 256 - int(256 * share))
    if name == "Rotate":
        return image.rotate(sign * int(30 * share))
    way = sign * 0.3 * level / 10
    move = {
        "ShearX": (1, way, 0, 0, 1, 0), "ShearY": (1, 0, 0, way, 1, 0),
        "TranslateX": (1, 0, int(way * side), 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, int(way * side)),
    }[name]  # fmt: skip
    return image.transform(image.size, Image.Transform.AFFINE, move)


@pytest.mark.parametrize("name", [name for name, entry in STRONG.items() if entry])
def test_each_strong_change_is_pillows_at_every_level(name: str):
    images = pictures(2)
    for level in range(1, LEVELS):
        for sign in (1, -1):
            expected = stacked([by_pillow(name, each, level, sign) for each in images]).int()
            apart = (changed(STRONG, name, images, level, sign) - expected).abs()
            assert apart.max() <= (name == "AutoContrast"), (level, sign)  # the others to the bit, moves as well
            assert (apart > 0).float().mean() < 0.01


def test_the_strong_pool_has_fourteen_and_both_pools_share_their_changes():
    assert len(STRONG) == 14
    assert len(RAND_AUGMENT) == 15
    used = [{entry[0] for entry in pool.values() if entry} for pool in (RAND_AUGMENT, STRONG)]
    assert used[1] - used[0] == {augment.move_nearest}
    assert used[0] - used[1] == {augment.move_cubic, augment.invert, augment.brighten_dark}
    assert [round(255 * value) for value in MEAN] == list(MEAN_COLOUR)


def strong(images: torch.Tensor, seed: int, epoch: int, ids: np.ndarray, name: str = "strong0") -> torch.Tensor:
    return strengthen(images, View(side=SIDE, strong=5), name, seed, epoch, ids)


# Two changes are made with probability 1/2 each, or five; one in fifteen, or two in fourteen, does nothing to see.
@pytest.mark.parametrize(("augmented", "least", "most"), [(rand_augment, 0.5, 0.95), (strong, 0.8, 1)])
def test_what_becomes_of_an_image_is_its_own(augmented, least, most):
    images = stacked(pictures(8)).repeat(4, 1, 1, 1)
    ids, before = np.arange(32), images.clone()
    whole = augmented(images, 3, 1, ids)
    assert torch.equal(images, before)
    order = np.random.default_rng(0).permutation(32)
    assert torch.equal(augmented(images[order], 3, 1, ids[order]), whole[order])
    assert torch.equal(augmented(images[5:6], 3, 1, ids[5:6]), whole[5:6])
    for other in (augmented(images, 4, 1, ids), augmented(images, 3, 2, ids)):
        assert not torch.equal(other, whole)
    assert least < (whole != images).flatten(1).any(dim=1).float().mean() <= most


def test_views_of_an_image_are_strengthened_apart():
    images, ids = stacked(pictures(8)), np.arange(8)
    assert not torch.equal(strong(images, 0, 0, ids), strong(images, 0, 0, ids, "strong1"))


def test_strong_changes_are_drawn_alike_at_whole_levels_and_either_way(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[np.ndarray]] = {name: [] for name in STRONG}

    def noted(name: str):
        def rule(level: np.ndarray, sign: np.ndarray, side: int) -> np.ndarray:
            seen[name].append(level * sign)
            return level

        return rule

    monkeypatch.setattr(augment, "STRONG", {name: (lambda x, _: x, noted(name)) for name in STRONG})
    strengthen(torch.zeros(1000, 2, 2, 3, dtype=torch.uint8), View(side=2, strong=5), "v", 0, 0, IDS)
    drawn = {name: np.concatenate(each) for name, each in seen.items()}
    for name, each in drawn.items():  # 5 of a thousand, a half, a fourteenth: 179, give or take 13
        assert 125 < len(each) < 235, name
    levels, counts = np.unique(np.concatenate(list(drawn.values())), return_counts=True)
    assert levels.tolist() == [*range(-9, 0), *range(1, 10)]
    assert 95 < counts.min() <= counts.max() < 185  # 139, give or take 11


def test_a_strong_view_is_coloured_rounded_changed_and_normalised():
    view, ids = View(side=SIDE, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5, strong=5), np.arange(8)
    images = stacked(pictures(8))
    made = make_views(Batch({"v": images}, torch.zeros(8), torch.arange(8), 2), {"v": view}, patch=8, seed=3)
    coloured = recolour(images.float() / 255, colours(view, "v", 3, 2, ids))
    levels = (255 * coloured).round().to(torch.uint8)
    expected = normalise(strengthen(levels, view, "v", 3, 2, ids).float() / 255)
    assert torch.equal(made["v"].pixels, patchify(expected, 8))
    plain = View(side=SIDE, strong=5)
    made = make_views(Batch({"v": images}, torch.zeros(8), torch.arange(8), 2), {"v": plain}, patch=8, seed=3)
    expected = normalise(strengthen(images, plain, "v", 3, 2, ids).float() / 255)
    assert torch.equal(made["v"].pixels, patchify(expected, 8))


def test_levels_are_spread_about_the_magnitude(monkeypatch: pytest.MonkeyPatch):
    seen, signs = [], []

    def note(level: np.ndarray, sign: np.ndarray, side: int) -> np.ndarray:
        seen.append(level)
        signs.append(sign)
        return level

    monkeypatch.setattr(augment, "RAND_AUGMENT", {name: (lambda x, _: x, note) for name in RAND_AUGMENT})
    rand_augment(torch.zeros(1000, 2, 2, 3, dtype=torch.uint8), 0, 0, IDS, magnitude=7.0, deviation=0.5)
    levels = np.concatenate(seen)
    assert 900 < len(levels) < 1100  # a half of two for each of a thousand
    assert levels.mean() == pytest.approx(7.0, abs=0.06)
    assert levels.std() == pytest.approx(0.5, abs=0.05)
    assert abs(np.concatenate(signs).mean()) < 0.12
    seen.clear()
    rand_augment(torch.zeros(1000, 2, 2, 3, dtype=torch.uint8), 0, 0, IDS, magnitude=10.0)
    assert np.concatenate(seen).max() == 10.0


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
