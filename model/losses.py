"""One pure function per published loss. Everything is computed in float32 whatever autocast says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gather import gather, place


def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
    """How hard it is to pick each query's own key out of the batch, over all processes.

    query, key: (B, D), any scale; row i of both comes from image i.
    Returns a scalar in nats: log(B) for a collapsed encoder, near 0 for a perfect one; with R processes the mean over
    this one's B queries among R B keys, so that the mean over processes is the loss of the joint batch.
    Source: van den Oord et al. 2018, eq. 4, with cosine similarity as in SimCLR.
    """
    # Under bf16 autocast `@` would round a logit near 10 (temperature 0.1) in steps of 1/16.
    with torch.autocast(query.device.type, enabled=False):
        logits = _unit(query) @ gather(_unit(key)).T / temperature  # (B, R B)
    first = place()[0] * len(query)
    return F.cross_entropy(logits, torch.arange(first, first + len(query), device=query.device))


def symmetric_info_nce(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """Mean of both directions of info_nce.

    one, other: (B, D). Returns a scalar in nats in [0, log(R B) + 2 / temperature]. Negatives come from the other view
    only: among its own view a head could win by telling the views apart.
    """
    there, back = (info_nce(*pair, temperature=temperature) for pair in ((one, other), (other, one)))
    return (there + back) / 2


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


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
