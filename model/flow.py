"""A small image generator: a U-Net that learns the straight way from noise to images.

Rectified flow (Liu et al. 2022; flow matching, Lipman et al. 2022): x_t = (1 - t) noise + t image for t in [0, 1], and
the network predicts the velocity image - noise from (x_t, t). Images are (B, 3, S, S) in [-1, 1], noise is normal.
`diffusers` has such a network too, but takes eight seconds to import and four more packages; this one is a page.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 16  # of a group of a norm; widths are multiples of 32, so that half as much again is one of 16
TIME = 64  # sines and cosines of the time
HEAD = 32


class FlowNet(nn.Module):
    """A U-Net over cells of pixels, three resolutions deep, with attention at the lowest.

    Up to 64 px there are 16 x 16 cells whatever the side, so that all cost the same.
    """

    def __init__(self, side: int, width: int):
        """side: a multiple of 16. width: a multiple of 32."""
        super().__init__()
        self.cell = min(4, side // 16)
        widths = (width, width * 3 // 2, width * 2)
        values, deepest = 3 * self.cell**2, widths[-1]
        self.time = nn.Sequential(nn.Linear(TIME, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU())
        self.stem = nn.Conv2d(values, width, 3, padding=1)
        inputs = (width, *widths[:-1])
        self.down = nn.ModuleList(Residual(i, o, 2 * width) for i, o in zip(inputs, widths, strict=True))
        self.middle = nn.ModuleList([
            Residual(deepest, deepest, 2 * width), SelfAttention(deepest), Residual(deepest, deepest, 2 * width)
        ])  # fmt: skip
        self.up = nn.ModuleList(
            Residual(below + here, here, 2 * width)
            for below, here in zip((deepest, *widths[:0:-1]), widths[::-1], strict=True)
        )
        self.norm = nn.GroupNorm(width // CHANNELS, width)
        self.head = _silent(nn.Conv2d(width, values, 3, padding=1))

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        """(B, 3, S, S) on the way, (B,) in [0, 1] -> velocity, (B, 3, S, S)."""
        when = self.time(_waves(time))
        # Channels last: twice as fast on a CPU, and what a GPU's tensor cores take.
        cells = F.pixel_unshuffle(images, self.cell).contiguous(memory_format=torch.channels_last)
        cells = self.stem(cells)
        passed = []
        for level, block in enumerate(self.down):
            cells = block(F.avg_pool2d(cells, 2) if level else cells, when)
            passed.append(cells)
        before, attention, after = self.middle
        cells = after(attention(before(cells, when)), when)
        for level, block in enumerate(self.up):
            cells = F.interpolate(cells, scale_factor=2.0) if level else cells
            cells = block(torch.cat([cells, passed.pop()], dim=1), when)
        return F.pixel_shuffle(self.head(F.silu(self.norm(cells))), self.cell)


class Residual(nn.Module):
    """Two convolutions beside a shortcut; the time scales and shifts between them (Dhariwal & Nichol 2021)."""

    def __init__(self, width: int, out: int, time: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(width // CHANNELS, width), nn.GroupNorm(out // CHANNELS, out)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = _silent(nn.Conv2d(out, out, 3, padding=1))
        self.time = nn.Linear(time, 2 * out)
        self.shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, cells: Tensor, when: Tensor) -> Tensor:
        scale, shift = self.time(when)[:, :, None, None].chunk(2, dim=1)
        inner = self.norm2(self.conv1(F.silu(self.norm1(cells)))) * (1 + scale) + shift
        return self.shortcut(cells) + self.conv2(F.silu(inner))


class SelfAttention(nn.Module):
    """Every cell looks at every other one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(width // CHANNELS, width)
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), _silent(nn.Conv2d(width, width, 1))

    def forward(self, cells: Tensor) -> Tensor:
        batch, width, high, wide = cells.shape
        parts = self.qkv(self.norm(cells)).reshape(batch, 3, width // HEAD, HEAD, high * wide)
        query, key, value = parts.transpose(3, 4).unbind(1)  # (B, heads, cells, HEAD) each
        seen = F.scaled_dot_product_attention(query, key, value).transpose(2, 3)
        return cells + self.proj(seen.reshape(batch, width, high, wide))


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """One that says 0 until it is trained: a block begins as its shortcut."""
    for part in layer.parameters():
        nn.init.zeros_(part)
    return layer


def _waves(time: Tensor) -> Tensor:
    """(B,) -> (B, TIME): sines and cosines with periods from 1/160 of the way to far beyond it."""
    frequency = torch.exp(torch.linspace(math.log(1000.0), math.log(0.1), TIME // 2, device=time.device))
    phase = time[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def flow_loss(network: nn.Module, images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Mean squared error of the velocity: a scalar, Var[image - noise] for a network that says 0.

    images, noise: (B, 3, S, S). time: (B,) in [0, 1]. Source: Liu et al. 2022, eq. 1.
    """
    t = time[:, None, None, None]
    velocity = network((1 - t) * noise + t * images, time)
    return F.mse_loss(velocity.float(), images - noise)


def flow_images(network: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """From noise to images, both (B, 3, S, S), in equal steps of Heun's method: two looks at the network each."""
    images = noise
    for step in range(steps):
        now, then = (torch.full((len(noise),), place / steps, device=noise.device) for place in (step, step + 1))
        slope = network(images, now).float()
        ahead = network(images + slope / steps, then).float()
        images = images + (slope + ahead) / (2 * steps)
    return images
