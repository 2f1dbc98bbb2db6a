"""Pictures and views for small networks, and what many tests do with them: gradients, a few steps, counting work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.attention import attend_by_products
from model.network import Network
from model.objectives import Objective
from model.objectives.daae import DAAE
from model.shape import Shape
from pipeline.sampling import View
from pipeline.views import Batch, Patches, make_views
from tests.conftest import SMALL
from train.config import Optim
from train.optim import make_optimizer, set_rate

LABEL = torch.full((16,), -1)
# Deep and wide enough for the formula, which leaves out norms, biases and softmax, to be right within 1 %.
COUNTED = Shape(side=64, patch=8, width=64, depth=3, heads=2, decoder_width=32, decoder_depth=2, decoder_heads=2)


def batch(count: int = 16, views: dict[str, View] | None = None, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sides = {name: view.side for name, view in (views or DAAE().views(SMALL)).items()}
    coarse = {name: torch.rand(count, 3, 4, 4, generator=generator) for name in sides}
    images = {
        name: (torch.nn.functional.interpolate(each, sides[name], mode="bilinear") * 255).to(torch.uint8)
        for name, each in coarse.items()
    }
    images = {name: each.permute(0, 2, 3, 1).contiguous() for name, each in images.items()}
    return Batch(images, torch.full((count,), -1), torch.arange(count), epoch=0)


def views_of(
    objective: Objective, seed: int = 0, mask_seed: int = 0, *, count: int = 16, shape: Shape = SMALL
) -> dict[str, Patches]:
    declared = objective.views(shape)
    return make_views(batch(count, declared, seed), declared, patch=shape.patch, seed=mask_seed)


def gradients(network: Network, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss.backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def overfit(
    network: Network, views: dict[str, Patches], steps: int, label: torch.Tensor = LABEL, lr: float = 5e-3
) -> list[dict[str, float]]:
    """Loss, terms and what is watched of each of so many steps on one batch, as they are before the step."""
    optimizer, rows = make_optimizer(network, Optim(), torch.device("cpu")), []
    set_rate(optimizer, lr)
    for step in range(steps):
        network.objective.before_step(network, step / steps, step)
        outcome = network(views, label)
        loss = torch.stack(list(outcome.terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        network.objective.before_update(network, step)
        optimizer.step()
        network.objective.after_step(network, (step + 1) / steps)
        found = {**outcome.terms, **outcome.watched, "loss": loss}
        rows.append({name: value.item() for name, value in found.items()})
    return rows


def counted_macs(method: Objective, shape: Shape, label: torch.Tensor) -> float:
    """Multiply-accumulates of a forward pass for an image, as torch counts them."""
    network, views = Network(method, shape, 0), views_of(method, count=len(label), shape=shape)
    with pytest.MonkeyPatch.context() as patched, FlopCounterMode(display=False) as counter:
        patched.setattr("model.vit.attend", attend_by_products)  # torch 2.11 does not count the fused one on a CPU
        network(views, label)
    return counter.get_total_flops() / 2 / len(label)
