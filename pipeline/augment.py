"""Random changes of pictures, a whole batch at once, on the device: RandAugment and random erasing for fine-tuning, and
CLSA's strong augmentation.

A change is written once, with Pillow's arithmetic; a pool is a table of changes and of how much of each a level is.
What becomes of an image depends on (seed, epoch, sample id) alone. Values are Pillow's to a grey level, but where a
picture is moved by torch's cubic filter (a = -0.75), which is smoother than Pillow's (a = -1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.sampling import View, geometry, uniform
from pipeline.transfer import constant, to_device

LEVELS = 10  # the strongest change
APPLIED = 0.5  # probability of a change that was drawn
MEAN_COLOUR = (124.0, 116.0, 104.0)  # ImageNet's
ERASED = View(side=0, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3))  # share and shape of an erased rectangle

# (n, S, S, 3) whole numbers in [0, 255] as float32 and (n, A, 1, 1) how much, A = 6 for a move and 1 for the others;
# what it returns is clamped and cut to whole numbers, as Pillow does.
Change = Callable[[Tensor, Tensor], Tensor]
# (n,) levels in [0, LEVELS], (n,) signs and the side -> (n,) or (n, 6): how much.
Rule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
Pool = dict[str, tuple[Change, Rule] | None]  # None: nothing happens


def rand_augment(
    images: Tensor, seed: int, epoch: int, ids: np.ndarray, *, magnitude: float = 9.0, deviation: float = 0.5
) -> Tensor:
    """(B, S, S, 3) uint8 -> the same shape: two changes of fifteen to each image, each made with probability 1/2.

    Their level is normal about `magnitude`, cut to [0, 10]; which way a picture is turned or its contrast changed is
    even. Source: Cubuk et al. 2019, arXiv 1909.13719, as timm's rand-m9-mstd0.5-inc1, which MAE fine-tunes with.
    """
    images = images.clone()
    for draw in np.split(uniform(seed, epoch, "augment", ids, 10), 2, axis=1):
        normal = np.sqrt(-2 * np.log1p(-draw[:, 2])) * np.cos(2 * math.pi * draw[:, 3])
        level = np.clip(magnitude + deviation * normal, 0, LEVELS)
        _change(images, RAND_AUGMENT, draw[:, [0, 1, 4]], level)
    return images


def strengthen(images: Tensor, view: View, name: str, seed: int, epoch: int, ids: np.ndarray) -> Tensor:
    """(B, S, S, 3) uint8 -> the same shape: `view.strong` changes of CLSA's fourteen to each image, drawn with
    replacement, each made with probability 1/2 at a whole level from 1 to 9.

    Source: Wang & Qi 2021 (CLSA, arXiv 2104.07713), with the pool of its code, which is FixMatch's.
    """
    images = images.clone()
    for draw in np.split(uniform(seed, epoch, f"strong {name}", ids, 4 * view.strong), view.strong, axis=1):
        _change(images, STRONG, draw[:, [0, 1, 3]], 1 + np.floor((LEVELS - 1) * draw[:, 2]))
    return images


def _change(images: Tensor, pool: Pool, draw: np.ndarray, level: np.ndarray) -> None:
    """One change of the pool to each image, in place, with probability 1/2.

    draw: (B, 3) in [0, 1): which, whether at all, which way. level: (B,).
    """
    which = np.where(draw[:, 1] < APPLIED, np.floor(draw[:, 0] * len(pool)), -1)
    sign = np.where(draw[:, 2] < 0.5, 1.0, -1.0)
    wanted: dict[Change, list[tuple[np.ndarray, np.ndarray]]] = {}  # all that is moved, whichever way, is moved at once
    for number, entry in enumerate(pool.values()):
        rows = np.flatnonzero(which == number)
        if entry is not None and len(rows):
            change, rule = entry
            wanted.setdefault(change, []).append((rows, rule(level[rows], sign[rows], images.shape[1])))
    for change, parts in wanted.items():
        rows, amounts = (np.concatenate(each) for each in zip(*parts, strict=True))
        place, amount = to_device(rows, images.device), to_device(amounts.astype(np.float32), images.device)
        changed = change(images[place].float(), amount.view(len(rows), -1, 1, 1))
        images[place] = changed.clamp_(0, 255).to(torch.uint8)


# --- Grey levels -----------------------------------------------------------------------------------------------------


def auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp(min=1), x)


def equalise(x: Tensor, _: Tensor) -> Tensor:
    """Each channel's grey levels spread so that each is as frequent, by Pillow's integer rule."""
    count, side = x.shape[:2]
    bins = x.long().permute(0, 3, 1, 2).reshape(count * 3, side * side)
    # Not torch.bincount, which would ask a GPU for the largest level.
    histogram = bins.new_zeros(count * 3, 256).scatter_add_(1, bins, torch.ones_like(bins))
    last = histogram.gather(1, bins.amax(dim=1, keepdim=True))  # how often the brightest level is there
    step = (side * side - last) // 255
    table = (step // 2 + histogram.cumsum(dim=1) - histogram) // step.clamp(min=1)
    made = torch.where(step > 0, table.gather(1, bins), bins)
    return made.view(count, 3, side, side).permute(0, 2, 3, 1).float()


def invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def posterise(x: Tensor, grain: Tensor) -> Tensor:
    """Down to a multiple of a power of two."""
    return (x / grain).floor() * grain


def solarise(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x < threshold, x, 255 - x)


def brighten_dark(x: Tensor, added: Tensor) -> Tensor:
    return torch.where(x < 128, x + added, x)


# --- Pillow's ImageEnhance: factor 0 is a dull picture, 1 the picture, 2 as far on the other side --------------------


def colour(x: Tensor, factor: Tensor) -> Tensor:
    return _away_from(_gray(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _away_from((_gray(x).mean(dim=(1, 2), keepdim=True) + 0.5).floor(), x, factor)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return factor * x


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the picture under Pillow's SMOOTH filter, which leaves the border as it is."""
    kernel = constant(((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 1.0)), x.device).expand(3, 1, 3, 3)
    smooth = x.clone()
    inner = F.conv2d(x.permute(0, 3, 1, 2), kernel, groups=3) / 13
    smooth[:, 1:-1, 1:-1] = (inner + 0.5).floor().permute(0, 2, 3, 1)
    return _away_from(smooth, x, factor)


