"""What a method remembers beside what it trains: weights that follow others slowly, and keys of earlier images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gather import gather


def rising_momentum(start: float, done: float) -> float:
    """`start` at the run's beginning, 1 at its end, along half a cosine (BYOL, Grill et al. 2020; MoCo v3).

    done: share of the optimizer steps taken, in [0, 1].
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * done)) / 2


class MomentumCopy(nn.Module):
    """A copy of a module that follows it slowly and is never trained (He et al. 2020, MoCo)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.requires_grad_(False)

    @torch.no_grad()
    def follow(self, source: nn.Module, momentum: float) -> None:
        """weights <- momentum * weights + (1 - momentum) * source's; buffers are copied."""
        weights: list[Tensor] = list(self.module.parameters())
        trained: list[Tensor] = list(source.parameters())
        assert len(weights) == len(trained)
        # On a GPU a few kernels instead of one for each weight.
        torch._foreach_lerp_(weights, trained, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        for mine, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def forward(self, *inputs):
        return self.module(*inputs)


class Queue(nn.Module):
    """The last `length` keys, unit rows, the oldest overwritten first (He et al. 2020, MoCo, section 3.2).

    It begins with random directions, or empty, with rows of 0. What a loss offers goes in with the next push, after the
    optimizer's step, so that no part of a batch meets another part's keys. Rows and place are buffers: a checkpoint
    holds them.
    """

    rows: Tensor  # (length, width)
    oldest: Tensor  # the row that the next key takes

    def __init__(self, length: int, width: int, *, empty: bool = False):
        super().__init__()
        rows = torch.zeros(length, width) if empty else F.normalize(torch.randn(length, width), dim=1)
        self.register_buffer("rows", rows)
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self._offered: list[Tensor] = []

    def offer(self, keys: Tensor) -> None:
        """(B, width), any scale. What is only looked at, in evaluation mode, is not kept."""
        if self.training:
            self._offered.append(keys.detach())

    def forget(self) -> None:
        """Drop what was offered and not pushed, by a loss that no step followed. To be called before every step."""
        self._offered.clear()

    def full(self) -> Tensor:
        """() bool, on the device: no row is empty any more."""
        return self.rows.any(dim=1).all()

    @torch.no_grad()
    def push(self) -> None:
        """Take in what was offered since the last push, by all processes. Each of them then holds the same queue.

        A row that is not finite leaves in its place what was there. The batch of all processes divides the length.
        """
        keys = gather(torch.cat(self._offered).to(self.rows.dtype))
        self._offered.clear()
        place = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.rows)
        finite = keys.isfinite().all(dim=1, keepdim=True)
        self.rows[place] = torch.where(finite, F.normalize(keys, dim=1), self.rows[place])
        self.oldest.copy_((self.oldest + len(keys)) % len(self.rows))
