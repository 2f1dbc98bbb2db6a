"""Which parameters are decayed, and the optimizer."""

from __future__ import annotations

import torch
from torch import nn

from train.config import Optim

# Besides everything one-dimensional: learned tokens are no matrices of a linear map.
NO_DECAY = ("cls_token", "mask_token", "pos_embed")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups that together hold every trained parameter once: decayed matrices, and the rest."""
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NO_DECAY
            (plain if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(module: nn.Module, optim: Optim, device: torch.device) -> torch.optim.AdamW:
    """fp32 master weights and moments; one fused kernel where the device has it."""
    groups = parameter_groups(module, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=device.type in ("cuda", "cpu"))
