"""What a store's side and quality cost: the score of a short run on it, beside the pictures as they are.

    python -m tools.store_cost TRAIN VAL --out OUT --preset daae-vitti16 --epochs 4

Converts TRAIN once for each choice and VAL once as it is, trains the same recipe on each store with each seed, and
scores all on the same VAL. Every step is a command of `daae` that finds what is done, so the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.errors import UsageError
from tools.children import Stop, call
from tools.records import read_object
from train.command import parse, run

AS_IS = 65535  # the largest side that a JPEG can have


@dataclass(frozen=True)
class StoreCost:
    """Score a short run on stores of several sides and JPEG qualities."""

    train: Annotated[Path, tyro.conf.Positional]
    """Labelled images to pre-train on."""
    val: Annotated[Path, tyro.conf.Positional]
    """Labelled images to score on."""
    out: Path
    """Folder of stores and runs."""
    choices: tuple[str, ...] = (f"{AS_IS}:95", "500:90", "400:85")
    """SIDE:QUALITY of each store; the others are compared with the first."""
    preset: str = "daae-vitti16"
    """Recipe of the runs."""
    epochs: float = 4.0
    seeds: tuple[int, ...] = (0, 1, 2)
    config: Path | None = None
    """YAML of settings laid over the preset."""
    json: bool = False
    """Print one JSON object instead of the table."""


def main(argv: list[str]) -> int:
    flags = parse(StoreCost, argv, prog="python -m tools.store_cost")
    stores = {choice: encoding(choice) for choice in flags.choices}
    flags.out.mkdir(parents=True, exist_ok=True)
    with Stop() as stop:
        val = flags.out / "stores" / "val"
        convert(flags.val, val, AS_IS, 95, stop)
        scores: dict[str, list[dict]] = {}
        for side, quality in stores.values():
            convert(flags.train, flags.out / "stores" / f"train-{side}-q{quality}", side, quality, stop)
        for seed in flags.seeds:
            for choice, (side, quality) in stores.items():
                folder = flags.out / "runs" / f"{side}-q{quality}-seed{seed}"
                words = ["--preset", flags.preset, "--data", str(flags.out / "stores" / f"train-{side}-q{quality}")]
                words += [] if flags.config is None else ["--config", str(flags.config)]
                words += ["--tests", str(val), "--epochs", f"{flags.epochs:g}", "--seed", str(seed)]
                words += ["--evaluations", "1", "--out", str(folder)]
                call(["train.pretrain", *words], str(folder), folder, stop)
                scores.setdefault(choice, []).append(read_object(folder / "evaluation.json"))
    found = [row(choice, flags, scores) for choice in flags.choices]
    if flags.json:
        print(json.dumps({"preset": flags.preset, "epochs": flags.epochs, "seeds": flags.seeds, "stores": found}))
    else:
        show(found)
    return 0


def encoding(choice: str) -> tuple[int, int]:
    """ "500:90" -> (500, 90). Raises UsageError."""
    with contextlib.suppress(ValueError):
        side, quality = map(int, choice.split(":"))
        return side, quality
    raise UsageError(f"--choices wants SIDE:QUALITY, not {choice!r}.")


def convert(source: Path, store: Path, side: int, quality: int, stop: Stop) -> None:
    words = ["--max-side", str(side), "--quality", str(quality), "--backends", "dali", "--quiet"]
    call(["tools.convert", str(source), str(store), *words], f"the conversion of {source}", store, stop)


def row(choice: str, flags: StoreCost, scores: dict[str, list[dict]]) -> dict:
    """One store's bytes, its scores in percent by seed, and the paired difference from the first store's."""
    side, quality = encoding(choice)
    mine, first = ([100 * one["leading"]["value"] for one in scores[each]] for each in (choice, flags.choices[0]))
    differences = [one - other for one, other in zip(mine, first, strict=True)]
    store = flags.out / "stores" / f"train-{side}-q{quality}"
    return {
        "max_side": None if side == AS_IS else side, "quality": quality, "scored_by": scores[choice][0]["leading_name"],
        "bytes": sum(path.stat().st_size for path in store.glob("*.tar")), "scores": mine,
        "mean": statistics.mean(mine), "standard_error": standard_error(mine),
        "test_error": 100 * scores[choice][0]["leading"]["standard_error"],
        "difference": statistics.mean(differences), "difference_error": standard_error(differences),
    }  # fmt: skip


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def show(found: list[dict]) -> None:
    print(f"{found[0]['scored_by']}, %; ± standard error over seeds")
    for one in found:
        side = "as it is" if one["max_side"] is None else f"{one['max_side']} px"
        scores = " ".join(f"{value:.1f}" for value in one["scores"])
        print(
            f"{side:<9} q{one['quality']}  {one['bytes'] / 1e6:8.1f} MB  {scores}  mean {one['mean']:.1f} "
            f"± {one['standard_error']:.1f} (test set ± {one['test_error']:.1f})  "
            f"difference {one['difference']:+.1f} ± {one['difference_error']:.1f}"
        )


if __name__ == "__main__":
    sys.exit(run(main))
