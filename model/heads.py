"""Small networks between the encoder's features and a contrastive loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from model.gather import BatchNorm

Norm = Literal["batch", "batch_apart", "layer"]


def _norm(kind: Norm, width: int, *, affine: bool) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(width, elementwise_affine=affine)
    return BatchNorm(width, affine=affine, gathered=kind == "batch")


class Projector(nn.Module):
    """Linear - norm - ReLU - Linear - norm, after MoCo v3 (Chen et al. 2021) at smaller width; the last norm has no
    scale of its own. Call it once per view: one batch norm over two views would let it tell them apart by offset."""

    def __init__(self, width: int, hidden: int = 2048, out: int = 256, norm: Norm = "batch"):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            _norm(norm, hidden, affine=True),
            nn.ReLU(),
            nn.Linear(hidden, out, bias=False),
            _norm(norm, out, affine=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, out)."""
        return self.layers(features)


class Predictor(nn.Module):
    """Linear - BN - ReLU - Linear on one side of a pair, which breaks its symmetry (BYOL, MoCo v3)."""

    def __init__(self, width: int = 256, hidden: int = 2048, norm: Norm = "batch"):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), _norm(norm, hidden, affine=True), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        return self.layers(features)


def feature_spread(features: Tensor) -> Tensor:
    """Mean standard deviation of unit embeddings over the batch, times sqrt(d): about 1 when spread, 0 on collapse."""
    unit = nn.functional.normalize(features.float(), dim=-1)
    return unit.std(dim=0).mean() * torch.tensor(unit.shape[-1]).sqrt()
