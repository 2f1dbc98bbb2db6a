"""One rank of a test: does something small with the others, or trains with a fault at one rank and step.

python -m tests.rank_process gradients OUT             loss and gradients of this rank's half of a fixed batch
python -m tests.rank_process train FAULT STEP …        `train.pretrain …`; FAULT strikes rank 1 before step STEP
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from model.losses import sup_con
from model.network import Network
from model.objectives import Objective
from model.objectives.byol import BYOL
from model.objectives.daae import DAAE
from model.objectives.mae import MAE
from model.objectives.mixedae import MixedAE
from model.objectives.mocov2 import MoCoV2
from model.objectives.mocov3 import MoCoV3
from model.objectives.simclr import SimCLR
from model.objectives.supcon import SupCon
from model.objectives.swav import SwAV
from pipeline.views import Batch, Patches, make_views
from tests.conftest import SMALL
from train.command import run
from train.step import Stepper

ROWS = 16
BASES: dict[str, Objective] = {
    "simclr": SimCLR(head_hidden=32, head_out=16),
    "supcon": SupCon(head_hidden=32, head_out=16),
    "mocov2": MoCoV2(head_out=16, queue=32),
    "mocov3": MoCoV3(head_hidden=32, head_out=16),
    "byol": BYOL(head_hidden=32, head_out=16),
}
METHODS: dict[str, Objective] = {
    **BASES,
    "mae": MAE(),
    "daae": DAAE(head_hidden=32, head_out=16, contrast_weight=1.0),
    "daae-pred": DAAE(head_hidden=32, head_out=16, contrast_weight=1.0, feature="asym_pred"),
    "daae-layer": DAAE(head_hidden=32, head_out=16, contrast_weight=1.0, head_norm="layer"),
    "mixedae": MixedAE(homologous_weight=1.0),
    "swav": SwAV(prototypes=24, head_hidden=32, head_out=16, local_views=2, freeze_steps=0),
    "swav-queue": SwAV(prototypes=24, head_hidden=32, head_out=16, local_views=2, freeze_steps=0, queue=20),
}


APART = "daae-apart"  # the one whose loss depends on how many ranks there are
CASES = [
    *itertools.product([name for name in METHODS if name not in BASES], (torch.float64, torch.float32)),
    *itertools.product(BASES, (torch.float64,)),
]


def method_of(name: str) -> Objective:
    return replace(METHODS["daae"], head_norm="batch_apart") if name == APART else METHODS[name]


def fixed_views(method: Objective, rows: slice, dtype: torch.dtype) -> dict[str, Patches]:
    generator = torch.Generator().manual_seed(5)
    wanted = method.views(SMALL)
    images = {
        name: torch.randint(256, (ROWS, view.side, view.side, 3), generator=generator, dtype=torch.uint8)[rows]
        for name, view in wanted.items()
    }
    ids = torch.arange(ROWS)[rows]
    made = make_views(Batch(images, torch.full_like(ids, -1), ids, 0), wanted, patch=SMALL.patch, seed=0)
    return {name: Patches(view.pixels.to(dtype), view.grid, view.keep, view.hidden) for name, view in made.items()}


def gradients(name: str, rank: int, ranks: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers after a step as a run has them: averaged over the ranks."""
    method = method_of(name)
    network = Network(method, SMALL, 0).to(dtype).train()
    wrapped = network if ranks == 1 else torch.nn.parallel.DistributedDataParallel(network)
    share = ROWS // ranks
    rows = slice(rank * share, (rank + 1) * share)
    method.before_step(network, 0.5)
    outcome = wrapped(fixed_views(method, rows, dtype), torch.arange(ROWS)[rows] % 5)
    loss = torch.stack(list(outcome.terms.values())).sum()
    loss.backward()
    method.after_step(network, 0.5)
    found = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    found |= {f"buffer {name}": each for name, each in network.named_buffers()}
    return {**found, "loss": loss.detach()}


def singles(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """SupCon's loss and gradients where most images are alone in their class, and those that are not are unevenly
    spread over the ranks."""
    label = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 11])
    share = ROWS // ranks
    rows = slice(rank * share, (rank + 1) * share)
    features = torch.randn(1, ROWS, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = features[:, rows].clone().requires_grad_()
    loss = sup_con(mine, label[rows], temperature=0.2)
    loss.backward()
    assert mine.grad is not None
    return {"loss": loss.detach() / ranks, "gradient": mine.grad / ranks}


def write_gradients(out: Path) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, dtype in (*CASES, (APART, torch.float64)):
        found = gradients(name, rank, ranks, dtype)
        dist.all_reduce(found["loss"])
        found["loss"] /= ranks
        torch.save(found, out / f"{name}-{rank}-{dtype}.pt")
    torch.save(singles(rank, ranks), out / f"singles-{rank}.pt")
    dist.destroy_process_group()
    return 0


def train(fault: str, step: int, words: list[str]) -> int:
    from train.pretrain import main

    taken, whole = [0], Stepper.__call__

    def struck(self: Stepper, batch: Batch, lr: float, done: tuple[float, float] = (0.0, 0.0)):
        if taken[0] >= step and os.environ["RANK"] == "1":
            if fault == "nan":
                batch.images["holed"] = torch.full_like(batch.images["holed"], 200)
                with torch.no_grad():
                    return _poisoned(whole, self, batch, lr, done)
            if taken[0] == step:
                strike(fault)
        taken[0] += 1
        with open(os.environ["STEPS_TAKEN"] + os.environ["RANK"], "a", encoding="utf-8") as file:
            file.write(f"{batch.id.tolist()}\n")
        return whole(self, batch, lr, done)

    Stepper.__call__ = struck
    return run(main, words)


def _poisoned(whole, stepper: Stepper, *step):
    """A loss that is not a number, on this rank alone."""
    forward = stepper.network.objective.loss

    def loss(*inputs):
        outcome = forward(*inputs)
        return type(outcome)({name: term * float("nan") for name, term in outcome.terms.items()}, outcome.watched)

    object.__setattr__(stepper.network.objective, "loss", loss)
    try:
        with torch.enable_grad():
            return whole(stepper, *step)
    finally:
        object.__delattr__(stepper.network.objective, "loss")


def strike(fault: str) -> None:
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "raise":
        raise ZeroDivisionError("seven")
    elif fault == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault == "slow":
        time.sleep(8)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    sys.exit(write_gradients(Path(words[0])) if what == "gradients" else train(words[0], int(words[1]), words[2:]))
