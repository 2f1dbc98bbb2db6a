"""uint8 crops -> patches: colour, normalisation, cutting and masking against slow references."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps

from pipeline import sampling
from pipeline.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION, blur, colour_maps, recolour, solarise
from pipeline.errors import UsageError
from pipeline.geometry import _batched, _one_by_one, crop_resize
from pipeline.sampling import Colours, Geometry, View
from pipeline.views import (
    Batch,
    check_views,
    denormalise,
    draw_mask,
    draw_noise,
    make_views,
    normalise,
    patchify,
    take,
    unpatchify,
)  # fmt: skip
from tests.conftest import PYTHON
from tests.images import picture, psnr


def drawn(factors=(1.0, 1.0, 1.0), hue=0.0, order=(0, 1, 2, 3), gray=False) -> Colours:
    return Colours(np.array([factors]), np.array([hue]), np.array([order]), np.array([gray]))


def midtones(count: int = 1, side: int = 8) -> torch.Tensor:
    """Pixels that no change of moderate strength pushes out of [0, 1]."""
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.4


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3), (1, 2, 3, 0), (3, 2, 1, 0)])
def test_jitter_equals_torchvision_change_by_change_in_any_order(order):
    pixels, factors = midtones(), (1.2, 0.8, 1.3)
    theirs = pixels.permute(0, 3, 1, 2)
    for change in order:
        if change == BRIGHTNESS:
            theirs = TF.adjust_brightness(theirs, factors[0])
        elif change == CONTRAST:
            theirs = TF.adjust_contrast(theirs, factors[1])
        elif change == SATURATION:
            theirs = TF.adjust_saturation(theirs, factors[2])
    mine = recolour(pixels, drawn(factors, order=order)).permute(0, 3, 1, 2)
    assert torch.allclose(mine, theirs, atol=1e-4)  # torchvision rounds the luma weights to four digits


def test_grayscale_hue_and_neutral():
    pixels = midtones()
    gray = recolour(pixels, drawn(gray=True))
    assert torch.allclose(gray, TF.rgb_to_grayscale(pixels.permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1), atol=2e-4)
    turned = recolour(pixels, drawn(hue=0.1))
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(turned @ luma, pixels @ luma, atol=1e-5)
    assert (turned - pixels).abs().max() > 0.02
    assert torch.allclose(recolour(turned, drawn(hue=-0.1)), pixels, atol=1e-4)
    assert torch.allclose(recolour(pixels, drawn(hue=1 / 3)), recolour(pixels, drawn(hue=-2 / 3)), atol=1e-4)
    assert torch.allclose(recolour(pixels, drawn()), pixels, atol=1e-6)


def test_hue_turns_the_way_that_torchvision_turns():
    pixels = midtones()
    theirs = TF.adjust_hue(pixels.permute(0, 3, 1, 2), 0.08).permute(0, 2, 3, 1)
    mine = recolour(pixels, drawn(hue=0.08))
    along = ((mine - pixels) * (theirs - pixels)).sum() / ((mine - pixels).norm() * (theirs - pixels).norm())
    assert along > 0.5


def test_each_image_has_its_own_map():
    pixels = midtones(2)
    both = Colours(np.array([[1.2, 1, 1], [0.8, 1, 1]]), np.zeros(2), np.tile(np.arange(4), (2, 1)), np.zeros(2, bool))
    matrix, offset = colour_maps(pixels.mean(dim=(1, 2)), both)
    assert matrix[0].diagonal().tolist() == pytest.approx([1.2] * 3)
    assert matrix[1].diagonal().tolist() == pytest.approx([0.8] * 3)
    assert offset.abs().max() == 0
    assert HUE == 3


def dense_blur(pixels: np.ndarray, sigma: float, reach: int) -> np.ndarray:
    """(S, S, 3) in float64: each pixel the mean of its neighbours by exp(-(dx^2 + dy^2) / 2 sigma^2), mirrored edge."""
    side = len(pixels)
    offset = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * sigma**2))
    padded = np.pad(pixels.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    made = np.zeros_like(pixels, np.float64)
    for down in range(2 * reach + 1):
        for across in range(2 * reach + 1):
            made += kernel[down, across] * padded[down : down + side, across : across + side]
    return made / kernel.sum()


@pytest.mark.parametrize(("side", "reach"), [(8, 1), (32, 2), (96, 5)])
def test_each_image_is_blurred_by_a_gaussian_of_its_own(side, reach):
    pixels = torch.rand(3, side, side, 3, generator=torch.Generator().manual_seed(2))
    sigma = np.array([0.02, 0.5, 2.0])
    made = blur(pixels, sigma)
    for row in range(3):
        assert np.abs(made[row].numpy() - dense_blur(pixels[row].numpy(), sigma[row], reach)).max() < 1e-6
    theirs = TF.gaussian_blur(pixels[2:].permute(0, 3, 1, 2), [2 * reach + 1] * 2, [2.0, 2.0]).permute(0, 2, 3, 1)
    assert torch.allclose(made[2:], theirs, atol=1e-6)
    assert torch.allclose(made[0], pixels[0], atol=1e-6)  # a sigma of a fiftieth of a pixel changes nothing


def test_solarise_equals_pillow():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    theirs = np.asarray(ImageOps.solarize(Image.fromarray(levels[0].numpy()), threshold=128))
    assert np.array_equal((solarise(levels / 255)[0] * 255).round().numpy().astype(np.uint8), theirs)


def test_blur_and_solarise_come_after_the_colours_and_touch_what_is_drawn_alone():
    pixels, still = midtones(4, 32), np.zeros(4, bool)
    jitter = (np.full((4, 3), 1.2), np.full(4, 0.05), np.tile(np.arange(4), (4, 1)), np.array([True, False] * 2))
    plain = recolour(pixels, Colours(*jitter))
    sigma, inverted = np.array([0.0, 1.5, 0.0, 1.5]), np.array([False, False, True, True])
    made = recolour(pixels, Colours(*jitter, blur=sigma, solarise=inverted))
    assert torch.equal(made[0], plain[0])
    assert torch.equal(made[1:2], blur(plain[1:2], sigma[1:2]))
    assert torch.equal(made[2], solarise(plain[2]))
    assert torch.equal(made[3:], solarise(blur(plain[3:], sigma[3:])))
    assert torch.equal(recolour(pixels, Colours(*jitter, blur=np.zeros(4), solarise=still)), plain)


@pytest.mark.parametrize("resize", [_one_by_one, _batched])
@pytest.mark.parametrize("side", [16, 32, 48])
def test_crop_and_resize_equal_pillow(resize, side):
    pictures = [np.asarray(picture(seed, 96, 72)) for seed in range(6)]
    canvas = torch.zeros(6, 80, 100, 3, dtype=torch.uint8)
    for row, each in enumerate(pictures):
        canvas[row, :72, :96] = torch.from_numpy(each.copy())
    boxes = np.array(
        [[0, 0, 72, 96], [10, 20, 32, 32], [5, 5, 60, 41], [71, 95, 1, 1], [0, 40, 16, 17], [3, 2, 48, 48]]
    )
    mine = resize(canvas, boxes, side).numpy()
    pillow = [
        np.asarray(
            Image.fromarray(each[top : top + high, left : left + wide]).resize((side, side), Image.Resampling.BILINEAR)
        )
        for each, (top, left, high, wide) in zip(pictures, boxes, strict=True)
    ]
    assert psnr(mine, np.stack(pillow)).min() > 50


def test_flip_mirrors_the_rows_that_are_flipped():
    canvas = torch.from_numpy(np.asarray(picture(0, 32, 32)).copy())[None].repeat(2, 1, 1, 1)
    boxes = np.array([[0, 0, 32, 32]] * 2)
    made = crop_resize(canvas, Geometry(boxes, np.array([False, True])), 32)
    assert torch.equal(made[0], canvas[0])
    assert torch.equal(made[1], canvas[1].flip(1))


def test_unpatchify_inverts_patchify_and_patches_hold_channel_row_column():
    images = torch.randn(2, 24, 24, 3)
    patches = patchify(images, 8)
    assert patches.shape == (2, 9, 192)
    assert torch.equal(unpatchify(patches, 8), images)
    weight = torch.randn(5, 3, 8, 8)
    convolved = torch.nn.functional.conv2d(images.permute(0, 3, 1, 2), weight, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(patches @ weight.flatten(1).T, convolved, atol=1e-4)


def test_normalise_and_back():
    images = midtones()
    assert torch.allclose(denormalise(normalise(images)), images, atol=1e-6)
    assert normalise(torch.tensor([[[[0.485, 0.456, 0.406]]]])).abs().max() < 1e-6


def test_masks_keep_an_exact_count_partition_the_patches_and_are_uniform():
    keep, hidden = draw_mask(torch.arange(4000), 64, 16, stream=5)
    assert keep.shape == (4000, 16)
    assert torch.equal(torch.cat([keep, hidden], 1).sort(1).values, torch.arange(64).expand(4000, 64))
    share = torch.bincount(keep.flatten(), minlength=64).double() / 4000
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    alone, _ = draw_mask(torch.tensor([77]), 64, 16, stream=5)
    assert torch.equal(alone[0], keep[77])
    assert not torch.equal(draw_mask(torch.arange(50), 64, 16, stream=6)[0], keep[:50])


def test_masks_hash_as_the_host_does():
    """torch's int64 arithmetic on the device and numpy's uint64 on the host are the same function."""
    ids, stream = np.arange(100), sampling.mask_key("holed", 3, 7)
    with np.errstate(over="ignore"):
        rows = sampling.mix(np.uint64(stream) + ids.astype(np.uint64) * np.uint64(sampling.GOLDEN))
        words = sampling.mix(rows[:, None] + np.arange(1, 17, dtype=np.uint64) * np.uint64(sampling.GOLDEN))
    order = np.argsort(words.astype(np.int64), axis=1, kind="stable")
    assert np.array_equal(draw_mask(torch.from_numpy(ids), 16, 4, stream)[0].numpy(), order[:, :4])


def test_noise_is_standard_normal_and_each_samples_own():
    noise = draw_noise(torch.arange(500), 4001, stream=5).double()
    assert noise.mean().item() == pytest.approx(0, abs=5 / noise.numel() ** 0.5)
    assert noise.square().mean().item() == pytest.approx(1, abs=5 * (2 / noise.numel()) ** 0.5)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=5 * (96 / noise.numel()) ** 0.5)
    share = torch.special.ndtr(noise).mul(20).long().flatten().bincount(minlength=20).double() / noise.numel()
    assert (share - 0.05).abs().max() < 5 * (0.05 * 0.95 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise)  # of samples, of neighbours, and of the two numbers that one word makes
    assert correlation.fill_diagonal_(0).abs().max() < 6 / 4001**0.5
    for lag in (1, 2001):
        assert (noise[:, lag:] * noise[:, :-lag]).mean().abs() < 5 / (500 * (4001 - lag)) ** 0.5
    assert torch.equal(draw_noise(torch.tensor([77]), 4001, 5)[0].double(), noise[77])
    assert (draw_noise(torch.arange(500), 4001, 6) != noise).float().mean() > 0.99


def test_noise_hashes_as_the_host_does():
    ids, stream = np.arange(50), sampling.noise_key("one", 3, 7)
    with np.errstate(over="ignore"):
        rows = sampling.mix(np.uint64(stream) + ids.astype(np.uint64) * np.uint64(sampling.GOLDEN))
        words = sampling.mix(rows[:, None] + np.arange(1, 9, dtype=np.uint64) * np.uint64(sampling.GOLDEN))
    one, other = (((words >> np.uint64(shift)) & np.uint64(0xFFFFFF)).astype(float) / 2**24 for shift in (40, 16))
    radius, angle = np.sqrt(-2 * np.log(1 - one)), 2 * np.pi * other
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    assert np.abs(draw_noise(torch.from_numpy(ids), 16, stream).numpy() - expected).max() < 1e-5


def test_noise_lies_on_what_is_seen_and_not_in_the_pixels():
    ids = torch.arange(6)
    images = {"one": (midtones(6, 32) * 255).to(torch.uint8), "other": (midtones(6, 32) * 255).to(torch.uint8)}
    before = {name: each.clone() for name, each in images.items()}
    view = View(side=32, noise=0.1)
    views = {"one": view, "other": replace(view, mask_ratio=0.5)}
    batch = Batch(images, ids, ids, epoch=2)
    made = make_views(batch, views, patch=8, seed=1)
    assert all(torch.equal(images[name], before[name]) for name in images)
    plain = make_views(batch, {"other": replace(views["other"], noise=None)}, patch=8, seed=1)["other"]
    whole, half = made["one"], made["other"]
    assert plain.noise is None
    assert plain.sigma is None
    assert torch.equal(half.pixels, plain.pixels)
    assert half.keep is not None
    assert torch.equal(half.visible(), take(half.pixels + half.noise, half.keep))
    assert torch.equal(whole.visible(), whole.pixels + whole.noise)
    assert torch.equal(half.kept(half.noise), take(half.noise, half.keep))
    # A deviation of its own for each image of each view, below the largest.
    for each in made.values():
        assert torch.allclose(each.noise.flatten(1).std(dim=1), each.sigma, rtol=0.1)
        assert 0 <= each.sigma.min() < each.sigma.max() < 0.1
    assert not torch.equal(whole.sigma, half.sigma)
    assert not torch.equal(whole.noise / whole.sigma[:, None, None], half.noise / half.sigma[:, None, None])
    alone = make_views(
        Batch({name: each[4:5] for name, each in images.items()}, ids[4:5], ids[4:5], 2), views, patch=8, seed=1
    )
    assert torch.equal(alone["one"].noise[0], whole.noise[4])
    other = make_views(Batch(images, ids, ids, epoch=3), views, patch=8, seed=1)
    assert not torch.equal(other["one"].noise, whole.noise)


def test_make_views_masks_one_view_and_colours_the_other():
    ids = torch.arange(3)
    images = {name: (midtones(3, side) * 255).to(torch.uint8) for name, side in (("holed", 32), ("small", 16))}
    views = {"holed": View(side=32, mask_ratio=0.75), "small": View(side=16, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0)}
    made = make_views(Batch(images, ids, ids, epoch=2), views, patch=8, seed=1)
    plain = patchify(normalise(images["holed"].float() / 255), 8)
    assert torch.allclose(made["holed"].pixels, plain, atol=1e-6)
    assert made["holed"].tokens == made["small"].tokens == 4
    keep = made["holed"].keep
    assert keep is not None
    assert torch.equal(made["holed"].visible(), take(plain, keep))
    small = patchify(normalise(images["small"].float() / 255), 8)
    assert (made["small"].pixels - small).abs().amax(dim=(1, 2)).min() > 0.05
    again = make_views(Batch(images, ids, ids, epoch=2), views, patch=8, seed=1)
    assert torch.equal(again["small"].pixels, made["small"].pixels)
    other = make_views(Batch(images, ids, ids, epoch=3), views, patch=8, seed=1)
    assert not torch.equal(other["small"].pixels, made["small"].pixels)


def test_make_views_blurs_and_solarises_the_share_that_a_view_asks_for():
    ids = torch.arange(40)
    images = {"v": (midtones(40, 112) * 255).to(torch.uint8)}
    plain, found = View(side=112, jitter=(0.4, 0.4, 0.4, 0.1)), []
    for view in (plain, replace(plain, blur=0.3), replace(plain, solarise=0.3), replace(plain, blur=1.0, solarise=1.0)):
        found.append(make_views(Batch(images, ids, ids, epoch=0), {"v": view}, patch=16, seed=0)["v"].pixels)
    shares = [(made != found[0]).any(dim=(1, 2)).float().mean().item() for made in found]
    assert shares == pytest.approx([0, 0.3, 0.3, 1], abs=0.15)


@pytest.mark.parametrize(
    ("view", "words"),
    [(View(side=30), "not a multiple"), (View(side=16, mask_ratio=0.99), "mask ratio"),
     (View(side=16, same_crop_as="none"), "no view none")],
)  # fmt: skip
def test_views_that_no_grid_fits_are_refused(view, words):
    with pytest.raises(UsageError, match=words):
        check_views({"holed": view}, 8)


def test_more_views_than_are_cut_from_a_picture_are_refused():
    views = {f"local{number}": View(side=16) for number in range(17)}
    with pytest.raises(UsageError, match=r"17 views are too many: at most 16 are cut from one picture\."):
        check_views(views, 8)
    views.pop("local0")
    check_views(views, 8)


TRITON = """
import sys, numpy as np, torch
from pipeline import kernels
from pipeline.colour import colour_maps, mean_colour, recolour
from pipeline.geometry import _batched
from pipeline.sampling import Geometry, View, colours
from pipeline.views import MEAN, STD, normalise, patchify
draw = np.random.default_rng(0)
canvas = torch.from_numpy(draw.integers(0, 256, (5, 60, 90, 3), dtype=np.uint8))
boxes = np.array([[0, 0, 60, 90], [3, 7, 21, 64], [10, 20, 12, 9], [59, 89, 1, 1], [5, 5, 48, 16]], np.int32)
flip = np.array([0, 1, 0, 1, 1], np.int32)
worst = 0
for side in (16, 48):
    mine = kernels.crop_resize(canvas, torch.from_numpy(boxes), torch.from_numpy(flip), side)
    theirs = _batched(canvas, boxes.astype(np.int64), side)
    theirs = torch.where(torch.from_numpy(flip)[:, None, None, None] > 0, theirs.flip(2), theirs)
    worst = max(worst, (mine.int() - theirs.int()).abs().max().item())
