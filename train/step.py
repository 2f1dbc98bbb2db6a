"""One optimizer step: a batch in, weights changed. The run, its rehearsal and the profiler all take this one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.network import Network
from model.objectives import Outcome
from pipeline.errors import ResourceError
from pipeline.views import Batch, Patches, make_views
from train.config import Run
from train.device import autocast


def train_step(run: Run, network: Network, optimizer, batch: Batch, device: torch.device, lr: float) -> list[Outcome]:
    """One optimizer step. Nothing here reads a value back from the device.

    Raises ResourceError where the batch does not fit the GPU; the gradients are let go then.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    outcomes, parts = [], run.optim.accumulate
    try:
        for part in cut(batch, parts):
            with autocast(device, run.precision):
                outcome = network(views_of(run, part), part.label)
            loss = torch.stack(list(outcome.terms.values())).sum()
            (loss / parts).backward()
            outcomes.append(outcome)
        if run.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), run.optim.clip_grad)
        optimizer.step()
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        size = len(batch.id)
        raise ResourceError(
            f"a step of {size // parts:,} images does not fit {device}. Use --batch {size // 2} or less, or "
            f"--accum-iter {2 * parts}."
        ) from None
    optimizer.zero_grad(set_to_none=True)
    run.method.after_step(network)
    return outcomes


def views_of(run: Run, batch: Batch) -> dict[str, Patches]:
    """What the run's objective sees of a batch."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    return make_views(batch, run.method.views(run.model), patch=run.model.patch, seed=run.seed, dtype=dtype)


def cut(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in equal parts, for gradient accumulation."""
    if parts == 1:
        yield batch
        return
    count = len(batch.id) // parts
    for at in range(0, count * parts, count):
        rows = slice(at, at + count)
        images = {name: image[rows] for name, image in batch.images.items()}
        yield Batch(images, batch.label[rows], batch.id[rows], batch.epoch)
