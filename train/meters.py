"""What a run watches from step to step: summed on the device, and read when a row of metrics is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.heads import effective_rank
from model.objectives import Outcome
from pipeline.errors import NumericsError
from train.step import patience

if TYPE_CHECKING:
    from train.journal import Journal
    from train.step import Stepper

RANKED = 256  # rows, at most, whose effective rank a row of metrics has: milliseconds, beside the steps between two


class Meters:
    """Losses and whatever else a method watches, since the last row."""

    def __init__(self, stepper: Stepper, journal: Journal, settled: float):
        """settled: the step up to which a method's curves mean nothing yet."""
        self.stepper, self.journal, self.settled = stepper, journal, settled
        self.sums: dict[str, Tensor] = {}
        self.features: Tensor | None = None  # of the last step
        self.refused = 0  # steps, up to the last row
        self.alarm: str | None = None  # what the method said of the last row

    def add(self, outcomes: list[Outcome]) -> None:
        """Of a step. A row reads the sums once; a step that was refused adds nothing."""
        watched = {"grad_norm": self.stepper.norm}
        for outcome in outcomes:
            terms = {name: term.detach() for name, term in outcome.terms.items()}
            watched["loss"] = torch.stack(list(terms.values())).sum()
            for name, value in {**terms, **outcome.watched, **watched}.items():
                value = torch.where(self.stepper.refused.finite, value.float(), 0.0)
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            watched = {}
        self.features = outcomes[-1].features

    def clear(self) -> None:
        """After a rollback: the steps since the last row were undone, and refused ones are counted from 0 again."""
        self.refused = 0
        self.sums.clear()

    def means(self, step: int, steps: int, capture: Callable[[], Path]) -> dict[str, float]:
        """What is watched, over the last `steps` steps and all ranks, which all call it; the effective rank is the last
        step's. Nothing where none of them was taken.

        Raises NumericsError where too many steps in a row were refused, on every rank, after `capture` has written down
        what the last one was made of.
        """
        in_a_row, refused = self.stepper.refused.read()
        lately, self.refused = refused - self.refused, refused
        if self.features is not None and not in_a_row:
            self.sums["effective_rank"] = effective_rank(self.features[:RANKED])
        names = sorted(self.sums)
        sums = self.stepper.ranks.mean(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums.clear()
        taken = steps - lately
        parts = taken * self.stepper.run.optim.accumulate
        times = dict.fromkeys(names, parts) | {"grad_norm": taken, "effective_rank": 1}
        means = {name: value / times[name] for name, value in zip(names, sums, strict=True)} if taken else {}
        if in_a_row >= patience(self.stepper.run.precision) or not all(map(math.isfinite, means.values())):
            what = f"gradient was not finite for {in_a_row:,} steps in a row" if in_a_row else "loss is not finite"
            raise NumericsError(
                f"the {what} at step {step:,}; {capture()} tells what that was. No such step was taken."
            )
        if lately:
            self.journal.say(
                f"step {step:,}: {lately:,} of the last {steps:,} steps were not taken: gradient not finite."
            )
        return means

    def listen(self, step: int, means: dict[str, float]) -> None:
        """Say once what the method makes of its curves."""
        if means and step > self.settled:
            alarm = self.stepper.run.method.alarm(means)
            if alarm is not None and self.alarm is None:
                self.journal.say(f"step {step:,}: {alarm}")
            self.alarm = alarm
