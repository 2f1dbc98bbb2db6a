"""Several pictures as one sequence of tokens, and back. MixedAE (Chen et al. 2023, arXiv 2303.17152)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.views import Patches


def mix_pictures(view: Patches, group: int) -> Patches:
    """What each `group` consecutive samples keep as one picture: every cell holds the patch of exactly one of them.

    view: of B samples, each of which keeps K = N / group patches that the others hide. Returns B / group pictures of N
    patches; `keep` lists them source by source, so that token t comes from source t // K of its group.
    """
    assert view.keep is not None
    keep = view.keep.reshape(len(view.keep) // group, -1)
    visible = view.visible().reshape(*keep.shape, -1)
    pixels = torch.empty_like(visible).scatter_(1, keep[:, :, None].expand_as(visible), visible)
    return Patches(pixels, view.grid, keep)


def unmix(code: Tensor, group: int) -> Tensor:
    """(B / group, 1 + N, D) -> (B, 1 + K, D): each source's tokens, behind the class token of the picture it was in."""
    own = code[:, 1:].reshape(len(code) * group, -1, code.shape[-1])
    return torch.cat([code[:, :1].repeat_interleave(group, dim=0), own], dim=1)


def sources(count: int, group: int, device: torch.device) -> Tensor:
    """(count,) int64: which of `group` sources each token of a mixed picture comes from."""
    return torch.arange(count, device=device) // (count // group)


class Segments(nn.Module):
    """A learned token per place in a group, added to what comes from there: neighbours of one source can be told from
    neighbours of two. Who sits where is chance, so that it says nothing about a picture."""

    undecayed = ("segment_token",)

    def __init__(self, group: int, width: int):
        super().__init__()
        self.segment_token = nn.Parameter(torch.empty(group, width))
        nn.init.normal_(self.segment_token, std=0.02)

    def forward(self, source: Tensor) -> Tensor:
        """(N,) int64 -> (N, D)."""
        return self.segment_token[source]


def recognised(kept: Tensor, source: Tensor) -> Tensor:
    """Share of the keys of patches that come from the same source: 1 / group by chance, 1 at best.

    kept: (B, heads, 1 + N, 1 + N) bool, which keys each query attends to, class token first; source: (N,).
    """
    kept = kept[:, :, 1:]
    same = source[:, None] == source[None, :]
    # Twenty times as fast as sums on a CPU.
    return (kept[..., 1:] & same).count_nonzero() / kept.count_nonzero()
