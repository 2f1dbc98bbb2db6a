"""How good are features? Neighbours, ridge and logistic regression, MAE's linear probe: pure functions on tensors.

A bank of labelled features answers for queries; a query's own label is never seen here, only `accuracy` reads it.
Features are of any float type and may be a file mapped into memory: they are read in blocks. Labels are (N,) int64 in
range(classes), -1 where unknown: such rows of a bank are left out. Work is done on the bank's device, and predictions
come back on the query's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import DataError, ResourceError
from pipeline.sampling import epoch_order
from train.config import Optim
from train.schedule import learning_rate

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-8, 9))
LOGISTIC_PENALTIES = tuple(10.0**power for power in range(-4, 1))
FOLDS = 5
FOLD_ROWS = 2048  # more folds than five once they grow larger than this: the cost is rows times rows of a fold
BLOCK = 2**26  # numbers in the largest temporary table, 256 MB in float32
ROWS = 2**14  # of a bank that neighbours are looked for in at once


@dataclass(frozen=True, slots=True)
class Score:
    """A share of right answers, with the standard error that `count` questions leave."""

    value: float
    standard_error: float
    count: int


def accuracy(predicted: Tensor, truth: Tensor) -> Score:
    """Top-1 over the rows whose truth is known (not -1); standard error sqrt(p (1 - p) / n). Raises DataError."""
    known = truth >= 0
    count = int(known.sum())
    if not count:
        raise DataError("no picture to be scored has a label among the classes that are known. Choose another label.")
    value = int((predicted[known] == truth[known]).sum()) / count
    return Score(value, math.sqrt(value * (1 - value) / count), count)


def match_labels(bank_classes: Sequence[str], test_classes: Sequence[str], test_label: Tensor) -> Tensor:
    """A test set's labels renumbered as the bank numbers the classes of the same name; -1 where it has none."""
    place = {name: number for number, name in enumerate(bank_classes)}
    # One more entry at the end: label -1 finds it.
    table = torch.tensor([place.get(name, -1) for name in test_classes] + [-1], dtype=torch.int64)
    return table[test_label.long().cpu()].to(test_label.device)


def neighbours(
    bank: Tensor, query: Tensor, k: int, *, rows: int = ROWS, queries: int = BLOCK // ROWS
) -> tuple[Tensor, Tensor]:
    """Cosines with the k nearest rows of the bank and the places of these, both (Q, k), nearest first.

    bank: (N, D), query: (Q, D), any scale; k is cut to N. The bank is read once, `rows` at a time, for `queries` at
    once, which changes the result only by rounding. Beside bank and query this takes at most

        4 rows queries + 8 rows D + 8 Q D + 16 Q k + 24 queries k  bytes:

    0.7 GB for 50,000 queries, 20 neighbours and 768 features, however large the bank is; with ImageNet-1K's 1.28 M
    pictures in float16 that one takes 2 GB more, of a file's pages that the system may give up.
    """
    k, device = min(k, len(bank)), bank.device
    query = F.normalize(query.to(device).float(), dim=1)
    best = torch.full((len(query), k), -math.inf, device=device)
    place = torch.zeros(len(query), k, dtype=torch.int64, device=device)
    for first, part in zip(range(0, len(bank), rows), bank.split(rows), strict=True):
        part = F.normalize(part.float(), dim=1)
        for some in range(0, len(query), queries):
            asked = slice(some, some + queries)
            near, where = (query[asked] @ part.T).topk(min(k, len(part)), dim=1)
            near, where = torch.cat([best[asked], near], dim=1), torch.cat([place[asked], where + first], dim=1)
            best[asked], chosen = near.topk(k, dim=1)
            place[asked] = where.gather(1, chosen)
    return best, place


