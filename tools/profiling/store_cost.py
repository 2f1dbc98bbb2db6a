"""What a store's side and quality cost: the score of a short run on it, beside the pictures as they are.

    python -m tools.profiling.store_cost TRAIN VAL --out OUT --preset daae-vitti16 --epochs 4

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

from pipeline.errors import DataError, UsageError
from tools.children import PassOn, call
from train.command import parse, run
from train.json_files import read_object

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


Choice = tuple[int, int]  # longer side in pixels, JPEG quality


def main(argv: list[str]) -> int:
    flags = parse(StoreCost, argv, prog="python -m tools.profiling.store_cost")
    choices = [encoding(each) for each in flags.choices]
    flags.out.mkdir(parents=True, exist_ok=True)
    val = flags.out / "stores/val"
    with PassOn() as stop:
        convert(flags.val, val, (AS_IS, 95), stop)
        for choice in choices:
            convert(flags.train, store_of(flags, choice), choice, stop)
        for seed in flags.seeds:
            for choice in choices:
                folder = run_of(flags, choice, seed)
                words = ["--preset", flags.preset, "--data", str(store_of(flags, choice)), "--tests", str(val)]
                words += [] if flags.config is None else ["--config", str(flags.config)]
                words += ["--epochs", f"{flags.epochs:g}", "--seed", str(seed), "--evaluations", "1"]
                call(["train.pretrain", *words, "--out", str(folder)], str(folder), folder, stop)
    found = summary(flags, choices)
    if flags.json:
        trained = read_object(run_of(flags, choices[0], flags.seeds[0]) / "env.json")  # where, with what and when
        told = {"preset": flags.preset, "epochs": flags.epochs, "seeds": flags.seeds, "stores": found}
        print(json.dumps({**told, "environment": trained}))
    else:
        show(found)
    return 0


def encoding(words: str) -> Choice:
    """ "500:90" -> (500, 90). Raises UsageError."""
    with contextlib.suppress(ValueError):
        side, quality = map(int, words.split(":"))
        return side, quality
    raise UsageError(f"--choices wants SIDE:QUALITY, not {words!r}.")


def store_of(flags: StoreCost, choice: Choice) -> Path:
    return flags.out / "stores/train-{}-q{}".format(*choice)


def run_of(flags: StoreCost, choice: Choice, seed: int) -> Path:
    return flags.out / "runs/{}-q{}-seed{}".format(*choice, seed)


def convert(source: Path, store: Path, choice: Choice, stop: PassOn) -> None:
    words = ["--max-side", str(choice[0]), "--quality", str(choice[1]), "--backends", "dali", "--quiet"]
    call(["tools.convert", str(source), str(store), *words], f"the conversion of {source}", store, stop)


def summary(flags: StoreCost, choices: list[Choice]) -> list[dict]:
    """Of each store its bytes, its scores in percent by seed, and by how much they differ from the first store's,
    seed by seed: what the seeds have in common does not count. Raises DataError."""
    found: list[dict] = []
    for choice in choices:
        ends = [read_object(run_of(flags, choice, seed) / "evaluation.json") for seed in flags.seeds]
        if any(end.get("leading") is None for end in ends):
            raise DataError(f"{flags.val} has no labels, so nothing can be scored on it.")
        scores = [100 * end["leading"]["value"] for end in ends]
        first = found[0]["scores"] if found else scores
        differences = [one - other for one, other in zip(scores, first, strict=True)]
        found.append({
            "max_side": None if choice[0] == AS_IS else choice[0], "quality": choice[1],
            "bytes": sum(path.stat().st_size for path in store_of(flags, choice).glob("*.tar")),
            "scored_by": ends[0]["leading_name"], "scores": scores,
            "mean": statistics.mean(scores), "standard_error": standard_error(scores),
            "test_error": 100 * ends[0]["leading"]["standard_error"],
            "difference": statistics.mean(differences), "difference_error": standard_error(differences),
        })  # fmt: skip
    return found


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None where there is but one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def show(found: list[dict]) -> None:
    print(f"{found[0]['scored_by']}, %; ± standard error over seeds")
    for one in found:
        side = "as it is" if one["max_side"] is None else f"{one['max_side']} px"
        scores = " ".join(f"{value:.1f}" for value in one["scores"])
        print(
            f"{side:<9} q{one['quality']}  {one['bytes'] / 1e6:8.1f} MB  {scores}  mean {one['mean']:.1f}"
            f"{plus_minus(one['standard_error'])} (test set{plus_minus(one['test_error'])})  "
            f"difference {one['difference']:+.1f}{plus_minus(one['difference_error'])}"
        )


def plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.1f}"


if __name__ == "__main__":
    sys.exit(run(main))
