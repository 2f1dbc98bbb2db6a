"""What a run will do, before it does it: steps, rates, work and memory, and hours from a given speed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from train.config import Run
from train.journal import duration
from train.schedule import learning_rate, warmup_steps
from train.stages import images_per_step, macs_per_image, parts_of, steps_of

if TYPE_CHECKING:
    from pipeline.store import Store
    from train.pretrain import Controls


def parameter_counts(run: Run) -> tuple[int, int]:
    """Trained parameters of the encoder and of everything beside it."""
    import torch

    from model.network import Network

    with torch.device("meta"):
        network = Network(run.method, run.model, run.seed)
    encoder, parts = (
        sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (network.encoder, network.parts)
    )
    return encoder, parts


def make_plan(run: Run, images: int, images_per_second: float | None) -> dict:
    """Numbers of the run; those that depend on a rate are there only with one."""
    optim, batch = run.optim, images_per_step(run)
    steps_per_epoch, flop = images / batch, 6 * macs_per_image(run)
    steps = run.budget.steps
    if steps is None and run.budget.epochs is not None:
        steps = steps_of(run, run.budget.epochs, images)
    if steps is None and run.budget.seconds is not None and images_per_second:
        steps = max(1, int(run.budget.seconds * images_per_second / batch))
    encoder, parts = parameter_counts(run)
    plan: dict = {
        "preset": run.preset, "objective": run.objective, "images": images, "batch": optim.batch,
        "steps_per_epoch": round(steps_per_epoch, 2), "steps": steps, "peak_lr": optim.peak_lr(),
        "gflop_per_image": round(flop / 1e9, 3),
        "encoder_parameters": encoder, "other_parameters": parts,
        # fp32 weights, gradients and two moments
        "state_gb": round(16 * (encoder + parts) / 1e9, 3), "checkpoint_gb": round(12 * (encoder + parts) / 1e9, 3),
    }  # fmt: skip
    if steps is not None:
        warmup = warmup_steps(optim, steps, steps_per_epoch)
        plan["epochs"] = round(steps / steps_per_epoch, 2)
        plan["warmup_steps"] = round(warmup)
        plan["lr_halfway"] = learning_rate(optim, steps // 2, steps, warmup)
        plan["exaflop"] = round(flop * batch * steps / 1e18, 4)
        if images_per_second:
            plan["images_per_second"] = images_per_second
            plan["seconds_per_epoch"] = round(images // optim.batch * optim.batch / images_per_second, 4)
            plan["hours"] = round(steps * batch / images_per_second / 3600, 2)
    return plan


def measured_rate(run: Run, store: Store) -> float:
    """Images/s of loader and step on this machine, on one device. Raises what `daae pretrain` would."""
    from train.device import resolve
    from train.rehearsal import predict

    images = seconds = 0.0
    for share, part in parts_of(run):
        sample = predict(resolve(part, store), store)
        images += share * part.optim.batch
        seconds += share * part.optim.batch * sample.seconds / sample.images
    return images / seconds


KNOWN_IMAGES = {"in1k": 1_281_167, "mini": 34_745}  # ImageNet-1K; ImageNet-mini as it is distributed


def print_plan(run: Run, controls: Controls) -> int:
    """Raises what would stop the run before its folder is made; without data, only what needs none."""
    images, store = controls.images, None
    if run.data is not None:
        from train.data import check_data, open_store
        from train.ranks import wanted

        store = open_store(run)
        images = store.per_epoch
        check_data(run, store, controls.gpus or wanted().count)
        run.method.check(run.optim.batch, images)
    if images is None:
        images = next((count for name, count in KNOWN_IMAGES.items() if f"-{name}-" in run.preset), None)
    if images is None:
        raise UsageError("--dry-run needs --data or --images to count an epoch.")
    rate, how = controls.images_per_second, ""
    if rate is None and store is not None:
        rate, how = measured_rate(run, store), ", measured here for some seconds on one device,"
    plan = make_plan(run, images, rate)
    if controls.json:
        print(json.dumps(plan))
        return 0
    for name, value in plan.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<20} {shown}")
    if "hours" in plan:
        epoch = duration(plan["seconds_per_epoch"])
        print(f"At {rate:,.4g} images/s{how} an epoch takes {epoch}, and this run {duration(plan['hours'] * 3600)}.")
    elif plan["steps"] is not None:
        print("Give --images-per-second (from `daae profile`) to see hours.")
    return 0
