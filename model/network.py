"""Encoder and the parts that an objective brings, as one module: what is optimized, wrapped for DDP and saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.memory import MomentumCopy
from model.objectives.base import Objective, Outcome
from model.shape import Shape
from model.vit import build_encoder
from pipeline.views import Patches


class Network(nn.Module):
    def __init__(self, objective: Objective, shape: Shape, seed: int):
        """Weights are a pure function of (shape, objective, seed); the caller's generator is left as it was.

        The encoder is drawn first: under one seed every objective is given the same one.
        """
        super().__init__()
        shape.check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = build_encoder(shape)
            self.parts = nn.ModuleDict(objective.parts(shape))
        self.objective = objective
        objective.prepare(self)
        self.follow(0.0)

    def follow(self, momentum: float) -> None:
        """Every part that is a momentum copy, named momentum_X, moves towards X; with momentum 0 it becomes X."""
        for name, part in self.parts.items():
            if isinstance(part, MomentumCopy):
                source = name.removeprefix("momentum_")
                part.follow(self.encoder if source == "encoder" else self.parts[source], momentum)

    def forward(self, views: dict[str, Patches], label: Tensor) -> Outcome:
        return self.objective.loss(self, views, label)
