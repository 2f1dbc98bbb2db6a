"""Learning rate as a plain function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from train.config import Optim


def warmup_steps(optim: Optim, steps: int, steps_per_epoch: float) -> float:
    """MAE's number of warm-up epochs, cut to a share of a short run."""
    return min(optim.warmup_epochs * steps_per_epoch, optim.warmup_share * steps)


def learning_rate(optim: Optim, step: int, steps: int, warmup: float) -> float:
    """Rate for optimizer step `step` of `steps`, counted from 0: linear up to the peak, half a cosine down to min_lr.

    Source: MAE's util/lr_sched.py, which changes it every iteration.
    """
    peak = optim.peak_lr()
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1e-9, steps - warmup)
    return optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
