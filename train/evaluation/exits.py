"""What the exits of an encoder are worth beside its end, and all of them together: SelfCon's ensemble.

Bae et al. 2021, arXiv 2106.15499: classifiers on exit and trunk each by itself, and the mean of their answers.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.objectives import Objective
from pipeline.errors import UsageError
from pipeline.sampling import View
from pipeline.store import Store
from pipeline.views import Patches
from train.device import autocast
from train.evaluation import probes
from train.evaluation.exam import Exam, mark
from train.evaluation.features import one_pass
from train.evaluation.featurise import centre_share

if TYPE_CHECKING:
    from model.network import Network
    from train.config import Run

ENSEMBLE = "ensemble"


def score_exits(network: Network, settings: Run, exam: Exam, device: torch.device) -> dict[str, dict[str, dict]]:
    """Test -> "trunk", every exit, "ensemble" -> {value, standard_error, count} on the leading column, each by logistic
    regression; the ensemble answers what the mean of their softmaxes says.

    Raises UsageError where the run's method has no exits.
    """
    if type(settings.method).exits is Objective.exits:
        raise UsageError(f"--exits: method {settings.objective} has none; selfcon has.")
    ids, label = exam.training(exam.leading)
    bank, groups = _features(network, settings, exam.bank, ids, device), exam.fold_groups(exam.leading)
    classes, groups = len(exam.bank.columns[exam.leading]), None if groups is None else groups[ids]
    asked = {name: exam.questions(name, exam.leading) for name in exam.tests}
    queries = [_features(network, settings, exam.tests[name], wanted, device) for name, (wanted, _) in asked.items()]
    shares = {  # one fit for all tests
        part: _shares(bank[part], label, torch.cat([each[part] for each in queries]), classes=classes, groups=groups)
        for part in bank
    }
    shares[ENSEMBLE] = torch.stack(list(shares.values())).mean(dim=0)
    answers = {part: each.argmax(dim=1) for part, each in shares.items()}
    marks = mark(answers, {name: truth for name, (_, truth) in asked.items()})
    return {name: {part: asdict(score) for part, score in one.items()} for name, one in marks.items()}


def _shares(bank: Tensor, label: Tensor, query: Tensor, *, classes: int, groups: Tensor | None) -> Tensor:
    """(Q, C): how likely logistic regression holds each class."""
    shares = probes.logistic(bank, label, query, classes=classes, groups=groups).shares
    assert shares is not None
    return shares


def _features(
    network: Network, settings: Run, store: Store, ids: np.ndarray, device: torch.device
) -> dict[str, Tensor]:
    """(n, D) of the trunk and of each exit."""
    side = settings.model.side

    def work(seen: Patches) -> dict[str, Tensor]:
        return {name: each.float().cpu() for name, each in settings.method.exits(network, seen).items()}

    passes = one_pass(
        network, work, store, View(side=side, centre=centre_share(side)), patch=settings.model.patch, device=device,
        precision_context=autocast(device, settings.precision), only=ids,
    )  # fmt: skip
    with contextlib.closing(passes) as batches:
        parts = list(batches)
    return {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
