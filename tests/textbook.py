"""Formulas as their papers print them: slow, in float64, with loops where the paper has a sum.

Tests compare the fast versions with these. Nothing here imports the program.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# --- Evaluation: neighbours, ridge regression, LARS -----------------------------------------------------------------


def weighted_knn(bank: Tensor, bank_label: Tensor, query: Tensor, *, k: int, temperature: float) -> list[int]:
    """Wu et al. 2018, section 3.4: s_j = cos(f, f_j), the k largest vote for their class with weight exp(s_j / T)."""
    answers = []
    for f in query.double():
        similar = []
        for j, g in enumerate(bank.double()):
            similar.append((float(f @ g) / math.sqrt(float(f @ f) * float(g @ g)), int(bank_label[j])))
        votes: dict[int, float] = {}
        for s, label in sorted(similar, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(s / temperature)
        answers.append(max(votes, key=lambda label: votes[label]))
    return answers


def majority_knn(bank: Tensor, bank_label: Tensor, query: Tensor, *, k: int) -> list[int]:
    """Cover & Hart 1967, k nearest by cosine: the most frequent class among them, the lowest where several are."""
    answers = []
    for f in query.double():
        cosine = [float(f @ g) / math.sqrt(float(f @ f) * float(g @ g)) for g in bank.double()]
        nearest = sorted(range(len(bank)), key=lambda j: -cosine[j])[:k]
        labels = [int(bank_label[j]) for j in nearest]
        answers.append(max(sorted(set(labels)), key=labels.count))
    return answers


def ridge_scores(bank: Tensor, target: Tensor, query: Tensor, *, penalty: float) -> Tensor:
    """Hoerl & Kennard 1970 with a free intercept: [W; b] = (A^T A + penalty diag(1, ..., 1, 0))^-1 A^T Y, A = [X, 1].

    bank: (N, D), target: (N, C), query: (Q, D), all as they are: standardise before. Returns (Q, C) float64.
    """
    a = torch.cat([bank.double(), torch.ones(len(bank), 1, dtype=torch.float64)], dim=1)
    punished = torch.eye(a.shape[1], dtype=torch.float64)
    punished[-1, -1] = 0
    solution = torch.linalg.solve(a.T @ a + penalty * punished, a.T @ target.double())
    return query.double() @ solution[:-1] + solution[-1]


def lars_step(
    weight: Tensor, gradient: Tensor, momentum_buffer: Tensor, *, lr: float, momentum: float = 0.9, trust: float = 0.001
) -> tuple[Tensor, Tensor]:
    """You et al. 2017, without weight decay, as in MAE's util/lars.py; a vector is not scaled.

    Returns the weight and the momentum buffer after the step; the buffer starts as zeros.
    """
    if weight.ndim > 1:
        weight_norm = math.sqrt(float((weight.double() ** 2).sum()))
        gradient_norm = math.sqrt(float((gradient.double() ** 2).sum()))
        if weight_norm > 0 and gradient_norm > 0:
            gradient = gradient * (trust * weight_norm / gradient_norm)
    momentum_buffer = momentum * momentum_buffer + gradient
    return weight - lr * momentum_buffer, momentum_buffer


# --- Losses ----------------------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def info_nce(query: Tensor, key: Tensor, *, temperature: float) -> float:
    """van den Oord et al. 2018, eq. 4: -mean_i log( exp(s_ii) / sum_j exp(s_ij) ), s cosine over temperature."""
    total = 0.0
    for i in range(len(query)):
        scores = [cosine(query[i], key[j]) / temperature for j in range(len(key))]
        total += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    return total / len(query)


def masked_mse(predicted: Tensor, target: Tensor, hidden: Tensor, *, norm_pix: bool) -> float:
    """He et al. 2021: squared error of each hidden patch, averaged over its values, then over all hidden patches.

    predicted, target: (B, N, P); hidden: (B, N) bool. The variance of a patch is the unbiased one.
    """
    total, count = 0.0, 0
    for b in range(target.shape[0]):
        for n in range(target.shape[1]):
            if hidden[b, n]:
                t, y = target[b, n].double(), predicted[b, n].double()
                if norm_pix:
                    mean = t.sum() / len(t)
                    variance = ((t - mean) ** 2).sum() / (len(t) - 1)
                    t = (t - mean) / (variance + 1e-6) ** 0.5
                total += float(((y - t) ** 2).sum()) / len(t)
                count += 1
    return total / count
