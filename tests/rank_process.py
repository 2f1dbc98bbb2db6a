"""One rank of a test: does something small with the others, or trains with a fault at one rank and step.

python -m tests.rank_process gradients OUT             loss and gradients of this rank's half of a fixed batch, steps,
                                                       and checkpoints of divided weights
python -m tests.rank_process compiled OUT              steps whose blocks are compiled
python -m tests.rank_process train FAULT STEP …        `train.pretrain …`; FAULT strikes rank 1, or rank $STRUCK,
                                                       before step STEP
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from model.losses import sup_con
from model.memory import Queue
from model.network import Network
from model.objectives import Objective
from model.objectives.byol import BYOL
from model.objectives.can import CAN
from model.objectives.clsa import CLSA
from model.objectives.daae import DAAE
from model.objectives.mae import MAE
from model.objectives.mixedae import MixedAE
from model.objectives.mocov2 import MoCoV2
from model.objectives.mocov3 import MoCoV3
from model.objectives.selfcon import SelfCon
from model.objectives.simclr import SimCLR
from model.objectives.supcon import SupCon
from model.objectives.swav import SwAV
from pipeline.errors import DataError
from pipeline.sampling import epoch_order
from pipeline.views import Batch, Patches, make_views
from tests.conftest import COUNT, SMALL
from train import checkpoint
from train.command import run
from train.config import Optim, Run, Speed
from train.ranks import Ranks
from train.step import Stepper, noise

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
    "daae-pred": DAAE(head_hidden=40, head_out=16, contrast_weight=1.0, feature="asym_pred"),
    "daae-layer": DAAE(head_hidden=32, head_out=16, contrast_weight=1.0, head_norm="layer"),
    "mixedae": MixedAE(homologous_weight=1.0),
    "can": CAN(head_out=16, contrast_weight=0.5),
    "selfcon": SelfCon(head_out=16),
    "selfcon-alone": SelfCon(head_out=16, use_labels=False, drop_path=0.5),
    "clsa": CLSA(head_out=16, queue=32, weak=(1.0, 0.5), strong=(0.5, 0.25)),
    "swav": SwAV(prototypes=24, head_hidden=32, head_out=16, local_views=2, freeze_steps=0),
    "swav-queue": SwAV(prototypes=24, head_hidden=32, head_out=16, local_views=2, freeze_steps=0, queue=20),
}


STEPS = 5  # taken with each of these: momentum copies, an encoder that is called twice, and what is frozen at first
STEPPED = {
    "ema": replace(METHODS["daae"], target="ema"),
    "twice": replace(METHODS["daae"], small=0.25),
    "frozen": replace(METHODS["swav-queue"], queue=32, queue_from=0.0, freeze_steps=2, head_norm="layer"),
}
TAKEN = [("ema", torch.float64), ("twice", torch.float32), ("frozen", torch.float64)]
ROUNDED = (("twice", torch.float32), "rounded")  # gradients travel in bfloat16
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
    return {name: replace(view, pixels=view.pixels.to(dtype)) for name, view in made.items()}


def gradients(name: str, rank: int, ranks: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers after a step as a run has them: averaged over the ranks."""
    method = method_of(name)
    network = Network(method, SMALL, 0).to(dtype).train()
    wrapped = network if ranks == 1 else torch.nn.parallel.DistributedDataParallel(network)
    share = ROWS // ranks
    rows = slice(rank * share, (rank + 1) * share)
    for queue in (each for each in network.modules() if isinstance(each, Queue)):
        # SwAV's begins empty, and would count for nothing.
        drawn = torch.randn(queue.rows.shape, generator=torch.Generator().manual_seed(2))
        queue.rows.copy_(torch.nn.functional.normalize(drawn, dim=1))
    method.before_step(network, 0.5, 5)
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


