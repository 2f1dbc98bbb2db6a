"""Colour changes of a batch as one affine map per image.

Brightness, contrast and saturation as torchvision defines them are affine in the pixel, and so is a hue turn in YIQ;
drawn in any order they compose to one 3 x 3 matrix and one offset. The whole jitter of an image, grayscale included,
therefore costs one pass over its pixels whatever is drawn. Two differences from torchvision follow: values are clamped
once at the end instead of after each change, and hue turns in YIQ at constant luma instead of in HSV.

Blur and solarisation are no such maps. They come after, and cost the images that are drawn for them alone.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from pipeline.sampling import Colours
from pipeline.transfer import constant, to_device

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision weigh red, green and blue
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the four changes as Colours.order numbers them
# The chroma axes of YIQ (FCC NTSC), rows I and Q; luma is the first row. And the way back, inverted in float64.
_TO_YIQ = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_FROM_YIQ = tuple(map(tuple, torch.linalg.inv(torch.tensor(_TO_YIQ, dtype=torch.float64)).tolist()))


def colour_maps(mean: Tensor, drawn: Colours) -> tuple[Tensor, Tensor]:
    """The map of each image: (B, 3, 3) matrix and (B, 3) offset, for pixels in [0, 1].

    mean: (B, 3), the mean colour of each image, which contrast pivots on.
    """
    device, rows = mean.device, torch.arange(len(mean), device=mean.device)
    factors, order = to_device(drawn.factors.astype(np.float32), device), to_device(drawn.order, device)
    luma = constant(LUMA, device)
    eye = torch.eye(3, device=device).expand(len(mean), 3, 3)
    to_gray = luma.expand(3, 3)  # each row: the luma weights
    brightness, contrast, saturation = (factors[:, i, None, None] for i in range(3))
    changes = torch.stack(
        [brightness * eye, contrast * eye, saturation * eye + (1 - saturation) * to_gray, _hue_turn(drawn, device)],
        dim=1,
    )  # (B, 4, 3, 3)
    matrix, offset = eye, torch.zeros_like(mean)
    for place in range(4):
        which = order[:, place]
        change = changes[rows, which]
        # Contrast moves every pixel towards the luma of the mean picture as it is by now.
        now = (matrix @ mean[:, :, None])[:, :, 0] + offset
        pivot = torch.where(which == CONTRAST, (1 - factors[:, CONTRAST]) * (now @ luma), 0.0)
        matrix, offset = change @ matrix, (change @ offset[:, :, None])[:, :, 0] + pivot[:, None]
    gray = to_device(drawn.gray, device)[:, None]
    matrix = torch.where(gray[:, :, None], to_gray @ matrix, matrix)
    offset = torch.where(gray, (offset @ luma)[:, None], offset)
    return matrix, offset


def mean_colour(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3) float32 in [0, 1]. Torch sums bytes by way of a float32 copy of them."""
    batch, high, wide, _ = images.shape
    return images.view(batch, high * wide, 3).sum(dim=1, dtype=torch.float32) / (255 * high * wide)


def _hue_turn(drawn: Colours, device: torch.device) -> Tensor:
    """(B, 3, 3): turn the chroma plane by `hue` of a full circle, luma untouched."""
    angle = to_device(drawn.hue.astype(np.float32), device) * (2 * math.pi)
    turn = torch.zeros(len(angle), 3, 3, device=device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = angle.sin(), -angle.sin()  # red towards yellow, as torchvision turns
    return constant(_FROM_YIQ, device) @ turn @ constant(_TO_YIQ, device)


def recolour(pixels: Tensor, drawn: Colours) -> Tensor:
    """(B, S, S, 3) float in [0, 1] -> the same shape, recoloured and clamped to [0, 1], blurred and solarised."""
    batch, high, wide, _ = pixels.shape
    flat = pixels.view(batch, high * wide, 3)
    matrix, offset = colour_maps(flat.mean(dim=1), drawn)
    made = torch.baddbmm(offset[:, None, :], flat, matrix.transpose(1, 2)).clamp_(0, 1).view_as(pixels)
    if drawn.blur is not None and len(rows := np.flatnonzero(drawn.blur)):
        at = to_device(rows, made.device)
        made[at] = blur(made[at], drawn.blur[rows])
    if drawn.solarise is not None and len(rows := np.flatnonzero(drawn.solarise)):
        at = to_device(rows, made.device)
        made[at] = solarise(made[at])
    return made


def blur(pixels: Tensor, sigma: np.ndarray) -> Tensor:
    """(B, S, S, 3), each image under a Gaussian of its own sigma in pixels. (B,) sigma, above 0.

    The kernel reaches a twentieth of the side to either side, as SimCLR's (Chen et al. 2020, appendix A), and the
    picture goes on mirrored beyond its edge, as in torchvision. A picture is multiplied from either side with the
    S x S matrix of its kernel: more products than a convolution has, and twice as fast.
    """
    count, side = pixels.shape[:2]
    reach = max(1, round(side / 20))
    width = to_device(sigma.astype(np.float32), pixels.device)[:, None]
    places = _reached(side, reach, pixels.device)
    taps = torch.softmax(-((torch.arange(-reach, reach + 1, device=pixels.device) / width) ** 2) / 2, dim=1)
    kernel = (taps @ places.flatten(1)).view(count, side, side)
    for _ in range(2):  # down, then across
        pixels = (kernel @ pixels.reshape(count, side, side * 3)).view(count, side, side, 3).transpose(1, 2)
    return pixels


@functools.cache
def _reached(side: int, reach: int, device: torch.device) -> Tensor:
    """(T, S, S): whether tap t of the kernel at pixel i lies on pixel j, mirrored at the edges."""
    place = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)).abs()
    place = torch.minimum(place, 2 * (side - 1) - place)
    return (place.T[..., None] == torch.arange(side)).float().to(device)


def solarise(pixels: Tensor) -> Tensor:
    """Values of a half and above are inverted, as Pillow's ImageOps.solarize inverts grey levels from 128 on."""
    return torch.where(pixels < 0.5, pixels, 1 - pixels)
