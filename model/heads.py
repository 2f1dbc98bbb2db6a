"""Small networks between the encoder's features and a contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.gather import BatchNorm, total
from model.norm import LayerNorm
from model.precise import exact
from model.shape import Norm


def _norm(kind: Norm, width: int, *, affine: bool) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "layer":
        return LayerNorm(width, elementwise_affine=affine)
    return BatchNorm(width, affine=affine, gathered=kind == "batch")


class Projector(nn.Module):
    """Linear - norm - ReLU, depth - 1 times, then Linear - norm, after MoCo v3 (Chen et al. 2021) at smaller width; the
    last norm has no scale of its own. Call it once per view: one batch norm over two views would let it tell them apart
    by offset. last_norm: False leaves the last norm out (BYOL). A layer that no norm follows has a bias."""

    def __init__(
        self,
        width: int,
        hidden: int = 2048,
        out: int = 256,
        norm: Norm = "batch",
        *,
        depth: int = 2,
        last_norm: bool = True,
    ):
        super().__init__()
        layers, bare = [], norm == "none"
        for _ in range(depth - 1):
            layers += [nn.Linear(width, hidden, bias=bare), _norm(norm, hidden, affine=True), nn.ReLU()]
            width = hidden
        layers.append(nn.Linear(width, out, bias=bare or not last_norm))
        if last_norm:
            layers.append(_norm(norm, out, affine=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, out)."""
        return self.layers(features)


class Predictor(nn.Module):
    """Linear - BN - ReLU - Linear on one side of a pair, which breaks its symmetry (BYOL, MoCo v3)."""

    def __init__(self, width: int = 256, hidden: int = 2048, norm: Norm = "batch"):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), _norm(norm, hidden, affine=True), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        return self.layers(features)


class Prototypes(nn.Module):
    """Unit vectors that embeddings are compared with (SwAV)."""

    undecayed = ("prototypes",)
    queued = False  # earlier embeddings take part: told by the method before each step, so that no checkpoint needs it

    def __init__(self, count: int, width: int):
        super().__init__()
        self.prototypes = nn.Parameter(nn.functional.normalize(torch.randn(count, width), dim=1))

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, D), any scale -> (B, K) cosines, in float32 whatever autocast says."""
        with torch.autocast(embedding.device.type, enabled=False):
            unit = nn.functional.normalize(exact(embedding), dim=1)
            # Divided among processes, weights may come as bfloat16.
            return unit @ self.prototypes.to(unit.dtype).T

    @torch.no_grad()
    def renormalise(self) -> None:
        self.prototypes.copy_(nn.functional.normalize(self.prototypes, dim=1))


def prototype_use(scores: Tensor) -> Tensor:
    """How evenly images lie among prototypes: perplexity of how many have each as their nearest, over the number of
    prototypes. 1 / K where all lie at one, about 0.6 where they lie anywhere and are as many as prototypes.

    scores: (B, K), this process' rows; counts run over all processes. Codes would not tell: Sinkhorn's algorithm evens
    them out whatever they are made from.
    """
    nearest = scores.argmax(dim=1)
    counts = total(torch.zeros_like(scores[0]).scatter_add_(0, nearest, torch.ones_like(scores[:, 0])))
    return torch.special.entr(counts / counts.sum()).sum().exp() / len(counts)


def feature_spread(features: Tensor) -> Tensor:
    """Mean standard deviation of unit embeddings over the batch, times sqrt(d): about 1 when spread, 0 on collapse."""
    unit = nn.functional.normalize(features.float(), dim=-1)
    return unit.std(dim=0).mean() * unit.shape[-1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """In how many directions features lie: exp of the entropy of their singular values as shares of the sum. 1 where
    all are parallel, n for n of equal length and orthogonal; at most the lesser of rows and width.

    features: (B, D), any scale. A collapse of dimensions shows here where embeddings, behind a norm, still spread.
    Source: Garrido et al. 2023 (RankMe, arXiv 2210.02885), section 3.
    """
    values = torch.linalg.svdvals(features.float())
    return torch.special.entr(values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)).sum().exp()


@torch.no_grad()
def pair_health(one: Tensor, other: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
    """How well the rows of this process' batch find their partners, and whether they still differ: curves to watch.

    one, other: (B, D), any scale; row i of both comes from image i. label: (B,), if rows of the same class are partners
    too. Accuracy of the nearest row (1 / B at random), mean cosine of partners and of the rest, spread of `other`.
    """
    with torch.autocast(one.device.type, enabled=False):
        cosine = nn.functional.normalize(one.float(), dim=1) @ nn.functional.normalize(other.float(), dim=1).T
    label = torch.arange(len(one), device=one.device) if label is None else label
    partners = label[:, None] == label[None, :]
    found = partners.gather(1, cosine.argmax(dim=1, keepdim=True))
    # No boolean index: the device would have to tell how many there are.
    near, far = (cosine.where(chosen, 0).sum() / chosen.sum().clamp(min=1) for chosen in (partners, ~partners))
    return {
        "pair_accuracy": found.float().mean(), "pair_cosine": near, "other_cosine": far, "spread": feature_spread(other)
    }  # fmt: skip
