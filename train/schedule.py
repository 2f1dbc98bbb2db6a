"""Learning rate and weight decay as plain functions of the step, so that a resumed run needs no state for them."""

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


def weight_decay(optim: Optim, done: float) -> float:
    """Decay after a share `done` of the run's steps: constant, or half a cosine from weight_decay to weight_decay_end.

    Source: DINO (Caron et al. 2021, arXiv 2104.14294), which has no warm-up of it.
    """
    if optim.weight_decay_end is None:
        return optim.weight_decay
    end = optim.weight_decay_end
    return end + (optim.weight_decay - end) * 0.5 * (1 + math.cos(math.pi * done))