assert worst <= 1, worst
images = torch.from_numpy(draw.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8))
drawn = colours(View(side=28, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.5, jitter_p=1.0), "v", 0, 0, np.arange(3))
floats = images.float() / 255
assert torch.allclose(mean_colour(images), floats.mean(dim=(1, 2)), atol=1e-6)
for patch in (14, 4):
    plain = kernels.to_patches(images, patch, None, MEAN, STD, torch.float32)
    assert torch.allclose(plain, patchify(normalise(floats), patch), atol=1e-5)
    maps = colour_maps(mean_colour(images), drawn)
    coloured = kernels.to_patches(images, patch, maps, MEAN, STD, torch.float32)
    reference = patchify(normalise(recolour(floats, drawn)), patch)
    assert torch.allclose(coloured, reference, atol=1e-4), (coloured - reference).abs().max()
    half = kernels.to_patches(images, patch, maps, MEAN, STD, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # A grey level: the interpreter cuts bits off where a GPU rounds, to half of one.
    assert (half.float() - reference).abs().max() < 1 / 255 / min(STD) + 1e-4
print("equal")
"""


@pytest.mark.slow
def test_the_gpus_kernels_equal_plain_torch():
    """Run by Triton's interpreter, which needs no GPU. On a GPU tests/test_cuda.py runs them compiled."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.5.0":
        pytest.skip("this Triton's interpreter turns arrays into loop bounds, which NumPy 2.5 refuses")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([PYTHON, "-c", TRITON], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "equal\n", done.stderr
