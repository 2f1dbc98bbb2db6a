"""The same attention several ways; which is fastest depends on device, type and length."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.precise import exact
from model.ways import parse_ways

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value, all (B, heads, N, d) -> (B, heads, N, d)


@dataclass(frozen=True, order=True)
class Lengths:
    """What decides which way is fastest, besides device and type."""

    rows: int  # of the batch
    heads: int
    tokens: int
    width: int  # of a head

    def __str__(self) -> str:
        return f"{self.heads}x{self.tokens}x{self.width}"


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention. All (B, heads, N, d); returns (B, heads, N, d)."""
    rows, heads, tokens, width = query.shape
    if _seen is not None:
        _seen.add(Lengths(rows, heads, tokens, width))
    way = _chosen.get((heads, tokens, width)) or _chosen.get(None) or usual(query.device, query.dtype)
    if way in HALVES and query.dtype == torch.float32:  # a check in full precision beside a run
        way = usual(query.device, query.dtype)
    return WAYS[way](query, key, value)


def usual(device: torch.device, dtype: torch.dtype) -> str:
    """The way for lengths that nothing was measured for."""
    return "products" if device.type == "cpu" and dtype == torch.bfloat16 else "any"


def attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two batched products and a softmax.

    The backward of the CPU's fused kernel is slow in bfloat16 at a ViT's lengths: 48 ms against 6 for 50 tokens
    (batch 32, 12 heads of 64). In float32 the fused one is the faster.
    """
    if torch.compiler.is_compiling():
        weights = torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1)
        return weights @ value
    return _Products.apply(query, key, value)


class _Products(torch.autograd.Function):
    """The scale is the products' own factor, and heads are laid out once for both passes: a tenth less than autograd
    makes of the same formula."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shape, ctx.scale = query.shape, query.shape[-1] ** -0.5
        query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        weights = torch.ops.aten._softmax(_scaled(query, key.transpose(1, 2), ctx.scale), -1, False)
        ctx.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value).view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _products_back(ctx, grad)


def _products_back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To query, key and value. What a query does not attend to has a weight of 0 and gets nothing."""
    query, key, value, weights = ctx.saved_tensors
    grad = grad.flatten(0, 1)
    to_weights = torch.bmm(grad, value.transpose(1, 2))
    to_logits = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
    to_query = _scaled(to_logits, key, ctx.scale)
    to_key = _scaled(to_logits.transpose(1, 2), query, ctx.scale)
    to_value = torch.bmm(weights.transpose(1, 2), grad)
    return to_query.view(ctx.shape), to_key.view(ctx.shape), to_value.unflatten(0, ctx.shape[:2])


def _scaled(one: Tensor, other: Tensor, factor: float) -> Tensor:
    """factor one @ other, batch by batch."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=factor)


def attend_top(query: Tensor, key: Tensor, value: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query to its k keys of the largest product alone; the first query, the class token's,
    attends to all. Returns (B, heads, N, d), and which keys were attended to, (B, heads, N, N) bool.

    Source: MixedAE (Chen et al. 2023, arXiv 2303.17152), homologous attention.
    """
    with torch.autocast(query.device.type, enabled=False):
        if not torch.compiler.is_compiling():
            return _TopProducts.apply(query, key, value, k)
        logits, kept = _top(query, key, k)
        weights = torch.softmax(torch.where(kept, logits, -torch.inf), dim=-1)
        return weights.to(value.dtype) @ value, kept


def _top(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits in float32 at least, and which of them are kept: in bfloat16 products tie, and which of them are the
    largest would be chance."""
    logits = (exact(query) * query.shape[-1] ** -0.5) @ exact(key).transpose(-2, -1)
    kept = among_largest(logits.detach(), k)
    kept[:, :, 0] = True
    return logits, kept


class _TopProducts(torch.autograd.Function):
    """The choice is made in float32 once; what the backward pass multiplies has the type of the values."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, k: int) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shape, ctx.scale = query.shape, query.shape[-1] ** -0.5
        logits, kept = _top(query, key, k)
        weights = torch.softmax(torch.where(kept, logits, -torch.inf), dim=-1).to(value.dtype)
        query, key, value, weights = (each.flatten(0, 1) for each in (query, key, value, weights))
        ctx.save_for_backward(query, key, value, weights)
        ctx.mark_non_differentiable(kept)
        return torch.bmm(weights, value).unflatten(0, ctx.shape[:2]), kept

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_products_back(ctx, grad), None


def among_largest(values: Tensor, k: int) -> Tensor:
    """bool: which values are among the k largest of their last dimension; of equal ones any, and never more than k."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        # NumPy looks for the k-th alone, with vectors: five times as fast as torch's topk.
        found = values.numpy()
        kept = torch.from_numpy(found >= np.partition(found, -k, axis=-1)[..., -k, None])
        if int(kept.count_nonzero()) == k * kept[..., 0].numel():  # none is as large as the k-th
            return kept
    top = values.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, top, True)


def _by(backend: SDPBackend) -> Attend:
    def attend_by_backend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attend_by_backend


WAYS: dict[str, Attend] = {
    "any": F.scaled_dot_product_attention,  # torch chooses
    "products": attend_by_products,
    "flash": _by(SDPBackend.FLASH_ATTENTION),
    "efficient": _by(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": _by(SDPBackend.CUDNN_ATTENTION),
}
HALVES = ("flash", "cudnn")  # which know 16-bit numbers alone

WORTH = 0.9  # of the usual way's time

_chosen: dict[tuple[int, ...] | None, str] = {}  # None: every length
_choice = ""  # _chosen as it was asked for
_seen: set[Lengths] | None = None


def choose(ways: str) -> None:
    """From here on attend so: "12x50x64=products 16x197x32=any", heads x tokens x width of a head, or one way for all.

    Lengths that are not named go by `usual`. Raises UsageError.
    """
    global _choice
    if ways != _choice:
        wanted = parse_ways(ways)
        _chosen.clear()
        _chosen.update(wanted)
        _choice = ways


@contextlib.contextmanager
def listening() -> Iterator[set[Lengths]]:
    """The lengths that are attended over inside."""
    global _seen
    before, _seen = _seen, set()
    try:
        yield _seen
    finally:
        _seen = before


def fastest(lengths: Lengths, device: torch.device, dtype: torch.dtype, *, rounds: int = 5) -> str:
    """The way whose forward and backward take least, by the best of interleaved rounds; what fails is left out.

    The usual way stays unless another takes a tenth less: two runs of one machine are to choose alike.
    """
    # As an encoder's block has them: parts of one product, heads behind tokens, and so again afterwards.
    shape = (lengths.rows, lengths.tokens, 3, lengths.heads, lengths.width)
    joint = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    best: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason for which a kernel does not take these shapes
        _time_in_turns(best, joint, device, rounds)
    way, known = min(best, key=lambda way: best[way]), usual(device, dtype)
    return way if best[way] < WORTH * best.get(known, float("inf")) else known


def _time_in_turns(best: dict[str, float], joint: Tensor, device: torch.device, rounds: int) -> None:
    """Into `best` each way's least seconds, forward and backward; what fails is left out."""
    for turn in range(rounds + 1):
        for way in WAYS:
            if turn > 0 and way not in best:
                continue
            try:
                start = _now(device)
                query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
                WAYS[way](query, key, value).transpose(1, 2).flatten(2).sum().backward()
                took = _now(device) - start
            except RuntimeError:  # this kernel does not take these shapes, or is not in this build
                best.pop(way, None)
                continue
            best[way] = took if turn < 2 else min(took, best[way])  # the first one allocates and compiles


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
