"""What is kept of a step whose gradient was not finite: enough to repeat it, and to see where it began."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

from pipeline.staging import write_whole
from pipeline.views import Batch
from train.divided import full
from train.ranks import Ranks
from train.step import Stepper


def write_capture(out: Path, stepper: Stepper, batch: Batch, step: int, ranks: Ranks) -> Path:
    """Take the step once more without changing a weight, and write debug/nonfinite_STEP.json; every rank its own.

    batch: of that step, which goes through in the same parts. Holds the samples' ids, every term of the loss, the
    mean of the parts, and of each parameter the gradient's norm and how many of its values are not finite. All ranks
    call it: their gradients are averaged again.
    """
    with stepper.ledger.aside("other"):
        outcomes = stepper.backward(batch, stepper.run.optim.accumulate)
    scale, gradients = stepper.scaler.get_scale(), {}
    for name, parameter in stepper.network.named_parameters():
        if parameter.grad is not None:
            gradient = full(parameter.grad) / scale
            gradients[name] = {"norm": gradient.norm().item(), "not_finite": int((~gradient.isfinite()).sum())}
    weights = [name for name, value in stepper.network.state_dict().items() if not bool(full(value).isfinite().all())]
    stepper.optimizer.zero_grad(set_to_none=True)
    path = out / "debug" / (f"nonfinite_{step}" + ("" if ranks.first else f"_rank{ranks.rank:03d}") + ".json")
    path.parent.mkdir(exist_ok=True)
    found = {
        "step": step, "rank": ranks.rank, "epoch": batch.epoch, "ids": batch.id.tolist(),
        "terms": means([outcome.terms for outcome in outcomes]),
        "watched": means([outcome.watched for outcome in outcomes]),
        "gradients": gradients, "weights_not_finite": weights,
    }  # fmt: skip
    write_whole(path, json.dumps(found, indent=1))
    return path


def means(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return {name: statistics.fmean(part[name].item() for part in parts) for name in parts[0]}
