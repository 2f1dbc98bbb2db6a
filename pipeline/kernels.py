"""The two passes over pixels that a GPU takes, each fused into one Triton kernel.

    crop_resize   canvas of decoded pictures -> uint8 crops: box, antialiased bilinear filter, flip, rounding
    to_patches    uint8 crops -> normalised patches: colour map, clamp, normalisation, patch order, cast

geometry.py and views.py hold the same in plain torch: what runs on a CPU, and what these are compared with. No
kernel keeps a float32 image between what it reads and what it writes.
"""

from __future__ import annotations

# Triton's language is Python that pyright cannot read.
# pyright: reportPossiblyUnboundVariable=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
import os
import shutil
import sysconfig
import threading
from pathlib import Path

import torch
from torch import Tensor

from pipeline.limits import out_of_memory

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without
    triton = None

PIXELS = 256  # of an output that one program makes


_tried: dict[torch.device, str | None] = {}  # what why_not() found
_trying = threading.Lock()  # the loader's thread asks too


def usable(device: torch.device) -> bool:
    """Triton is there and compiles for this device: it wants a C compiler, and a GPU that it knows."""
    return why_not(device) is None


def why_not(device: torch.device) -> str | None:
    """Why plain torch does their work on this device, in a few words; None where they do it."""
    if device.type != "cuda":
        return "there is no GPU"
    if triton is None:
        return "Triton is not installed"
    with _trying:
        if device not in _tried:
            try:
                grey = torch.zeros(1, 4, 4, 3, dtype=torch.uint8, device=device)
                to_patches(grey, 4, None, (0.0,) * 3, (1.0,) * 3, torch.float32)
            except Exception as error:  # whatever it is that it lacks, plain torch does the same
                words = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
                if out_of_memory(error):  # which passes: the next batch asks again
                    return words
                _tried[device] = missing_tools() or words
            else:
                _tried[device] = None
        return _tried[device]


