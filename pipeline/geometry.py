"""Crop, antialiased resize and flip of a whole batch, from a canvas of decoded pictures.

A canvas is (B, H, W, 3) uint8: picture i fills its top left corner, whatever lies beside it is never read. The filter
is Pillow's antialiased bilinear: a triangle as wide as the reduction, cut off at the edges of the crop.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import kernels
from pipeline.sampling import Geometry
from pipeline.transfer import to_device

CHUNK = 256  # pictures whose float32 copies lie in memory at once


def crop_resize(canvas: Tensor, where: Geometry, side: int) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, side, side, 3) uint8 on the same device: each row its own box, resized, flipped."""
    if kernels.usable(canvas.device):
        boxes, flip = (to_device(each.astype(np.int32), canvas.device) for each in (where.boxes, where.flip))
        return kernels.crop_resize(canvas, boxes, flip, side)
    resize = _one_by_one if canvas.device.type == "cpu" else _batched
    cropped = resize(canvas, where.boxes, side)
    if not where.flip.any():
        return cropped
    flip = to_device(where.flip, canvas.device)
    return torch.where(flip[:, None, None, None], cropped.flip(2), cropped)


def _one_by_one(canvas: Tensor, boxes: np.ndarray, side: int) -> Tensor:
    """On a CPU torch's own uint8 kernel is Pillow's arithmetic in SIMD, one crop at a time.

    Dense weights (below) cost 3 to 10 times as much there: 93 to 386 ms against 32 to 39 for 256 crops from 64 px.
    """
    out = torch.empty(len(canvas), 3, side, side, dtype=torch.uint8).to(memory_format=torch.channels_last)
    for row, (top, left, high, wide) in enumerate(boxes.tolist()):
        crop = canvas[row : row + 1, top : top + high, left : left + wide].permute(0, 3, 1, 2)
        if high == side and wide == side:
            out[row] = crop[0]
        else:
            out[row] = F.interpolate(crop, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    return out.permute(0, 2, 3, 1)


def _batched(canvas: Tensor, boxes: np.ndarray, side: int) -> Tensor:
    """On a GPU without Triton: two batched matrix products with each row's filter written out as a dense matrix.

    Some pictures at a time: a batch of 4,096 at once would want 21 GB.
    """
    if len(canvas) > CHUNK:
        starts = range(0, len(canvas), CHUNK)
        return torch.cat([_batched(canvas[at : at + CHUNK], boxes[at : at + CHUNK], side) for at in starts])
    rows, columns = canvas.shape[1:3]
    place = to_device(boxes.astype(np.float32), canvas.device)
    down = _filter(place[:, 0], place[:, 2], rows, side)  # (B, side, H)
    across = _filter(place[:, 1], place[:, 3], columns, side)  # (B, side, W)
    batch = len(canvas)
    high = torch.bmm(down, canvas.float().view(batch, rows, columns * 3)).view(batch, side, columns, 3)
    both = torch.bmm(across, high.transpose(1, 2).reshape(batch, columns, side * 3)).view(batch, side, side, 3)
    return both.transpose(1, 2).round_().clamp_(0, 255).to(torch.uint8).contiguous()


def _filter(start: Tensor, length: Tensor, pixels: int, side: int) -> Tensor:
    """(B, side, pixels) float32: the triangle filter for crops [start, start + length) of a line of pixels."""
    scale = (length / side)[:, None, None]
    centre = start[:, None, None] + (torch.arange(side, device=start.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(pixels, device=start.device)[None, None, :]
    weight = (1 - ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(dim=-1, keepdim=True)
