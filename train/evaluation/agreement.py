"""Whether an encoder says the same of a picture at two sizes: what the downsampled view of DAAE rests on.

Its slides hold that resizing changes the view of a picture without changing what it shows. Before training that is a
fact about pixels; after it, one about the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from train.evaluation.exam import Exam
from train.evaluation.featurise import encoder_features
from train.evaluation.probes import neighbours

if TYPE_CHECKING:
    from model.network import Network
    from train.config import Run


@dataclass(frozen=True, slots=True)
class Agreement:
    """Between features of the same pictures at full size and at a share of it."""

    same: float  # mean cosine of a picture with itself at the other size
    others: float  # mean cosine of a picture with the others at the other size: 0 but for rounding and few pictures
    found: float  # share of the small pictures whose nearest full-size one is their own
    count: int


def agreement(full: Tensor, small: Tensor) -> Agreement:
    """full, small: (N, D), row i of both of one picture, N at least 2; of any float type.

    Cosines are between features less their mean over the pictures of that size: without that, what all pictures share
    (most of an untrained encoder's output) would pass for agreement.
    """
    full, small = (F.normalize(each.double() - each.double().mean(dim=0), dim=1) for each in (full, small))
    count = len(full)
    same = (full * small).sum()
    everything = full.sum(dim=0) @ small.sum(dim=0)
    _, nearest = neighbours(full, small, 1)
    found = (nearest[:, 0] == torch.arange(count, device=nearest.device)).double().mean()
    others = (everything - same) / (count * (count - 1))
    return Agreement(float(same / count), float(others), float(found), count)


def sizes_agree(
    networks: Mapping[str, Network],
    settings: Run,
    device: torch.device,
    feature: str,
    share: float,
    exam: Exam,
    cache: Path,
) -> dict:
    """{"share", and for each of the networks: test -> Agreement}, of the pictures that the leading column asks."""
    result: dict = {"share": share}
    asked = {name: (store, exam.questions(name, exam.leading)[0]) for name, store in exam.tests.items()}
    for who, each in networks.items():
        full, small = (encoder_features(each, settings, device, feature, cache, share=s) for s in (1.0, share))
        result[who] = {
            name: asdict(agreement(full(store, ids), small(store, ids))) for name, (store, ids) in asked.items()
        }
    return result