def _away_from(dull: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return dull + factor * (x - dull)


def _gray(x: Tensor) -> Tensor:
    """(n, S, S, 1): Pillow's luma, a whole number. Below 2^24 float32 holds its integers exactly."""
    weights = constant((19595.0, 38470.0, 7471.0), x.device)
    return (((x * weights).sum(dim=-1, keepdim=True) + 32768) / 65536).floor()


# --- Moves -----------------------------------------------------------------------------------------------------------


Each = float | np.ndarray  # (n,), or one for all


def _move(a: Each = 1.0, b: Each = 0.0, c: Each = 0.0, d: Each = 0.0, e: Each = 1.0, f: Each = 0.0) -> np.ndarray:
    """(n, 6): what is seen at (right, down) was at (a right + b down + c, d right + e down + f), in pixels from the top
    left corner."""
    return np.stack(np.broadcast_arrays(a, b, c, d, e, f), axis=-1)


def _turn(degrees: np.ndarray, side: int) -> np.ndarray:
    """About the centre."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return _move(cos, -sin, side / 2 * (1 - cos + sin), sin, cos, side / 2 * (1 - sin - cos))


def move_cubic(x: Tensor, move: Tensor) -> Tensor:
    """Interpolated; ImageNet's mean colour where the picture has ended."""
    side = x.shape[1]
    place = torch.arange(side, device=x.device) + 0.5
    grid = torch.stack(_moved(move, place[None, None, :], place[None, :, None]), dim=-1)
    made = F.grid_sample(
        x.permute(0, 3, 1, 2), 2 * grid / side - 1, mode="bicubic", padding_mode="border", align_corners=False
    )
    inside = ((grid >= 0) & (grid < side)).all(dim=-1, keepdim=True)
    return torch.where(inside, (made.permute(0, 2, 3, 1) + 0.5).floor(), constant(MEAN_COLOUR, x.device))


def move_nearest(x: Tensor, move: Tensor) -> Tensor:
    """The nearest pixel; black where the picture has ended. In Pillow's whole numbers of 1/65536, hence the same pixel
    on every device."""
    side = x.shape[1]
    a, b, c, d, e, f = move.unbind(1)
    from_centre = torch.stack([a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2], dim=1)
    place = torch.arange(side, device=x.device)
    fixed = (from_centre * 65536 + 0.5).floor().long()
    across, down = (each >> 16 for each in _moved(fixed, place[None, None, :], place[None, :, None]))
    inside = (across >= 0) & (across < side) & (down >= 0) & (down < side)
    row = torch.arange(len(x), device=x.device)[:, None, None]
    made = x[row, down.clamp(0, side - 1), across.clamp(0, side - 1)]
    return torch.where(inside[..., None], made, 0.0)


def _moved(move: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(n, S, S) each: where what is seen at these places was."""
    a, b, c, d, e, f = move.unbind(1)
    return a * right + b * down + c, d * right + e * down + f


# --- Pools -----------------------------------------------------------------------------------------------------------


def _any(level: np.ndarray, sign: np.ndarray, side: int) -> np.ndarray:
    """For a change that has no strength."""
    return level


def _either_way(level: np.ndarray, sign: np.ndarray, side: int) -> np.ndarray:
    return np.maximum(0.1, 1 + 0.09 * sign * level)


def _duller(level: np.ndarray, sign: np.ndarray, side: int) -> np.ndarray:
    return 0.9 * level / LEVELS + 0.05


# timm's, under timm's names: the higher the level, the further from the picture.
RAND_AUGMENT: Pool = {
    "AutoContrast": (auto_contrast, _any),
    "Equalize": (equalise, _any),
    "Invert": (invert, _any),
    "Rotate": (move_cubic, lambda level, sign, side: _turn(3 * sign * level, side)),
    "PosterizeIncreasing": (posterise, lambda level, sign, side: 2 ** (4 + np.floor(level / LEVELS * 4))),
    "SolarizeIncreasing": (solarise, lambda level, sign, side: 256 - np.floor(level / LEVELS * 256)),
    "SolarizeAdd": (brighten_dark, lambda level, sign, side: np.floor(level / LEVELS * 110)),
    "ColorIncreasing": (colour, _either_way),
    "ContrastIncreasing": (contrast, _either_way),
    "BrightnessIncreasing": (brightness, _either_way),
    "SharpnessIncreasing": (sharpness, _either_way),
    "ShearX": (move_cubic, lambda level, sign, side: _move(b=0.03 * sign * level)),
    "ShearY": (move_cubic, lambda level, sign, side: _move(d=0.03 * sign * level)),
    "TranslateXRel": (move_cubic, lambda level, sign, side: _move(c=0.045 * side * sign * level)),
    "TranslateYRel": (move_cubic, lambda level, sign, side: _move(f=0.045 * side * sign * level)),
}
# CLSA's: colours become duller only, and less so at a higher level; shifts are by whole pixels.
STRONG: Pool = {
    "AutoContrast": (auto_contrast, _any),
    "Brightness": (brightness, _duller),
    "Color": (colour, _duller),
    "Contrast": (contrast, _duller),
    "Equalize": (equalise, _any),
    "Identity": None,
    "Posterize": (posterise, lambda level, sign, side: 2 ** (4 - np.floor(4 * level / LEVELS))),
    "Rotate": (move_nearest, lambda level, sign, side: _turn(3 * sign * level, side)),
    "Sharpness": (sharpness, _duller),
    "ShearX": (move_nearest, lambda level, sign, side: _move(b=0.03 * sign * level)),
    "ShearY": (move_nearest, lambda level, sign, side: _move(d=0.03 * sign * level)),
    "Solarize": (solarise, lambda level, sign, side: 256 - np.floor(256 * level / LEVELS)),
    "TranslateX": (move_nearest, lambda level, sign, side: _move(c=np.trunc(0.3 * level / LEVELS * sign * side))),
    "TranslateY": (move_nearest, lambda level, sign, side: _move(f=np.trunc(0.3 * level / LEVELS * sign * side))),
}


# --- Random erasing --------------------------------------------------------------------------------------------------


def erase(pixels: Tensor, share: float, seed: int, epoch: int, ids: np.ndarray, noise: torch.Generator) -> Tensor:
    """(B, S, S, 3) normalised pixels, changed in place: with probability `share` a rectangle becomes N(0, 1) noise.

    Which and where depends on (seed, epoch, id); its noise is drawn from `noise`, of the pixels' device.
    Source: Zhong et al. 2017, arXiv 1708.04896, as timm's mode "pixel".
    """
    rows = np.flatnonzero(uniform(seed, epoch, "erase", ids, 1)[:, 0] < share)
    if not len(rows):
        return pixels
    side = pixels.shape[1]
    # The rule is that of a random crop: an area, an aspect, a place, again if it does not fit.
    boxes = geometry(ERASED, "erase", seed, epoch, ids[rows], np.full((len(rows), 2), side)).boxes
    top, left, high, wide = to_device(boxes, pixels.device)[:, :, None, None].unbind(1)
    place = torch.arange(side, device=pixels.device)
    down, right = place[:, None], place[None, :]
    inside = (down >= top) & (down < top + high) & (right >= left) & (right < left + wide)  # (n, S, S)
    at = to_device(rows, pixels.device)
    fill = torch.randn(len(rows), side, side, 3, generator=noise, device=pixels.device, dtype=pixels.dtype)
    pixels[at] = torch.where(inside[..., None], fill, pixels[at])
    return pixels
