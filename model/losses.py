"""One pure function per published loss. Everything is computed in float32 whatever autocast says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gather import gather, largest_of_all, place, total
from model.precise import exact


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


def nt_xent(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """How hard it is to pick each row's partner out of both views of the batch, over all processes, itself left out.

    one, other: (B, D), any scale; row i of both comes from image i.
    Returns a scalar in nats: log(2 R B - 1) for a collapsed encoder with R processes.
    Source: Chen et al. 2020 (SimCLR), eq. 1 and algorithm 1.
    """
    with torch.autocast(one.device.type, enabled=False):
        mine = _unit(torch.stack([one, other]))  # (2, B, D)
        logits = _against_all(mine) / temperature  # (2 B, 2 R B)
    itself = _own_columns(mine)
    return F.cross_entropy(logits.scatter(1, itself[:, None], -torch.inf), itself.roll(len(one)))


def sup_con(features: Tensor, label: Tensor, *, temperature: float, base_temperature: float | None = None) -> Tensor:
    """How hard it is to pick the rows of the same class out of all views of the batch, over all processes.

    features: (V, B, D), any scale: V views (or exits) of B images. label: (B,) int64; -1 is a class like another.
    An anchor averages over its positives outside the logarithm; one without any is left out, and with no anchor left
    the loss is 0. Returns a scalar in nats: log(V R B - 1) for a collapsed encoder with R processes; with V = 2 and no
    label twice it is nt_xent. With a base temperature all of this is multiplied by temperature / base_temperature.
    Source: Khosla et al. 2020 (SupCon), eq. 2, and the factor of its code.
    """
    views = len(features)
    with torch.autocast(features.device.type, enabled=False):
        mine = _unit(features)
        logits = _against_all(mine) / temperature  # (V B, V R B)
    itself = _own_columns(mine)[:, None]
    positive = label.repeat(views)[:, None] == gather(label).repeat(views)[None, :]
    positive.scatter_(1, itself, False)
    count = positive.sum(dim=1)
    chance = logits.scatter(1, itself, -torch.inf).log_softmax(dim=1)
    each = -chance.masked_fill(~positive, 0).sum(dim=1) / count.clamp(min=1)
    # The mean over the anchors of all processes, as the mean over processes of what each has.
    anchors = total((count > 0).sum()).clamp(min=1)
    scale = 1.0 if base_temperature is None else temperature / base_temperature
    return scale * each.sum() * place()[1] / anchors


def queue_info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """How hard it is to pick each query's own key beside a queue of other images' keys.

    query, key: (B, D), any scale; row i of both comes from image i. queue: (K, D), unit rows, the same everywhere.
    No gradient flows to keys. Returns a scalar in nats: log(K + 1) for a collapsed encoder.
    Source: He et al. 2020 (MoCo), eq. 1 and algorithm 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = _unit(query), _unit(key.detach())
        own = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat([own, query @ queue.to(query.dtype).T], dim=1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def bank_cosines(queries: list[Tensor], key: Tensor, queue: Tensor) -> list[Tensor]:
    """How near each query is to every key there is: those of the batch, of all processes, and the queue's.

    queries: (B, D) each; key: (B, D); any scale, row i of all comes from image i. queue: (K, D), unit rows, the same
    everywhere. Returns (B, R B + K) cosines for each of the queries. No gradient flows to keys.
    """
    with torch.autocast(key.device.type, enabled=False):
        key = gather(_unit(key.detach()))
        bank = torch.cat([key, queue.to(key.dtype)])
        return [_unit(query) @ bank.T for query in queries]


def bank_contrast(cosines: list[Tensor], *, temperature: float) -> Tensor:
    """How hard it is to pick each query's own key out of the bank.

    cosines: (B, R B + K) of each view, from bank_cosines. Returns the mean over views and queries, in nats:
    log(R B + K) for a collapsed encoder.
    Source: Wang & Qi 2021 (CLSA, arXiv 2104.07713), with the keys of the whole batch in the bank as in its code.
    """
    count = len(cosines[0])
    own = place()[0] * count + torch.arange(count, device=cosines[0].device)
    return torch.stack([F.cross_entropy(each / temperature, own) for each in cosines]).mean()


def distribution_matching(weak: list[Tensor], strong: list[Tensor], *, temperature: float) -> Tensor:
    """How badly a strong view's distribution over the bank predicts a weak one's, which is taken as constant.

    weak, strong: (B, N) cosines of each view, from bank_cosines. Returns the mean over all pairs of a weak and a strong
    view and over images of -sum_j p_weak,j log p_strong,j, in nats: log(N) where both are uniform, never below the mean
    entropy of the weak distributions.
    Source: Wang & Qi 2021 (CLSA, arXiv 2104.07713), distributional divergence minimisation.
    """
    # A sum over pairs is linear in the weak distributions: their mean meets each strong one once.
    target = torch.stack([F.softmax(each.detach() / temperature, dim=1) for each in weak]).mean(dim=0)
    return -torch.stack([(target * F.log_softmax(each / temperature, dim=1)).sum(dim=1) for each in strong]).mean()


def regression(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos: 0 where they are parallel, 4 where they are opposite.

    predicted, target: (B, D), any scale. No gradient flows to the target.
    Source: Grill et al. 2020 (BYOL), eq. 2; one direction of two.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        return (2 - 2 * (_unit(predicted) * _unit(target.detach())).sum(dim=1)).mean()


def _against_all(mine: Tensor) -> Tensor:
    """(V, B, D) unit rows -> (V B, V R B): each row by the rows of all processes, both a view after another."""
    everyone = gather(mine.transpose(0, 1)).transpose(0, 1)  # (V, R B, D)
    return mine.flatten(0, 1) @ everyone.flatten(0, 1).T


def _own_columns(mine: Tensor) -> Tensor:
    """(V B,): the column of _against_all that each row is itself."""
    views, count, _ = mine.shape
    rank, ranks = place()
    row = torch.arange(count, device=mine.device) + rank * count
    return (row + ranks * count * torch.arange(views, device=mine.device)[:, None]).flatten()


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(exact(vectors), dim=-1)


def homologous_contrast(tokens: Tensor, source: Tensor, *, temperature: float) -> Tensor:
    """How hard it is to tell, in a mixed picture, which other patches come from the same source as each patch does.

    tokens: (B, N, D), any scale; source: (N,) int64, the picture that each place of the sequence comes from, of each at
    least two. Returns a scalar in nats: log(N - 1) for equal tokens. Mixed pictures are not compared with one another.
    Source: MixedAE (Chen et al. 2023, arXiv 2303.17152), with the positives of SupCon's "out" form.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        unit = _unit(tokens)
        logits = unit @ unit.transpose(1, 2) / temperature  # (B, N, N)
    oneself = torch.eye(len(source), dtype=torch.bool, device=source.device)
    positive = (source[:, None] == source[None, :]) & ~oneself
    likelihood = logits.masked_fill(oneself, float("-inf")).log_softmax(dim=-1)
    return -(likelihood.masked_fill(~positive, 0.0).sum(dim=-1) / positive.sum(dim=-1)).mean()


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, rounds: int) -> Tensor:
    """Share the batch out among the prototypes: equally much to each, as near to the scores as that allows.

    scores: (B, K) similarities, this process' rows; sums run over the rows of all. Returns (B, K) codes that sum to 1
    in each row and, the more rounds the nearer, to B / K in each column.
    Source: SwAV (Caron et al. 2020, arXiv 2006.09882), section 3.1 and its code.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = exact(scores) / epsilon
        codes = (scores - largest_of_all(scores.max())).exp()  # at epsilon 0.05 exp(1 / epsilon) alone is 5e8
        least = torch.finfo(codes.dtype).tiny  # what underflows as a whole is left out: 0, not 0 / 0
        for _ in range(rounds):
            codes = codes / total(codes.sum(dim=0)).clamp_min(least)
            codes = codes / codes.sum(dim=1, keepdim=True).clamp_min(least)
    return codes


def swapped_prediction(scores: list[Tensor], codes: list[Tensor], *, temperature: float) -> Tensor:
    """How badly each view predicts the codes of the other views.

    scores: (B, K) of every view, those that have codes first; codes: (B, K) of these, taken as constant. Returns the
    mean cross-entropy over all pairs of a coded view and another one, in nats: log(K) where nothing is predicted.
    Source: SwAV (Caron et al. 2020, arXiv 2006.09882), eq. 2 and section 3.2 (multi-crop).
    """
    sums = []
    for view, score in enumerate(scores):
        targets = torch.stack([code.detach() for other, code in enumerate(codes) if other != view]).sum(dim=0)
        likelihood = F.log_softmax(exact(score) / temperature, dim=-1)
        sums.append(-(targets * likelihood).sum(dim=-1).mean())
    return torch.stack(sums).sum() / (len(codes) * (len(scores) - 1))


def normalise_patches(patches: Tensor) -> Tensor:
    """(…, P): each patch to mean 0 and variance 1 over its P values, unbiased variance as in MAE's code."""
    # Relative to the first value a constant patch is exactly 0, not the mean's rounding error a thousandfold.
    patches = patches - patches[..., :1]
    patches = patches - patches.mean(dim=-1, keepdim=True)
    # Tensor.var of the same takes three times as long on a CPU.
    variance = patches.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return patches / (variance + 1e-6).sqrt()


def masked_mse(predicted: Tensor, patches: Tensor, *, norm_pix: bool) -> Tensor:
    """Mean squared error over the values of hidden patches.

    predicted, patches: (B, M, P), hidden patches only. With norm_pix each target patch is normalised by itself; a
    prediction of 0 then costs (P - 1) / P. Source: He et al. 2021, section 3 ("reconstruction target").
    """
    with torch.autocast(predicted.device.type, enabled=False):
        predicted = exact(predicted)
        target = patches.to(predicted.dtype)
        return F.mse_loss(predicted, normalise_patches(target) if norm_pix else target)