def vote(near: Tensor, label: Tensor, *, temperature: float = 0.07, classes: int) -> Tensor:
    """The class with the most votes of the neighbours, a vote weighing exp(cosine / temperature), (Q,) int64.

    near: (Q, k) cosines, nearest first; label: (Q, k), all known. temperature inf is a majority vote, and the lowest
    class wins a tie. Source: Wu et al. 2018 (InstDisc), section 3.4, as in DINO's eval_knn.py.
    """
    predicted, chunk = [], max(1, BLOCK // classes)
    for cosine, answer in zip(near.split(chunk), label.split(chunk), strict=True):
        # All votes for one query divided by that of its nearest: the winner is the same, and nothing overflows.
        weight = torch.exp((cosine - cosine[:, :1]) / temperature)
        votes = weight.new_zeros(len(cosine), classes).scatter_add_(1, answer, weight)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a probe says whose penalty was chosen on the bank."""

    predicted: Tensor  # (Q,) int64
    penalty: float  # the one chosen, relative to the mean variance of a feature
    bank_score: float  # its cross-validated accuracy on the bank, by which it was chosen
    shares: Tensor | None = None  # (Q, C) float64, how likely each class is, where the probe tells


def ridge(
    bank: Tensor,
    bank_label: Tensor,
    query: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    groups: Tensor | None = None,
    seed: int = 0,
) -> Tuned:
    """One-vs-all ridge regression in closed form: for each class, is it this one? The largest answer wins.

    bank: (N, D), query: (Q, D). Features are standardised by the bank's mean and deviation (a constant one drops out),
    targets are one-hot, the intercept is free, all in float64. Minimises, summed over classes,
        |Y - X W - b|^2 + penalty N v |W|^2    where v is the mean variance of the standardised features: 1 unless
    some are constant. The penalty is the one with the best cross-validated accuracy on the bank, the larger of two
    equal ones; `groups`, (N,) int, are kept together in one fold each: give pictures of one thing the same number.
    penalties: positive. Time goes with min(N, D)^3 once, and with N D min(N, D).

    Raises DataError where fewer than two rows, or groups, have a label.
    Sources: Hoerl & Kennard 1970; leaving out a fold without a new fit: Cook & Weisberg 1982, section 2.2.
    """
    known = bank_label >= 0
    groups = None if groups is None else groups.to(known.device)[known]
    bank, label = _known(bank, bank_label)
    parts = folds(len(bank), groups, seed)
    fit = _Ridge(bank, label, classes)
    right = dict.fromkeys(penalties, 0)
    for part in parts:
        for penalty, answer in zip(penalties, fit.held_out(part, penalties), strict=True):
            right[penalty] += int((answer.argmax(dim=1) == label[part.to(label.device)]).sum())
    penalty = max(penalties, key=lambda each: (right[each], each))
    return Tuned(fit.predict(query, penalty), penalty, right[penalty] / len(label))


def folds(count: int, groups: Tensor | None, seed: int) -> list[Tensor]:
    """Rows of each fold of a bank, int64: five, or more of about 2,048 rows; a group lies in one of them.

    A pure function of its arguments: groups, or rows where there are none, are dealt out in a hashed order.
    """
    if groups is None:
        number, member = count, torch.arange(count)
    else:
        names, member = groups.cpu().unique(return_inverse=True)
        number = len(names)
    if number < 2:
        raise DataError(f"cross-validation needs at least 2 labelled pictures of different groups, there are {number}.")
    hands = min(number, max(FOLDS, -(-count // FOLD_ROWS)))
    fold = torch.empty(number, dtype=torch.int64)
    fold[torch.from_numpy(epoch_order(seed, 0, number))] = torch.arange(number) % hands
    order = fold[member]
    return [(order == hand).nonzero()[:, 0] for hand in range(hands)]


class _Standard:
    """Features at mean 0 and variance 1 over a bank, in float64; one that is constant there becomes 0."""

    def __init__(self, bank: Tensor):
        count, width = bank.shape
        self.mean = torch.stack([rows.double().sum(dim=0) for rows in _blocks(bank, width)]).sum(dim=0) / count
        square = [(rows.double() - self.mean).square().sum(dim=0) for rows in _blocks(bank, width)]
        deviation = (torch.stack(square).sum(dim=0) / count).sqrt()
        # float32 features that are equal in truth differ in their last digit, and must not be blown up to variance 1.
        self.scale = torch.where(deviation <= 1e-6 * self.mean.abs(), 0.0, 1 / deviation)

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows.to(self.mean.device).double() - self.mean) * self.scale


def _blocks(rows: Tensor, width: int) -> Sequence[Tensor]:
    """Rows in parts of which each, with `width` float64 numbers a row, is no larger than a block."""
    return rows.split(max(1, BLOCK // (2 * width)))


class _Ridge:
    """Standardised features in the basis of their covariance's eigenvectors, where every penalty is a division."""

    def __init__(self, bank: Tensor, label: Tensor, classes: int):
        self.bank, self.label, self.classes = bank, label, classes
        count, width = bank.shape
        self.standard, self.widest = _Standard(bank), max(width, classes)
        if count < width:  # the smaller of the two products, which have the same eigenvalues
            rows = self.standard(bank)
            self.value, vector = _positive(*torch.linalg.eigh(rows @ rows.T))
            self.basis = rows.T @ (vector / self.value.sqrt())
        else:
            product = torch.zeros(width, width, dtype=torch.float64, device=bank.device)
            for rows in map(self.standard, _blocks(bank, width)):
                product.addmm_(rows.T, rows)
            self.value, self.basis = _positive(*torch.linalg.eigh(product))
        self.unit = self.value.sum() / width  # N v
        self.share = torch.bincount(label, minlength=classes).double() / count  # (C,), mean of the targets
        summed = torch.zeros(width, classes, dtype=torch.float64, device=bank.device)  # X^T Y
        for rows, answers in zip(_blocks(bank, self.widest), _blocks(label, self.widest), strict=True):
            summed.index_add_(1, answers, self.standard(rows).T)
        self.moment = self.basis.T @ summed  # (R, C), Z^T Y

    def held_out(self, part: Tensor, penalties: Sequence[float]) -> Iterator[Tensor]:
        """For each penalty, (n, C): what the fit without the rows `part` of the bank says of them.

        H = 1/N + Z (Z^T Z + penalty)^-1 Z^T takes targets to fitted values. With H_FF its block of a fold and r the
        fold's residuals in the fit of everything, the residuals without the fold are (1 - H_FF)^-1 r, exactly. The
        penalty counts the rows that are left: half of a bank is to be fitted as strictly a row as the whole of it.
        """
        part = part.to(self.bank.device)
        z = self.standard(self.bank[part]) @ self.basis
        target = F.one_hot(self.label[part], self.classes).double()
        left = 1 - len(part) / len(self.bank)
        for penalty in penalties:
            shrunk = 1 / (self.value + penalty * left * self.unit)
            residual = target - self.share - z @ (shrunk[:, None] * self.moment)
            rest = -(z * shrunk) @ z.T - 1 / len(self.bank)
            rest.diagonal().add_(1)
            yield target - torch.cholesky_solve(residual, torch.linalg.cholesky(rest))

    def predict(self, query: Tensor, penalty: float) -> Tensor:
        """(Q,) int64 on the query's device, by the fit of the whole bank."""
        weight = self.basis @ (self.moment / (self.value + penalty * self.unit)[:, None])  # (D, C)
        parts = [
            (self.standard(rows) @ weight + self.share).argmax(dim=1).to(query.device)
            for rows in _blocks(query, self.widest)
        ]
        return torch.cat(parts)


def _positive(value: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues that are more than rounding, and their vectors. No penalty in use lets the others matter."""
    kept = value > value[-1] * 1e-13
    return value[kept], vector[:, kept]


def logistic(
    bank: Tensor,
    bank_label: Tensor,
    query: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = LOGISTIC_PENALTIES,
    groups: Tensor | None = None,
    seed: int = 0,
) -> Tuned:
    """Multinomial logistic regression with an L2 penalty.

    bank: (N, D), query: (Q, D), standardised as for ridge. Minimises, with a free intercept, the mean over the rows of
        -log softmax(x W + b)[label] + penalty / 2 |W|^2, so that scikit-learn's C is 1 / (N penalty).
    The penalty is chosen as ridge chooses its own, on the same folds, of which the first five are enough: each is
    fitted anew, from the strongest penalty to the weakest, each starting where the one before it ended.

    Raises DataError where fewer than two rows, or groups, have a label.
    """
    known = bank_label >= 0
    groups = None if groups is None else groups.to(known.device)[known]
    bank, label = _known(bank, bank_label)
    fit, right = _Logistic(bank, label, classes), dict.fromkeys(penalties, 0)
    parts = folds(len(bank), groups, seed)[:FOLDS]
    for part in parts:
        part = part.to(bank.device)
        rest = torch.ones(len(bank), dtype=torch.bool, device=bank.device).index_fill_(0, part, False)
        weight, others, answers = None, bank[rest], label[rest]
        for penalty in sorted(penalties, reverse=True):
            # A hundredth of the derivatives that weights of zero have: whoever is right by then stays so.
            weight = fit.weights(others, answers, penalty, start=weight, tolerance=0.01 / classes)
            right[penalty] += int((fit.shares(bank[part], weight).argmax(dim=1) == label[part]).sum())
    penalty = max(penalties, key=lambda each: (right[each], each))
    shares = fit.shares(query, fit.weights(bank, label, penalty)).to(query.device)
    return Tuned(shares.argmax(dim=1), penalty, right[penalty] / sum(map(len, parts)), shares)


class _Logistic:
    """Weights are (D + 1, C) float64, the intercept last."""

    def __init__(self, bank: Tensor, label: Tensor, classes: int):
        self.standard, self.classes, self.widest = _Standard(bank), classes, max(bank.shape[1], classes)

    def weights(
        self,
        bank: Tensor,
        label: Tensor,
        penalty: float,
        *,
        start: Tensor | None = None,
        tolerance: float | None = None,
    ) -> Tensor:
        """The minimum, by L-BFGS until no derivative is larger than `tolerance`, or after 1,000 steps.

        Weights then differ from the best by at most the derivatives' norm over the penalty; hence a tolerance of a
        ten-thousandth of the penalty, or a millionth if that is less, where none is given.
        """
        if start is None:
            start = torch.zeros(bank.shape[1] + 1, self.classes, dtype=torch.float64, device=bank.device)
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=1000, tolerance_grad=min(1e-4 * penalty, 1e-6) if tolerance is None else tolerance,
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            value, weight.grad = self._loss(bank, label, weight.detach(), penalty)
            return value

        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
        return weight.detach()

    def _loss(self, bank: Tensor, label: Tensor, weight: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """The value to minimise and its gradient, block by block."""
        value, slope = weight.new_zeros(()), torch.zeros_like(weight)
        for rows, answers in zip(_blocks(bank, self.widest), _blocks(label, self.widest), strict=True):
            rows = self.standard(rows)
            log_share = torch.addmm(weight[-1], rows, weight[:-1]).log_softmax(dim=1)
            value -= log_share.gather(1, answers[:, None]).sum()
            off = log_share.exp_().scatter_add_(1, answers[:, None], -torch.ones_like(log_share[:, :1]))
            slope[:-1].addmm_(rows.T, off)
            slope[-1] += off.sum(dim=0)
        value, slope = value / len(bank), slope / len(bank)
        slope[:-1] += penalty * weight[:-1]
        return value + penalty / 2 * weight[:-1].square().sum(), slope

    def shares(self, query: Tensor, weight: Tensor) -> Tensor:
        """(Q, C) float64 of each class, summing to 1."""
        parts = [
            torch.addmm(weight[-1], self.standard(rows), weight[:-1]).softmax(dim=1)
            for rows in _blocks(query, self.widest)
        ]
        return torch.cat(parts)


def linear_probe(
    bank: Tensor,
    bank_label: Tensor,
    query: Tensor,
    *,
    classes: int,
    epochs: int = 90,
    warmup_epochs: float = 10.0,
    batch: int = 16384,
    base_lr: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """MAE's linear probe on cached features: batch norm without parameters, one linear layer, LARS.

    bank: (N, D), query: (Q, D), of the central square. bank_label: (N,).
    batch is cut to the labelled rows, images left over are dropped, and the rate is base_lr batch / 256.
    Returns (Q,) int64. A pure function of its arguments on a CPU.

    LARS moves a matrix by a share of its own norm, in sum over a run at most about 2e-6 rows epochs of it, whatever
    the batch: 225 times on ImageNet-1K, which is plenty, but 0.7 times for 4,000 rows at 90 epochs, which stops well
    short. Few rows need more epochs (about 1,000 for 4,000 rows), cheap on cached features; there is no penalty, so
    far too many overfit.

    Raises DataError (fewer than two labelled rows), ResourceError (timm is not installed).
    Source: He et al. 2021, appendix A.1 and main_linprobe.py.
    """
    known = (bank_label >= 0).nonzero()[:, 0]
    if len(known) < 2:
        raise DataError(f"a linear probe needs at least 2 labelled pictures, there are {len(known)}.")
    device = bank.device
    known, label = known.to(device), bank_label.to(device)
    batch = min(batch, len(known))
    per_epoch = len(known) // batch
    steps, optim = epochs * per_epoch, Optim(batch=batch, base_lr=base_lr, min_lr=0.0)
    norm, linear = probe_layers(bank.shape[1], classes, seed)
    probe = nn.Sequential(norm, linear).to(device).train()
    optimizer = lars(linear)
    for epoch in range(epochs):
        order = known[torch.from_numpy(epoch_order(seed, epoch, len(known))).to(device)]
        for place in range(per_epoch):
            rows = order[place * batch : (place + 1) * batch]
            rate = learning_rate(optim, epoch * per_epoch + place, steps, warmup_epochs * per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.enable_grad():
                loss = F.cross_entropy(probe(bank[rows].detach().float()), label[rows])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    probe.eval()
    with torch.no_grad():
        parts = [probe(rows.to(device).float()).argmax(dim=1).to(query.device) for rows in query.split(batch)]
    return torch.cat(parts)


def probe_layers(width: int, classes: int, seed: int) -> tuple[nn.BatchNorm1d, nn.Linear]:
    """What the probe trains: a norm without parameters, and a layer with weights N(0, 0.01^2) and bias 0."""
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
    # nn.Linear's own start would draw from the global generator, which belongs to training.
    linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, width, classes))
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return norm, linear


def lars(linear: nn.Linear) -> torch.optim.Optimizer:
    """LARS as in MAE's util/lars.py: momentum 0.9, trust 0.001, no decay; a bias takes plain momentum steps.

    timm leaves the trust ratio out where there is no decay unless told otherwise, and adds an eps that MAE has not.
    Source: You et al. 2017. Raises ResourceError.
    """
    try:
        from timm.optim.lars import Lars
    except ImportError as error:
        raise ResourceError(f"the linear probe needs {error.name}, which is not installed. Run `make setup`.") from None
    rule = {"momentum": 0.9, "weight_decay": 0.0, "trust_coeff": 0.001, "eps": 0.0, "trust_clip": False}
    matrix = {"params": [linear.weight], "always_adapt": True, **rule}
    vector = {"params": [linear.bias], "always_adapt": False, **rule}
    return Lars([matrix, vector], lr=0.0)  # the probe sets the rate of every step


def _known(features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled rows. Raises DataError where there are none."""
    known = label >= 0
    if not known.any():
        raise DataError("no picture of the bank has a label. Choose another label column.")
    if known.all():  # a large bank is not copied
        return features, label.long().to(features.device)
    return features[known.to(features.device)], label[known].long().to(features.device)
