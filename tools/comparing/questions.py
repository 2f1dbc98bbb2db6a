"""What an experiment asks of its runs once they are trained, beside the score that leads: `evaluate` and `finetune`.

    evaluate: {label_share: [0.01, 0.1], agreement: 0.5}         flags of `daae evaluate`, of each arm's longest runs
    finetune: {epochs: 20, batch: 256, lengths: [240, 480]}      flags of `daae finetune`, of the runs of these lengths

Nothing of this is on the clock, and it may be declared after the runs were trained: the same command asks it of them.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from train.command import coerce, nearest, plain
from train.evaluate import Evaluate
from train.finetune import Recipe

if TYPE_CHECKING:
    from model.shape import Shape

QUESTIONS = ("evaluate", "finetune")  # keys of an experiment file
TUNED = "finetuned"  # in a run folder: what `daae finetune` leaves
EVALUATE = ("protocols", "feature", "neighbours", "label_share", "exits", "agreement")
FINETUNE = tuple(each.name for each in dataclasses.fields(Recipe) if each.name != "seed")  # that is the run's


@dataclass(frozen=True)
class Questions:
    """Flags by field name, of their type; None: not asked at all."""

    evaluate: dict[str, Any] | None = None
    finetune: dict[str, Any] | None = None
    lengths: tuple[float, ...] = ()  # of the runs that are fine-tuned; none: each arm's longest

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Questions:
        """values: an experiment file's `evaluate` and `finetune`. Raises UsageError."""
        evaluate, finetune, lengths = values.get("evaluate"), values.get("finetune"), ()
        if evaluate is not None:
            evaluate = _flags(evaluate, Evaluate, EVALUATE, f"{where}evaluate")
            asked = Evaluate(Path(), **evaluate)
            asked.check()
            if asked.protocols[0] != "ridge":
                raise UsageError(f"{where}evaluate: protocols begin with ridge, which leads in every comparison.")
        if finetune is not None:
            finetune = dict(finetune)
            lengths = coerce(finetune.pop("lengths", ()), tuple[float, ...], f"{where}finetune: lengths")
            finetune = _flags(finetune, Recipe, FINETUNE, f"{where}finetune")
        return cls(evaluate, finetune, lengths)

    def as_values(self) -> dict[str, Any]:
        tuning = (
            None if self.finetune is None else {**self.finetune, **({"lengths": self.lengths} if self.lengths else {})}
        )
        return {name: each for name, each in (("evaluate", self.evaluate), ("finetune", tuning)) if each is not None}

    def check(self, shape: Shape) -> None:
        """Raises UsageError where `daae finetune` would refuse its flags for an encoder of this size."""
        if self.finetune is not None:
            Recipe(**self.finetune).of_size(shape).check()

    def of(self, length: float | None, *, longest: bool) -> dict[str, dict[str, Any]]:
        """What is asked of a run: "evaluate" and "finetune", each with its flags, or nothing."""
        tuned = length in self.lengths if self.lengths else longest
        wanted = {"evaluate": self.evaluate if longest else None, "finetune": self.finetune if tuned else None}
        return {name: plain(flags) for name, flags in wanted.items() if flags is not None}


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as they are typed."""
    found: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", *map(str, value if isinstance(value, (tuple, list)) else [value])]
    return found


def _flags(values: Mapping[str, Any], kind: type, known: Collection[str], where: str) -> dict[str, Any]:
    hints, found = typing.get_type_hints(kind), {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{where}: {name} is unknown.{nearest(str(name), known)}")
        found[name] = coerce(value, hints[name], f"{where}: {name}")
    return found
