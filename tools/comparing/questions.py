"""What an experiment asks of its runs once they are trained, beside the score that leads: `evaluate` and `finetune`.

    evaluate: {label_share: [0.01, 0.1], agreement: 0.5}         flags of `daae evaluate`, of each arm's longest runs
    finetune: {epochs: 20, batch: 256, lengths: [240, 480]}      flags of `daae finetune`, of the runs of these lengths
    finetune: {epochs: 20, lengths: {mae: [480], daae: [240]}}   of these runs of each arm, and of no other arm
    finetune: {epochs: 20, batch: 256, folds: true}              without tests: each fifth is held out in turn

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

ANSWERS = {"evaluate": "evaluation", "finetune": "finetune"}  # keys of an experiment file -> of a record
TUNED = "finetuned"  # in a run folder, with what tells its flags: what `daae finetune` leaves
# Not the feature: what leads has to be asked of every run alike.
EVALUATE = ("protocols", "neighbours", "label_share", "folds", "exits", "agreement", "quarters")
FINETUNE = tuple(each.name for each in dataclasses.fields(Recipe) if each.name != "seed")  # that is the run's


@dataclass(frozen=True)
class Questions:
    """Flags by field name, of their type; None: not asked at all."""

    evaluate: dict[str, Any] | None = None
    finetune: dict[str, Any] | None = None
    lengths: tuple[float, ...] | dict[str, tuple[float, ...]] = ()
    """Of the runs that are fine-tuned, or of those of each arm; none: each arm's longest."""

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
            finetune, folds = dict(finetune), finetune.get("folds", False)
            finetune.pop("folds", None)
            lengths, told = finetune.pop("lengths", ()), f"{where}finetune: lengths"
            if isinstance(lengths, Mapping):
                lengths = {str(arm): coerce(each, tuple[float, ...], f"{told}: {arm}") for arm, each in lengths.items()}
            else:
                lengths = coerce(lengths, tuple[float, ...], told)
            finetune = _flags(finetune, Recipe, FINETUNE, f"{where}finetune")
            if coerce(folds, bool, f"{where}finetune: folds"):
                finetune["folds"] = True
        return cls(evaluate, finetune, lengths)

    def as_values(self) -> dict[str, Any]:
        tuning = self.finetune
        if tuning is not None and self.lengths:
            tuning = {**tuning, "lengths": plain(self.lengths)}
        return {name: each for name, each in (("evaluate", self.evaluate), ("finetune", tuning)) if each is not None}

    def check_arms(self, arms: Collection[str]) -> None:
        """Raises UsageError where lengths are asked of an arm that there is not."""
        for arm in self.lengths if isinstance(self.lengths, dict) else ():
            if arm not in arms:
                raise UsageError(f"finetune: lengths: there is no arm {arm}.{nearest(arm, arms)}")

    def check(self, shape: Shape, *, tests: bool, several: bool) -> None:
        """Raises UsageError where the commands would refuse these flags for an encoder of this size.

        tests: there are test stores. several: there are runs of several lengths.
        """
        if several and (self.evaluate or {}).get("folds"):
            raise UsageError("evaluate: folds are for one length: the longest runs would be scored on other pictures.")
        if tests and any((flags or {}).get("folds") for flags in (self.evaluate, self.finetune)):
            raise UsageError("folds hold out a part of the training images: that is for experiments without `tests`.")
        if self.finetune is not None:
            Recipe(**{name: each for name, each in self.finetune.items() if name != "folds"}).of_size(shape).check()

    def of(self, arm: str, length: float | None, *, longest: bool) -> dict[str, dict[str, Any]]:
        """What is asked of a run: "evaluate" and "finetune", each with its flags, or nothing."""
        lengths = self.lengths.get(arm, ()) if isinstance(self.lengths, dict) else self.lengths
        tuned = length in lengths if self.lengths else longest
        wanted = {"evaluate": self.evaluate if longest else None, "finetune": self.finetune if tuned else None}
        return {name: plain(flags) for name, flags in wanted.items() if flags is not None}


def typed(flags: Mapping[str, Any]) -> list[str]:
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
