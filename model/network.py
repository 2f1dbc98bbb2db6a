"""Encoder and the parts that an objective brings, as one module: what is optimized, wrapped for DDP and saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.objectives.base import Objective, Outcome
from model.shape import Shape
from model.vit import Encoder
from pipeline.views import Patches


class Network(nn.Module):
    def __init__(self, objective: Objective, shape: Shape, seed: int):
        """Weights are a pure function of (shape, objective, seed); the caller's generator is left as it was.

        The encoder is drawn first: every objective starts from the same encoder under one seed.
        """
        super().__init__()
        shape.check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(
                side=shape.side, patch=shape.patch, width=shape.width, depth=shape.depth, heads=shape.heads
            )
            self.parts = nn.ModuleDict(objective.parts(shape))
        self.objective = objective
        self.momentum_copies = {name: part for name, part in self.parts.items() if isinstance(part, MomentumCopy)}
        for name, copy in self.momentum_copies.items():
            copy.follow(self.part_or_encoder(name.removeprefix("momentum_")), 0.0)

    def part_or_encoder(self, name: str) -> nn.Module:
        return self.encoder if name == "encoder" else self.parts[name]

    def forward(self, views: dict[str, Patches], label: Tensor) -> Outcome:
        return self.objective.loss(self, views, label)


class MomentumCopy(nn.Module):
    """A copy of a module that follows it slowly and is never trained (He et al. 2020, MoCo)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.requires_grad_(False)

    @torch.no_grad()
    def follow(self, source: nn.Module, momentum: float) -> None:
        """weights <- momentum * weights + (1 - momentum) * source's; buffers are copied."""
        for mine, theirs in zip(self.module.parameters(), source.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)
        for mine, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def forward(self, *inputs):
        return self.module(*inputs)
