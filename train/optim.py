"""Which parameters are decayed and how fast each learns, and the optimizer."""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import nn

from train.config import Optim
from train.muon import Muon

ENCODER_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
HIDDEN_MATRIX = re.compile(r"(^|\.)blocks\.\d+\..*\.weight$")  # of encoder and decoder; what Muon is for


def layer_scales(depth: int, decay: float) -> list[float]:
    """What the learning rate of each layer is multiplied by: decay^(L + 1 - i) for i = 0 ... L + 1.

    Layer 0 embeds, 1 ... L are the encoder's blocks, L + 1 is what comes behind them. Source: BEiT (Bao et al. 2021),
    as in MAE's util/lr_decay.py.
    """
    return [decay ** (depth + 1 - layer) for layer in range(depth + 2)]


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter of what has an `encoder`, in pre-training and in fine-tuning alike."""
    if name.startswith(("encoder.cls_token", "encoder.patch_embed")):
        return 0
    block = ENCODER_BLOCK.match(name)
    return 1 + int(block.group(1)) if block else depth + 1


def parameter_groups(module: nn.Module, optim: Optim) -> tuple[list[dict], list[dict]]:
    """Groups for AdamW, and groups of matrices for Muon where it is asked for: every trained parameter once.

    A group holds what is decayed alike and learns alike; `lr_scale` is the layer's share of the learning rate, and
    `decayed` says whether the schedule of the decay is for it. Not for what has one dimension, nor for what its module
    calls `undecayed`: a learned token is no matrix of a linear map, and prototypes are unit vectors.
    """
    undecayed = {
        f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name in getattr(part, "undecayed", ())
    }
    named = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
    depth = 1 + max((int(found.group(1)) for name, _ in named if (found := ENCODER_BLOCK.match(name))), default=-1)
    scales = layer_scales(depth, optim.layer_decay)
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        free = parameter.ndim <= 1 or name in undecayed
        pieces = 0
        if optim.optimizer == "muon" and HIDDEN_MATRIX.search(name) and parameter.ndim == 2:
            pieces = 3 if name.endswith("qkv.weight") else 1
        groups[pieces, free, scales[layer_of(name, depth)]].append(parameter)
    plain, matrices = [], []
    for (pieces, free, scale), parameters in groups.items():
        decay = 0.0 if free else optim.weight_decay
        group = {"params": parameters, "weight_decay": decay, "decayed": not free, "lr_scale": scale}
        if pieces:
            matrices.append({**group, "pieces": pieces})
        else:
            plain.append(group)
    return plain, matrices


def make_optimizer(module: nn.Module, optim: Optim, device: torch.device) -> torch.optim.Optimizer:
    """fp32 master weights and moments; one fused kernel where the device has it."""
    plain, matrices = parameter_groups(module, optim)
    adamw = torch.optim.AdamW(plain, lr=0.0, betas=optim.betas, fused=device.type in ("cuda", "cpu"))
    return Muon(matrices, adamw) if matrices else adamw


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, in each group its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