def stepper_of(
    method: Objective, ranks: Ranks, dtype: torch.dtype, *, divided: bool, accumulate: int = 1, **speed: bool
) -> Stepper:
    optim = Optim(batch=ROWS, clip_grad=0.5, accumulate=accumulate)
    run = Run(
        objective="daae", method=method, model=SMALL, optim=optim, device="cpu",
        speed=Speed(shard=divided, **speed), precision="fp32",
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        stepper = Stepper(run, torch.device("cpu"), ranks=ranks)
    finally:
        torch.set_default_dtype(torch.float32)
    stepper.prepare()
    return stepper


def take_steps(stepper: Stepper, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What STEPS steps on the fixed batch come to: the first gradient, the last loss and norm, the weights; whole."""
    from train.divided import full

    ranks, method = stepper.ranks, stepper.run.method
    share = ROWS // ranks.count
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    batch = Batch({}, torch.full((share,), -1), torch.arange(ROWS)[rows], 0)
    found = {}

    def keep(*_):
        for name, each in stepper.network.named_parameters():
            if each.grad is not None:
                found.setdefault(f"gradient {name}", full(each.grad).clone())

    stepper.optimizer.register_step_pre_hook(keep)
    with mock.patch("train.step.views_of", return_value=fixed_views(method, rows, dtype)):
        *_, (outcome,) = [stepper(batch, 1e-3) for _ in range(STEPS)]
    found |= {f"weight {name}": full(each) for name, each in stepper.network.state_dict().items()}
    loss = torch.stack(list(outcome.terms.values())).sum().detach()
    return {**found, "loss": ranks.mean(loss), "norm": stepper.norm}


def check_checkpoints(stepper: Stepper, out: Path) -> None:
    """Write what is divided among the ranks both ways, and read each into another network."""
    from train import divided

    tensors = checkpoint.tensors_of(stepper.network, stepper.optimizer)
    for kind in ("shards", "whole"):
        path = divided.save(out / kind, tensors, {"step": STEPS}, 1, stepper.ranks, whole=kind == "whole")
        stepper.ranks.share(None)  # rank 0 has it in its place
        other = stepper_of(stepper.run.method, stepper.ranks, torch.float32, divided=True)
        with torch.no_grad():  # as where ways to attend are measured; it leaves some weights whole
            other.network(fixed_views(stepper.run.method, slice(ROWS), torch.float32), torch.full((ROWS,), -1))
        divided.load(other.network, other.optimizer, checkpoint.verify(path))
        loaded = checkpoint.tensors_of(other.network, other.optimizer)
        for name, values in tensors.items():
            assert values.keys() == loaded[name].keys()
            for key, value in values.items():
                mine, its = (getattr(each, "_local_tensor", each) for each in (value, loaded[name][key]))
                assert torch.equal(mine, its), (kind, name, key)


def times_sent(ranks: Ranks) -> dict[int, list[int]]:
    """Parts of a step -> how often gradients were averaged in it: for each bucket once, in steps two and three."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    found = {}
    for parts in (1, 4):
        stepper, sent = stepper_of(MAE(), ranks, torch.float32, divided=False, accumulate=parts), [0]

        def count(state, bucket, sent=sent):
            sent[0] += 1
            return allreduce_hook(state, bucket)

        stepper.wrapped.register_comm_hook(None, count)
        seen = set()
        for step in range(3):
            sent[0] = 0
            stepper(noise(stepper.run, ROWS // ranks.count, torch.device("cpu")), 1e-3)
            if step:  # buckets are laid out anew after the first
                seen.add(sent[0])
        found[parts] = sorted(seen)
    return found


def write_gradients(out: Path) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for (name, dtype), way in [*itertools.product(TAKEN, ("whole", "divided")), ROUNDED]:
        together = Ranks(rank, ranks)
        stepper = stepper_of(STEPPED[name], together, dtype, divided=way == "divided", bf16_gradients=way == "rounded")
        found = take_steps(stepper, dtype)
        if rank == 0:
            torch.save(found, out / f"{name}-{way}-{dtype}.pt")
        if dtype == torch.float32 and way == "divided":
            check_checkpoints(stepper, out)
    for name, dtype in (*CASES, (APART, torch.float64)):
        found = gradients(name, rank, ranks, dtype)
        dist.all_reduce(found["loss"])
        found["loss"] /= ranks
        torch.save(found, out / f"{name}-{rank}-{dtype}.pt")
    torch.save(singles(rank, ranks), out / f"singles-{rank}.pt")
    sent = times_sent(Ranks(rank, ranks))
    if rank == 0:
        (out / "sent.json").write_text(json.dumps(sent))
    dist.destroy_process_group()
    return 0


def write_compiled(out: Path) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    together = Ranks(dist.get_rank(), dist.get_world_size())
    for way in ("whole", "divided"):
        stepper = stepper_of(STEPPED["twice"], together, torch.float32, divided=way == "divided", compile=True)
        found = take_steps(stepper, torch.float32)
        if together.first:
            found["compilations"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            torch.save(found, out / f"compiled-{way}.pt")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    dist.destroy_process_group()
    return 0


def train(fault: str, step: int, words: list[str]) -> int:
    from train.pretrain import main

    taken, whole, here = [0], Stepper.__call__, os.environ["RANK"] == os.environ.get("STRUCK", "1")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    ids = os.environ["STEPS_TAKEN"] + "again-" * again + os.environ["RANK"]

    def struck(self: Stepper, batch: Batch, lr: float, done: tuple[float, float] = (0.0, 0.0)):
        harm = {"nan": poison_gradient, "bad data": poison}.get(fault) if here else None
        if harm and not (taken[0] >= step if fault == "nan" else spoilt(batch, step)):
            harm = None
        if taken[0] == step and here and not again:
            strike(fault)
        taken[0] += 1
        with open(ids, "a", encoding="utf-8") as file:
            file.write(f"{batch.id.tolist()}\n")
        return (harm or whole)(self, batch, lr, done)

    Stepper.__call__ = struck
    return run(main, words)


def spoilt(batch: Batch, first: int, count: int = 3) -> bool:
    """Whether a batch holds samples of `count` batches, from `first` on, of the first epoch."""
    samples = epoch_order(0, 0, COUNT)[16 * first : 16 * (first + count)]
    return batch.epoch == 0 and bool(set(samples.tolist()) & set(batch.id.tolist()))


def poison(stepper: Stepper, *inputs, step=Stepper.__call__):
    """A step whose loss is not a number, on this rank alone."""
    objective = stepper.network.objective
    sound = objective.loss

    def loss(*inputs):
        outcome = sound(*inputs)
        return type(outcome)({name: term * float("nan") for name, term in outcome.terms.items()}, outcome.watched)

    object.__setattr__(objective, "loss", loss)
    try:
        return step(stepper, *inputs)
    finally:
        object.__delattr__(objective, "loss")


def poison_gradient(stepper: Stepper, *inputs, step=Stepper.__call__):
    """A step whose loss is sound, and one of its gradients is not, on this rank alone."""
    hook = stepper.network.encoder.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    try:
        return step(stepper, *inputs)
    finally:
        hook.remove()


def strike(fault: str) -> None:
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "raise":
        raise ZeroDivisionError("seven")
    elif fault == "damage":
        raise DataError("sample seven is damaged.")
    elif fault == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault == "slow":
        time.sleep(8)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "train":
        sys.exit(train(words[0], int(words[1]), words[2:]))
    sys.exit({"gradients": write_gradients, "compiled": write_compiled}[what](Path(words[0])))
