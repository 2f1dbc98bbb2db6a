"""One pure function per published loss. Everything is computed in float32 whatever autocast says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
    """How hard it is to pick each query's own key out of the batch.

    query, key: (B, D), any scale; row i of both comes from image i.
    Returns a scalar in nats: log(B) for a collapsed encoder, near 0 for a perfect one.
    Source: van den Oord et al. 2018, eq. 4, with cosine similarity as in SimCLR.
    """
    # Under bf16 autocast `@` would round a logit near 10 (temperature 0.1) in steps of 1/16.
    with torch.autocast(query.device.type, enabled=False):
        logits = _cosine(query, key) / temperature  # (B, B)
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def symmetric_info_nce(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """Mean of both directions of info_nce, from one product.

    one, other: (B, D). Returns a scalar in nats in [0, log(B) + 2 / temperature]. Negatives come from the other view
    only: among its own view a head could win by telling the views apart.
    """
    with torch.autocast(one.device.type, enabled=False):
        logits = _cosine(one, other) / temperature
    own = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    dtype = torch.promote_types(one.dtype, torch.float32)
    return F.normalize(one.to(dtype), dim=-1) @ F.normalize(other.to(dtype), dim=-1).T


def normalise_patches(patches: Tensor) -> Tensor:
    """(…, P): each patch to mean 0 and variance 1 over its P values, unbiased variance as in MAE's code."""
    # Relative to the first value a constant patch is exactly 0, not the mean's rounding error a thousandfold.
    patches = patches - patches[..., :1]
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def masked_mse(predicted: Tensor, patches: Tensor, *, norm_pix: bool) -> Tensor:
    """Mean squared error over the values of hidden patches.

    predicted, patches: (B, M, P), hidden patches only. With norm_pix each target patch is normalised by itself; a
    prediction of 0 then costs (P - 1) / P. Source: He et al. 2021, section 3 ("reconstruction target").
    """
    with torch.autocast(predicted.device.type, enabled=False):
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        target = patches.to(dtype)
        target = normalise_patches(target) if norm_pix else target
        return F.mse_loss(predicted.to(dtype), target)
