"""How a run attends: measured for its own lengths on its own GPU when it begins, and kept from then on.

On a CPU two ways are left and a rule tells which (model.attention.usual), so that two runs there are equal to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from model.attention import choose, fastest, listening
from pipeline.views import group_size
from train.ceiling import DTYPES
from train.device import autocast
from train.stages import parts_of
from train.step import Stepper, noise, views_of

LOOKED_AT = 2  # images or more, to learn which lengths there are
MOST_ROWS = 1024  # that are timed: more take no other way, and may not fit beside the rest


def settle_attention(stepper: Stepper) -> str:
    """Choose for every length that the run's loss attends over, and say what was chosen as --speed.attention takes it.

    A wish that is not "auto" is done as it says. Raises UsageError where it names what is not there.
    """
    run, device = stepper.run, stepper.device
    wish = run.speed.attention
    if wish == "auto" and device.type == "cpu":
        wish = ""
    elif wish == "auto":
        network, share = stepper.network.eval(), run.optim.batch // run.optim.accumulate // stepper.ranks.count
        choose("")
        looked_at = max(LOOKED_AT, group_size(run.method.views(run.model)))
        with listening() as seen, torch.no_grad(), autocast(device, run.precision):
            for _, part in parts_of(run):
                batch = noise(part, looked_at, device)
                network(views_of(part, batch), batch.label)
        network.train()
        most = {str(one): replace(one, rows=min(MOST_ROWS, one.rows * share // looked_at)) for one in sorted(seen)}
        ways = {name: fastest(one, device, DTYPES[run.precision]) for name, one in most.items()}
        wish = stepper.ranks.share(" ".join(f"{name}={way}" for name, way in ways.items()))
    stepper.attention = wish
    choose(wish)
    return wish
