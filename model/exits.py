"""A side exit of the encoder: what can be told of a picture half way. SelfCon (Bae et al. 2021, arXiv 2106.15499)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.norm import FinalNorm
from model.vit import Block, init_weights, patch_mean


class Exit(nn.Module):
    """Blocks of its own, a norm, the mean of the patch tokens; where it has no blocks, a linear layer behind these."""

    ledger_part = "encoder"

    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = FinalNorm(width, eps=1e-6)
        self.proj = nn.Identity() if depth else nn.Linear(width, width)
        init_weights(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1 + N, D) from a block of the encoder -> (B, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.proj(patch_mean(self.norm(tokens)))


@torch.no_grad()
def exit_health(early: Tensor, late: Tensor, label: Tensor) -> dict[str, Tensor]:
    """What exits and trunk know each by itself, and whether they say the same: curves to watch.

    early: (E, B, D), of the exits, and late: (B, D), of the trunk, any scale; label: (B,). Accuracies: the share of
    images whose nearest other image of this process' batch is of their class. Agreement: mean cosine of an exit and the
    trunk. A trunk that copies its exit agrees with it at 1 and is no more accurate. Both are means over the exits.
    """
    with torch.autocast(late.device.type, enabled=False):
        early, late = (nn.functional.normalize(each.float(), dim=-1) for each in (early, late))
        accuracies = []
        for each in (*early, late):
            nearest = (each @ each.T).fill_diagonal_(-torch.inf).argmax(dim=1)
            accuracies.append((label[nearest] == label).float().mean())
    return {
        "exit_accuracy": torch.stack(accuracies[:-1]).mean(), "trunk_accuracy": accuracies[-1],
        "agreement": (early * late).sum(dim=-1).mean(),
    }  # fmt: skip
