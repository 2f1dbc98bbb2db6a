"""`daae methods --measure`: what a step of each method takes beside MAE's, on this machine, in turns. Its records, one
a size, as a table on a page.

daae methods --measure --size vits16 --batch 16 --json > docs/records/methods-HERE/vits16.json
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.timing import Spread

if TYPE_CHECKING:
    from torch import Tensor

    from train.config import Run
    from train.rehearsal import Machine

ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """Of a method at one size; beside MAE's in the same round."""

    preset: str
    gflop_per_image: float  # 6 x the documented multiply-accumulates
    flops: float  # beside MAE's
    seconds: Spread  # of a step, beside MAE's
    images_per_second: float  # median
    saved_mb: float  # an image: what the forward pass keeps for the backward pass

    @property
    def speed(self) -> float:
        """Of what its FLOPs foretell from MAE's seconds: 1 where a FLOP of both takes as long."""
        return self.flops / self.seconds.median


def measure(methods: list[str], size: str, batch: int, precision: str) -> list[Cost]:
    """MAE first. Steps on random pictures of one batch, in turns, so that a slow minute slows every method.

    methods: names; of each the preset of that size is measured. Raises UsageError where there is none.
    """
    import torch

    from train.device import resolve
    from train.presets import open_preset
    from train.rehearsal import Machine

    torch.manual_seed(0)
    machines = []
    for name in dict.fromkeys(["mae", *methods]):
        wish = open_preset(f"{name}-{size}")
        wish = resolve(replace(wish, optim=replace(wish.optim, batch=batch), precision=precision), None)
        wish.method.check(batch)
        machines.append(Machine(wish, torch.device(wish.device)))
    pictures = [machine.random_batch(batch) for machine in machines]
    saved = [kept(machine, batch) for machine in machines]
    taken: list[list[float]] = [[] for _ in machines]
    for turn in range(ROUNDS + 1):
        for machine, each, seconds in zip(machines, pictures, taken, strict=True):
            sample = machine.time(lambda each=each: each, machine.step, 0.0)
            if turn:  # the first allocates
                seconds.append(sample.seconds)
    first = machines[0].run
    return [
        Cost(
            machine.run.preset, 6 * machine.run.method.macs(machine.run.model) / 1e9, _macs(machine.run) / _macs(first),
            Spread.of([one / other for one, other in zip(seconds, taken[0], strict=True)]),
            batch / statistics.median(seconds), memory,
        )
        for machine, seconds, memory in zip(machines, taken, saved, strict=True)
    ]  # fmt: skip


def _macs(run: Run) -> int:
    return run.method.macs(run.model)


def kept(machine: Machine, batch: int) -> float:
    """MB an image that a step's forward pass keeps for its backward pass, parameters left out."""
    import torch

    weights = {each.untyped_storage().data_ptr() for each in machine.stepper.network.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        machine.step(machine.random_batch(batch))
    return sum(found.values()) / batch / 1e6


def read(folder: Path) -> list[dict]:
    """Records of `daae methods --measure --json` that are kept there, from small to large; none where others are."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    if not all("methods" in each for each in found):
        return []
    return sorted(found, key=lambda each: next(iter(each["methods"].values()))["gflop_per_image"])


def table(records: list[dict]) -> list[list[str]]:
    """Headings, then rows: of each method FLOPs and seconds of a step beside MAE's, its speed, and the MB an image that
    its forward pass keeps."""
    sizes = [_size(each) for each in records]
    costs = [
        {preset.removesuffix(f"-{size}"): cost for preset, cost in each["methods"].items()}
        for each, size in zip(records, sizes, strict=True)
    ]
    rows = [["", *(cell for size in sizes for cell in (f"{size}: FLOPs", "seconds", "speed", "kept"))]]
    for name in dict.fromkeys(name for each in costs for name in each):
        rows.append([name, *(cell for each in costs for cell in _cells(each.get(name)))])
    return rows


def _size(record: dict) -> str:
    return next(iter(record["methods"])).removeprefix("mae-")  # it is the first of all


def _cells(cost: dict | None) -> list[str]:
    """cost: of a method as a record has it; None where it was not measured."""
    if cost is None:
        return [""] * 4
    seconds = Spread(**cost["seconds"])
    took = f"{seconds.median:.2f} ({seconds.min:.2f} to {seconds.max:.2f})"
    return [f"{cost['flops']:.2f}", took, f"{cost['speed']:.2f}", f"{cost['saved_mb']:.3g}"]


def caption(record: dict) -> str:
    """Where a record comes from, in a line."""
    env = record["environment"]
    return (
        f"{_size(record)}: {env['device']}, {record['precision']}, batch {record['batch']}; Python {env['python']}, "
        f"torch {env['versions']['torch']}; {env['date'][:10]}, {env['code']}: {env['command']}"
    )


def markdown(folder: Path) -> list[str]:
    """A table of what `read` finds there, with a line of each record folded away below."""
    from tools.tables import page_block

    records = read(folder)
    return page_block(table(records), [caption(each) for each in records])
