"""RandAugment and random erasing for fine-tuning: timm's rules, a whole batch at once, on the device.

What becomes of an image depends on (seed, epoch, sample id) alone. Values are Pillow's to a grey level; turned,
sheared and shifted pictures are interpolated by torch's cubic (a = -0.75), which is smoother than Pillow's (a = -1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.sampling import View, geometry, uniform
from pipeline.views import MEAN

FILL = tuple(float(round(255 * value)) for value in MEAN)  # where a picture was moved away from
LEVELS = 10.0  # the strongest change
APPLIED = 0.5  # probability of a change that was drawn
ERASED = View(side=0, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3))  # share and shape of an erased rectangle


def rand_augment(
    images: Tensor, seed: int, epoch: int, ids: np.ndarray, *, magnitude: float = 9.0, deviation: float = 0.5
) -> Tensor:
    """(B, S, S, 3) uint8 -> the same shape: two changes of fifteen to each image, each made with probability 1/2.

    Their level is normal about `magnitude`, cut to [0, 10]; which way a picture is turned or its contrast changed is
    even. Source: Cubuk et al. 2019, arXiv 1909.13719, as timm's rand-m9-mstd0.5-inc1, which MAE fine-tunes with.
    """
    images = images.clone()
    for draw in np.split(uniform(seed, epoch, "augment", ids, 10), 2, axis=1):
        which = np.where(draw[:, 1] < APPLIED, np.floor(draw[:, 0] * len(CHANGES)), -1)
        normal = np.sqrt(-2 * np.log1p(-draw[:, 2])) * np.cos(2 * math.pi * draw[:, 3])
        level = np.clip(magnitude + deviation * normal, 0, LEVELS)
        sign = np.where(draw[:, 4] < 0.5, 1.0, -1.0)
        for number, change in enumerate(CHANGES):
            rows = np.flatnonzero(which == number)
            if len(rows):
                place = torch.from_numpy(rows).to(images.device, non_blocking=True)
                strength = torch.from_numpy(np.stack([level[rows], sign[rows]]).astype(np.float32))
                levels, signs = strength.to(images.device, non_blocking=True)[:, :, None, None, None]
                images[place] = change(images[place].float(), levels, signs).clamp_(0, 255).to(torch.uint8)
    return images


# Each takes (n, S, S, 3) whole numbers in [0, 255] as float32 and (n, 1, 1, 1) levels and signs; what it returns is
# clamped and cut to whole numbers, as Pillow does.
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


def auto_contrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp(min=1), x)


def equalise(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Each channel's grey levels spread so that each is as frequent, by Pillow's integer rule."""
    count, side = x.shape[:2]
    bins = x.long().permute(0, 3, 1, 2).reshape(count * 3, side * side)
    first = 256 * torch.arange(count * 3, device=x.device)[:, None]
    histogram = torch.bincount((bins + first).flatten(), minlength=count * 3 * 256).view(count * 3, 256)
    last = histogram.gather(1, bins.amax(dim=1, keepdim=True))  # how often the brightest level is there
    step = (side * side - last) // 255
    table = (step // 2 + histogram.cumsum(dim=1) - histogram) // step.clamp(min=1)
    made = torch.where(step > 0, table.gather(1, bins), bins)
    return made.view(count, 3, side, side).permute(0, 2, 3, 1).float()


def invert(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return 255 - x


def posterise(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Keep the upper 4 bits, down to none."""
    grain = 2 ** (4 + (0.4 * level).floor())
    return (x / grain).floor() * grain


def solarise(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return torch.where(x < 256 - (25.6 * level).floor(), x, 255 - x)


def solarise_add(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return torch.where(x < 128, x + (11 * level).floor(), x)


def colour(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _away_from(_gray(x), x, level, sign)


def contrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _away_from((_gray(x).mean(dim=(1, 2), keepdim=True) + 0.5).floor(), x, level, sign)


def brightness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _away_from(torch.zeros_like(x[:1]), x, level, sign)


def sharpness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Away from the picture under Pillow's SMOOTH filter, which leaves the border as it is."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device).expand(3, 1, 3, 3)
    smooth = x.clone()
    inner = F.conv2d(x.permute(0, 3, 1, 2), kernel, groups=3) / 13
    smooth[:, 1:-1, 1:-1] = (inner + 0.5).floor().permute(0, 2, 3, 1)
    return _away_from(smooth, x, level, sign)


def rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """By up to 30 degrees about the centre."""
    angle = (math.radians(3) * sign * level)[..., 0]
    right, down = (place - x.shape[1] / 2 for place in _places(x))
    across, along = angle.cos() * right - angle.sin() * down, angle.sin() * right + angle.cos() * down
    return _read(x, across + x.shape[1] / 2, along + x.shape[1] / 2)


def shear_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    right, down = _places(x)
    return _read(x, right + (0.03 * sign * level)[..., 0] * down, down)


def shear_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    right, down = _places(x)
    return _read(x, right, down + (0.03 * sign * level)[..., 0] * right)


def translate_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """By up to 45 % of the side."""
    right, down = _places(x)
    return _read(x, right + (0.045 * x.shape[1] * sign * level)[..., 0], down)


def translate_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    right, down = _places(x)
    return _read(x, right, down + (0.045 * x.shape[1] * sign * level)[..., 0])


CHANGES: tuple[Change, ...] = (
    auto_contrast, equalise, invert, rotate, posterise, solarise, solarise_add, colour, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip


def _gray(x: Tensor) -> Tensor:
    """(n, S, S, 1): Pillow's luma, a whole number. Below 2^24 float32 holds its integers exactly."""
    weights = torch.tensor([19595.0, 38470.0, 7471.0], device=x.device)
    return (((x * weights).sum(dim=-1, keepdim=True) + 32768) / 65536).floor()


def _away_from(dull: Tensor, x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Pillow's ImageEnhance: factor 0 is the dull picture, 1 the picture, 2 as far on the other side."""
    factor = (1 + 0.09 * sign * level).clamp(min=0.1)
    return dull + factor * (x - dull)


def _places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the centres of the pixels lie, right (1, 1, S) and down (1, S, 1), in pixels from the top left corner."""
    place = torch.arange(x.shape[1], device=x.device) + 0.5
    return place[None, None, :], place[None, :, None]


def _read(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """x at the given places, broadcast to (n, S, S); FILL where that is outside of the picture."""
    side = x.shape[1]
    across, down = torch.broadcast_tensors(across, down)
    grid = torch.stack([across, down], dim=-1).expand(len(x), -1, -1, -1)
    made = F.grid_sample(
        x.permute(0, 3, 1, 2), 2 * grid / side - 1, mode="bicubic", padding_mode="border", align_corners=False
    )
    inside = ((grid >= 0) & (grid < side)).all(dim=-1, keepdim=True)
    return torch.where(inside, (made.permute(0, 2, 3, 1) + 0.5).floor(), torch.tensor(FILL, device=x.device))


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
    top, left, high, wide = torch.from_numpy(boxes).to(pixels.device, non_blocking=True)[:, :, None, None].unbind(1)
    place = torch.arange(side, device=pixels.device)
    down, right = place[:, None], place[None, :]
    inside = (down >= top) & (down < top + high) & (right >= left) & (right < left + wide)  # (n, S, S)
    at = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
    fill = torch.randn(len(rows), side, side, 3, generator=noise, device=pixels.device, dtype=pixels.dtype)
    pixels[at] = torch.where(inside[..., None], fill, pixels[at])
    return pixels
