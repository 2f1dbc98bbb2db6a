"""Precision for what 16 bits would round too much."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(values: Tensor) -> Tensor:
    """The same in float32 at least: float64 stays what it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
