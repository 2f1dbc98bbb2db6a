"""How many seconds a step takes, measured before a run is planned in seconds.

Several recipes are measured in turns of a few steps: a slow minute of the machine then slows all of them, and what they
are given for the same seconds stays fair. `daae compare` has its arms measured so, by `python -m train.pace FILE N`, in
as many processes as its runs have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DataError
from pipeline.staging import write_whole
from train.allocator import keep_memory
from train.command import run as run_command

if TYPE_CHECKING:
    from pipeline.loader import Loader
    from pipeline.store import Store
    from train.config import Budget, Run
    from train.ranks import Ranks
    from train.stop import Stop

TURN_STEPS = 4
SHARE = 0.1  # of the seconds that are planned, spent on measuring
SECONDS = (2.0, 20.0)  # for each recipe, at least and at most


def seconds_per_step(
    recipes: list[tuple[Run, Store]], wanted: float, ranks: Ranks | None = None, stop: Stop | None = None
) -> list[float]:
    """Median seconds of a whole step of each recipe: waiting for data, views, forward, backward, optimizer. Where a
    recipe has stages, the mean over its steps.

    wanted: seconds of the run that is planned; a tenth of them, within limits, is spent on each recipe. The steps are
    those of the run, on a throwaway network and at a learning rate of 0. Of several ranks rank 0's clock counts.
    Raises CutShort on all of them between two turns, where `stop` was asked of one.
    """
    from train.data import open_data
    from train.ranks import Ranks
    from train.stages import parts_of
    from train.stop import CutShort

    ranks = ranks or Ranks()
    parts = [(place, *part, store) for place, (run, store) in enumerate(recipes) for part in parts_of(run)]
    each = min(SECONDS[1], max(SECONDS[0], SHARE * wanted)) * len(recipes) / len(parts)
    with contextlib.ExitStack() as stack:
        rehearsals = []
        for _, _, run, store in parts:
            loader = open_data(run, store, ranks)
            stack.callback(loader.close)
            rehearsals.append(_rehearse(run, loader, ranks))
        for turns in rehearsals:
            stack.enter_context(contextlib.closing(turns))  # pyright: ignore[reportArgumentType]
            next(turns)  # allocates, compiles and fills the loader's queue
        taken: list[list[float]] = [[] for _ in parts]
        while ranks.share(min(map(sum, taken)) * TURN_STEPS < each):
            if ranks.any(stop is not None and stop.asked):
                raise CutShort
            for turns, seconds in zip(rehearsals, taken, strict=True):
                with ranks.waiting("a step that is timed"):
                    seconds.append(next(turns))
    paces = [0.0] * len(recipes)
    for (place, share, _, _), seconds in zip(parts, taken, strict=True):
        paces[place] += share * statistics.median(seconds)
    return ranks.share(paces)


def _rehearse(run: Run, loader: Loader, ranks: Ranks) -> Iterator[float]:
    """Seconds of a step, the mean of one turn after another, without end. Within a turn nothing waits for the GPU, as
    in a run between two rows of its log."""
    import torch

    from train.attention import settle_attention
    from train.rehearsal import endless
    from train.step import Stepper

    device = torch.device(run.device)
    stepper = Stepper(run, device, ranks=ranks)
    settle_attention(stepper)
    stepper.prepare()
    batches = endless(loader)
    while True:
        start = time.perf_counter()
        for _ in range(TURN_STEPS):
            stepper(next(batches), lr=0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield (time.perf_counter() - start) / TURN_STEPS


def steps_for(wish: Budget, pace: float) -> Budget:
    """A wish for seconds, frozen as a number of steps."""
    assert wish.seconds is not None
    return dataclasses.replace(wish, steps=max(1, round(wish.seconds / pace)))


def main(argv: list[str]) -> int:
    """Measure what a file asks for, {"settings": {name: settings of a run}}, and write "seconds_per_step" into it.

    argv: the file, and the number of processes that train together.
    """
    path, processes = Path(argv[0]), int(argv[1])
    if processes > 1 and "RANK" not in os.environ:
        from train.launch import launch

        return launch("train.pace", processes, argv, path.parent)
    import torch

    from train.config import Run, with_values
    from train.data import open_store
    from train.device import resolve
    from train.ranks import together

    question = json.loads(path.read_text(encoding="utf-8"))
    recipes, wanted = [], 0.0
    for name, values in question["settings"].items():
        wish = with_values(Run(), values, f"{path}: {name}")
        if wish.data is None or wish.budget.seconds is None:
            raise DataError(f"{path}: {name} names no data or no seconds.")
        store, wanted = open_store(wish), max(wanted, wish.budget.seconds)
        recipes.append((resolve(wish, store), store))
    first = recipes[0][0]
    with together(torch.device(first.device), first.speed.stall_seconds) as ranks:
        paces = seconds_per_step(recipes, wanted, ranks)
    if ranks.first:
        answer = {**question, "seconds_per_step": dict(zip(question["settings"], paces, strict=True))}
        write_whole(path, json.dumps(answer, indent=1))
    return 0


if __name__ == "__main__":
    keep_memory()  # as the runs do that are planned by it
    sys.exit(run_command(main))
