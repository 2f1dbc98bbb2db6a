"""`daae profile --step --techniques`: what each thing gains that makes our step faster, by leaving it out alone.

A step of DAAE as published, whose two views have equally many tokens. Foretold is what was expected of a whole step on
two cores with units for bf16, from timings of its parts in other programs before this one was written.
"""

from __future__ import annotations

# Methods are put in the place of others.
# pyright: reportAttributeAccessIssue=false
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from tools.profiling.peer_process import serve
from tools.profiling.step_peers import Task, few_at_once, ours
from tools.profiling.step_records import AS_IT_IS
from train.allocator import give_memory_back
from train.command import run

if TYPE_CHECKING:
    from model.vit import Encoder
    from pipeline.views import Patches
    from train.rehearsal import Machine


@dataclass(frozen=True)
class Technique:
    foretold: str  # times as fast; empty where nobody had thought of it before it was measured
    undo: Callable[[], None] = lambda: None  # in the contender's own process, before its network is made
    undo_in: Callable[[Machine], None] = lambda machine: None  # and after that
    changes: dict[str, Any] = field(default_factory=dict)  # of the task, without it
    attention: str = "auto"
    added: bool = False  # an option that is off: it is put in, not left out


def embed_all() -> None:
    """Every patch is embedded, and what is hidden thrown away behind it."""
    from model import vit

    def embed(self: Encoder, view: Patches):
        tokens = self.patch_embed(view.pixels)
        return view.kept(tokens + vit.matched(self.positions(view.grid, tokens.device), tokens))

    vit.Encoder.embed = embed


def view_by_view() -> None:
    """The encoder is called once for each view."""
    from model import vit

    together = vit.Encoder.forward
    vit.Encoder.forward = lambda self, *views: [together(self, view)[0] for view in views]


def float32_tokens() -> None:
    """What runs through the blocks is float32: one addend of that type is enough."""
    from model import decoder, vit

    vit.matched = decoder.matched = lambda values, tokens: values


def attention_on_the_tape() -> None:
    """Autograd makes the backward pass of attention's two products and its softmax, and keeps what it needs for it."""
    import torch

    from model import attention

    def attend(query, key, value):
        return torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1) @ value

    attention.WAYS["products"] = attend


def gelu_by_tanh(machine: Machine) -> None:
    from torch import nn

    for module in machine.stepper.network.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"


def adamw_by_parts(machine: Machine) -> None:
    """torch's default: several passes over weights, gradients and moments."""
    import torch

    class ByParts(torch.optim.AdamW):
        found_inf = property(lambda self: None, lambda self, value: None)  # which the fused kernel alone knows

    groups = [{**group, "fused": False, "foreach": None} for group in machine.stepper.optimizer.param_groups]
    machine.stepper.optimizer = ByParts(groups)


TECHNIQUES = {
    "bf16 instead of fp32": Technique("1.5 to 2.3", changes={"precision": "fp32"}),
    "attention by two products (bf16)": Technique("1.4 to 1.6", attention="any"),
    "attention as one entry of the tape": Technique("", attention_on_the_tape),
    "memory kept, in huge pages": Technique("", changes={"kept": False}),
    "both views in one encoder call": Technique("1.0 to 1.1", view_by_view),
    "hidden patches left out before the embedding": Technique("1.05", embed_all),
    "bf16 between blocks": Technique("1.00 to 1.06", float32_tokens),
    "GELU by erf, not tanh": Technique("1.1 to 1.2", undo_in=gelu_by_tanh),
    "AdamW in one kernel": Technique("1.00", undo_in=adamw_by_parts),
    "--compile (off)": Technique("1.04 to 1.3", changes={"compiled": True}, added=True),
}


def compare_techniques(task: Task, *, seconds: float, say: Callable[[str], None]) -> dict[str, dict]:
    """technique -> rates of our step without it, with what was foretold and, under "beside", our step as it is in the
    same rounds. seconds: of each, in all rounds together. Raises UsageError where one would have nothing to leave out.
    """
    if task.precision != "bf16" or task.compiled:
        raise UsageError("--step --techniques is of an eager step in bf16: --precision bf16, without --compile.")
    task = replace(task, objective="daae")
    tasks = {AS_IT_IS: task} | {name: replace(task, peer=name, **each.changes) for name, each in TECHNIQUES.items()}
    commands = {name: ["tools.profiling.techniques", json.dumps(asdict(each))] for name, each in tasks.items()}
    found = few_at_once(commands, {"beside": AS_IT_IS}, task.device, seconds, say)
    return {
        name: {**rates, "foretold": TECHNIQUES[name].foretold, "added": TECHNIQUES[name].added} if name in TECHNIQUES
        else rates
        for name, rates in found.items()
    }  # fmt: skip


def steps(task: Task) -> Iterator[int]:
    """Our step, without the technique that the task is called by."""
    left_out = TECHNIQUES.get(task.peer, Technique(""))
    left_out.undo()
    return ours(task, attention=left_out.attention, change=left_out.undo_in)


def main(argv: list[str]) -> int:
    task = Task(**json.loads(argv[0]))
    if not task.kept:
        give_memory_back()
    serve(lambda: steps(task))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