def missing_tools() -> str | None:
    """What Triton needs of the system in order to compile, and is not there, in a few words; None: nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # where Triton looks
        return "there is no C compiler (gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's own, where no headers are; Triton goes by the other too
        scheme = "posix_prefix"
    headers = Path(sysconfig.get_paths(scheme)["include"])
    return None if (headers / "Python.h").is_file() else f"there is no Python.h in {headers}"


if triton is not None:
    # The size of the canvas is another for each batch, and must not be a kernel of its own for each.
    @triton.jit(do_not_specialize=["rows", "columns"])
    def _crop_resize(
        canvas, boxes, flips, out, rows, columns, side: tl.constexpr, pixels: tl.constexpr
    ):  # fmt: skip
        """One program: `pixels` output pixels of one picture, every tap of the separable triangle gathered directly."""
        picture = tl.program_id(0).to(tl.int64)
        top = tl.load(boxes + picture * 4)
        left = tl.load(boxes + picture * 4 + 1)
        high = tl.load(boxes + picture * 4 + 2)
        wide = tl.load(boxes + picture * 4 + 3)
        flip = tl.load(flips + picture)
        place = tl.program_id(1) * pixels + tl.arange(0, pixels)
        inside = place < side * side
        row, column = place // side, place % side
        column = tl.where(flip != 0, side - 1 - column, column)
        scale_y, scale_x = high.to(tl.float32) / side, wide.to(tl.float32) / side
        support_y, support_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
        centre_y, centre_x = (row.to(tl.float32) + 0.5) * scale_y, (column.to(tl.float32) + 0.5) * scale_x
        first_y = tl.maximum(centre_y - support_y + 0.5, 0.0).to(tl.int32)
        first_x = tl.maximum(centre_x - support_x + 0.5, 0.0).to(tl.int32)
        reach_y = (support_y + 0.9999).to(tl.int32) * 2 + 1
        reach_x = (support_x + 0.9999).to(tl.int32) * 2 + 1
        red = tl.zeros([pixels], tl.float32)
        green = tl.zeros([pixels], tl.float32)
        blue = tl.zeros([pixels], tl.float32)
        total = tl.zeros([pixels], tl.float32)
        start = canvas + picture * rows * columns * 3
        for down in range(reach_y):
            y = first_y + down
            weight_y = 1.0 - tl.abs(y.to(tl.float32) + 0.5 - centre_y) / support_y
            weight_y = tl.where(y < high, tl.maximum(weight_y, 0.0), 0.0)
            line = start + (top + y).to(tl.int64) * columns * 3
            for across in range(reach_x):
                x = first_x + across
                weight = 1.0 - tl.abs(x.to(tl.float32) + 0.5 - centre_x) / support_x
                weight = tl.where(x < wide, tl.maximum(weight, 0.0), 0.0) * weight_y
                wanted = inside & (weight > 0)
                pixel = line + (left + x) * 3
                red += weight * tl.load(pixel, mask=wanted, other=0).to(tl.float32)
                green += weight * tl.load(pixel + 1, mask=wanted, other=0).to(tl.float32)
                blue += weight * tl.load(pixel + 2, mask=wanted, other=0).to(tl.float32)
                total += weight
        to = out + (picture * side * side + place) * 3
        tl.store(to, (red / total + 0.5).to(tl.uint8), mask=inside)
        tl.store(to + 1, (green / total + 0.5).to(tl.uint8), mask=inside)
        tl.store(to + 2, (blue / total + 0.5).to(tl.uint8), mask=inside)

    @triton.jit
    def _to_patches(
        images, maps, out, side: tl.constexpr, patch: tl.constexpr, cells: tl.constexpr, coloured: tl.constexpr,
        mean_r: tl.constexpr, mean_g: tl.constexpr, mean_b: tl.constexpr,
        std_r: tl.constexpr, std_g: tl.constexpr, std_b: tl.constexpr,
    ):  # fmt: skip
        """One program: one patch of one picture. maps: (B, 12), a 3 x 4 affine map of colours in [0, 1]."""
        picture, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
        grid = side // patch
        cell = tl.arange(0, cells)
        inside = cell < patch * patch
        row = (number // grid) * patch + cell // patch
        column = (number % grid) * patch + cell % patch
        pixel = images + ((picture * side + row) * side + column) * 3
        red = tl.load(pixel, mask=inside, other=0).to(tl.float32) / 255.0
        green = tl.load(pixel + 1, mask=inside, other=0).to(tl.float32) / 255.0
        blue = tl.load(pixel + 2, mask=inside, other=0).to(tl.float32) / 255.0
        if coloured:
            m = maps + picture * 12
            r = tl.load(m) * red + tl.load(m + 1) * green + tl.load(m + 2) * blue + tl.load(m + 3)
            g = tl.load(m + 4) * red + tl.load(m + 5) * green + tl.load(m + 6) * blue + tl.load(m + 7)
            b = tl.load(m + 8) * red + tl.load(m + 9) * green + tl.load(m + 10) * blue + tl.load(m + 11)
            red = tl.minimum(tl.maximum(r, 0.0), 1.0)
            green = tl.minimum(tl.maximum(g, 0.0), 1.0)
            blue = tl.minimum(tl.maximum(b, 0.0), 1.0)
        values: tl.constexpr = patch * patch
        to = out + (picture * grid * grid + number) * 3 * values + cell
        tl.store(to, ((red - mean_r) / std_r).to(out.dtype.element_ty), mask=inside)
        tl.store(to + values, ((green - mean_g) / std_g).to(out.dtype.element_ty), mask=inside)
        tl.store(to + 2 * values, ((blue - mean_b) / std_b).to(out.dtype.element_ty), mask=inside)


def crop_resize(canvas: Tensor, boxes: Tensor, flip: Tensor, side: int) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, side, side, 3) uint8. boxes: (B, 4) int32 top, left, height, width; flip: (B,) int32.

    All on one device. Within one grey level of geometry.py's: the same filter in float32, rounded once.
    """
    batch, rows, columns, _ = canvas.shape
    out = torch.empty(batch, side, side, 3, dtype=torch.uint8, device=canvas.device)
    _crop_resize[batch, triton.cdiv(side * side, PIXELS)](
        canvas.contiguous(), boxes, flip, out, rows, columns, side=side, pixels=PIXELS
    )
    return out


def to_patches(
    images: Tensor,
    patch: int,
    maps: tuple[Tensor, Tensor] | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, N, 3 p^2) in (channel, row, column) order, normalised, as float32 or bfloat16.

    maps: matrices (B, 3, 3) and offsets (B, 3) of colour.colour_maps for pixels in [0, 1], clamped after; None: none.
    """
    batch, side = images.shape[:2]
    grid = side // patch
    out = torch.empty(batch, grid * grid, 3 * patch * patch, dtype=dtype, device=images.device)
    affine = out if maps is None else torch.cat([maps[0], maps[1][:, :, None]], dim=2).contiguous()
    _to_patches[batch, grid * grid](
        images.contiguous(), affine, out, side=side, patch=patch, cells=triton.next_power_of_2(patch * patch),
        coloured=maps is not None, mean_r=mean[0], mean_g=mean[1], mean_b=mean[2],
        std_r=std[0], std_g=std[1], std_b=std[2],
    )  # fmt: skip
    return out
