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


def nt_xent(one: Tensor, other: Tensor, *, temperature: float) -> float:
    """Chen et al. 2020, algorithm 1: z_(2k-1), z_2k are the views of image k; l(i, j) = -log( exp(s_ij) / sum over all
    m but i of exp(s_im) ), averaged over both orders of every pair."""
    z = [row for pair in zip(one, other, strict=True) for row in pair]
    total = 0.0
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        among = sum(math.exp(cosine(z[i], z[m]) / temperature) for m in range(len(z)) if m != i)
        total -= math.log(math.exp(cosine(z[i], z[j]) / temperature) / among)
    return total / len(z)


def sup_con(features: Tensor, label: Tensor, *, temperature: float) -> float:
    """Khosla et al. 2020, eq. 2: -1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{a != i} exp(s_ia) ), averaged over i.

    features: (V, B, D). Anchors i without a positive are left out.
    """
    z = [(row, int(label[b])) for view in features for b, row in enumerate(view)]
    losses = []
    for i, (anchor, mine) in enumerate(z):
        among = sum(math.exp(cosine(anchor, row) / temperature) for a, (row, _) in enumerate(z) if a != i)
        positives = [row for p, (row, theirs) in enumerate(z) if p != i and theirs == mine]
        if positives:
            terms = [math.log(math.exp(cosine(anchor, row) / temperature) / among) for row in positives]
            losses.append(-sum(terms) / len(positives))
    return sum(losses) / len(losses)


def queue_info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> float:
    """He et al. 2020, eq. 1: -mean_i log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) ), k_j: k_i and the queue."""
    total = 0.0
    for q, k in zip(query, key, strict=True):
        own = math.exp(cosine(q, k) / temperature)
        total -= math.log(own / (own + sum(math.exp(cosine(q, row) / temperature) for row in queue)))
    return total / len(query)


def bank_distribution(query: Tensor, bank: Tensor, *, temperature: float) -> list[float]:
    """Wang & Qi 2021 (CLSA): p(z_k | z) = exp(z z_k / tau) / sum_l exp(z z_l / tau) over the bank."""
    near = [math.exp(cosine(query, k) / temperature) for k in bank]
    return [each / sum(near) for each in near]


def bank_contrast(weak: list[Tensor], key: Tensor, queue: Tensor, *, temperature: float) -> float:
    """Wang & Qi 2021 (CLSA), the bank being the batch's keys and the queue: -mean log p(k_i | q_i), over views q
    and images i."""
    bank = torch.cat([key.double(), queue.double()])
    likely = [bank_distribution(q, bank, temperature=temperature)[i] for view in weak for i, q in enumerate(view)]
    return -sum(math.log(each) for each in likely) / len(likely)


def distribution_matching(
    weak: list[Tensor], strong: list[Tensor], key: Tensor, queue: Tensor, *, temperature: float
) -> float:
    """Wang & Qi 2021 (CLSA): -sum_k p(z_k | z_weak) log p(z_k | z_strong), averaged over all pairs of a
    weak and a strong view, and over images."""
    bank, total = torch.cat([key.double(), queue.double()]), 0.0
    for one in weak:
        for other in strong:
            for w, s in zip(one, other, strict=True):
                p, q = (bank_distribution(each, bank, temperature=temperature) for each in (w, s))
                total -= sum(p[k] * math.log(q[k]) for k in range(len(bank)))
    return total / (len(weak) * len(strong) * len(key))


def regression(predicted: Tensor, target: Tensor) -> float:
    """Grill et al. 2020, eq. 2: mean_i || p_i / |p_i| - z_i / |z_i| ||^2."""
    total = 0.0
    for p, z in zip(predicted.double(), target.double(), strict=True):
        p, z = p / math.sqrt(float(p @ p)), z / math.sqrt(float(z @ z))
        total += float((p - z) @ (p - z))
    return total / len(predicted)


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


def noise_level(sigma: float, *, width: int) -> list[float]:
    """Mishra et al. 2022 (CAN), as in its code: sin(sigma w_i), then cos(sigma w_i), w_i = 10000^(-i/(width/2 - 1))."""
    w = [10000 ** (-i / (width // 2 - 1)) for i in range(width // 2)]
    return [math.sin(sigma * each) for each in w] + [math.cos(sigma * each) for each in w]


def can(
    z: tuple[Tensor, Tensor],
    views: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    *,
    temperature: float,
    contrast_weight: float,
    noise_weight: float,
) -> float:
    """Mishra et al. 2022 (CAN): w_c L_con + (1 - w_c) [ (1 - w_n) L_rec + w_n L_noise ].

    z: (B, D) of both views. views: of each the prediction, the clean pixels and the noise, (B, N, P), and what is
    hidden, (B, N) bool. L_rec is over all hidden patches of both views, L_noise over all others.
    """
    predicted, pixels, noise, hidden = (torch.cat(each) for each in zip(*views, strict=True))
    rec = masked_mse(predicted, pixels, hidden, norm_pix=False)
    found = masked_mse(predicted, noise, ~hidden, norm_pix=False)
    w_c, w_n = contrast_weight, noise_weight
    return w_c * nt_xent(*z, temperature=temperature) + (1 - w_c) * ((1 - w_n) * rec + w_n * found)


def homologous_contrast(tokens: Tensor, source: list[int], *, temperature: float) -> float:
    """Chen et al. 2023 (MixedAE), over the tokens of one mixed picture: for each token i the mean over all others j of
    the same source of -log( exp(s_ij) / sum_{a != i} exp(s_ia) ), s cosine over temperature; then the mean over i.
    """
    total, count = 0.0, len(tokens)
    for i in range(count):
        scores = [cosine(tokens[i], tokens[j]) / temperature for j in range(count)]
        others = math.log(sum(math.exp(scores[a]) for a in range(count) if a != i))
        same = [j for j in range(count) if j != i and source[j] == source[i]]
        total += sum(others - scores[j] for j in same) / len(same)
    return total / count


def sinkhorn(scores: Tensor, *, epsilon: float, rounds: int) -> Tensor:
    """Caron et al. 2020 (SwAV), listing in appendix A. scores: (B, K). Returns (B, K) float64."""
    q = torch.exp(scores.double() / epsilon).T
    q = q / q.sum()
    count, batch = q.shape
    for _ in range(rounds):
        for k in range(count):
            q[k] = q[k] / q[k].sum() / count
        for b in range(batch):
            q[:, b] = q[:, b] / q[:, b].sum() / batch
    return (q * batch).T


def swapped_prediction(scores: list[Tensor], codes: list[Tensor], *, temperature: float) -> float:
    """Caron et al. 2020 (SwAV), eq. 2 with multi-crop: view v's code q_v predicted from every other view u, as the mean
    over v and u != v of -sum_k q_vk log( exp(s_uk / T) / sum_l exp(s_ul / T) ), and over images."""
    total, terms = 0.0, 0
    for v, code in enumerate(codes):
        for u, score in enumerate(scores):
            if u != v:
                for q, s in zip(code.double(), score.double() / temperature, strict=True):
                    partition = math.log(sum(math.exp(float(each)) for each in s))
                    total += sum(float(q[k]) * (partition - float(s[k])) for k in range(len(s)))
                    terms += 1
    return total / terms
