"""The same attention two ways; which one is faster depends on the device and the type, not on the caller."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention. All (B, heads, N, d); returns (B, heads, N, d)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return attend_by_products(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two batched products and a softmax.

    The backward of the CPU's fused kernel is slow in bfloat16 at a ViT's lengths: 48 ms against 6 for 50 tokens
    (batch 32, 12 heads of 64). In float32 the fused one is the faster.
    """
    scale = query.shape[-1] ** -0.5
    weights = torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1)
    return weights @ value
