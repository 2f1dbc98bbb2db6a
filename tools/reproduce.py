"""`daae reproduce`: is the 2x real here? The standard set, from nothing to a sentence."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from pipeline.errors import DaaeError, NumericsError, UsageError
from pipeline.staging import write_whole
from tools.children import PassOn
from tools.commands import DATA_SETS, PATIENCE_SECONDS, Commands
from tools.comparing.doubts import warnings
from tools.comparing.records import read_study
from tools.comparing.table import summary
from tools.comparing.verdict import verdict
from train.command import parse, read_yaml, run

NAME = "emoji"
EXPERIMENTS = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Reproduce:
    """Train MAE, DAAE and DAAE without its decoder for several lengths and seeds; say whether the claim held here."""

    out: Path = Path("reproduce")
    """Images, stores, runs, records and the report; the same command goes on with what is there."""
    quick: bool = False
    """Short runs of two arms with two seeds, in a quarter of an hour on two cores: shows the way, settles nothing."""
    stretch: float | None = None
    """Train so many times as long; default: 1, and of the standard set 2 on a CPU without units for bf16, where eight
    minutes are too short for MAE to count."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print one JSON object instead of the sentence."""


def main(argv: list[str]) -> int:
    flags = parse(Reproduce, argv, prog="daae reproduce")
    if flags.stretch is not None and flags.stretch <= 0:
        raise UsageError(f"--stretch {flags.stretch:g}: wants a factor above 0.")
    experiment = EXPERIMENTS / ("quick.yaml" if flags.quick else "standard.yaml")
    study, page = flags.out / experiment.stem, flags.out / f"{experiment.stem}.html"
    failed = 0
    with PassOn(PATIENCE_SECONDS) as stop:
        commands = Commands(flags.out, stop, "the reproduction", loud=False)
        parts, images = DATA_SETS[NAME], flags.out / "images" / NAME
        commands.call("fetch", NAME, str(images))
        store, tests = commands.stores(NAME, images, parts)
        factor = flags.stretch or (1.0 if flags.quick else usual_stretch(flags.device))
        if factor != 1:
            print(f"Every run is {factor:g} times as long as {experiment.name} has it.", file=sys.stderr)
            experiment = stretched(experiment, factor, flags.out)
        words = ["--experiment", str(experiment), "--data", str(store), "--tests", *map(str, tests)]
        words += ["--device", flags.device] if flags.device else []
        try:
            commands.call("compare", *words, "--out", str(study))
        except DaaeError as error:
            if error.code != NumericsError.code:
                raise
            failed = error.code  # a run without a score; the others have theirs, and the report says so
        commands.call("report", str(study), "--html", str(page))
    found = read_study([study])
    answer = verdict(found)
    if flags.json:
        facts = {**asdict(answer), "warnings": warnings(found), "arms": summary(found)}
        print(json.dumps({"report": str(page), **facts}))
    else:
        print("\n".join([f"{answer.sentence} {answer.meaning}", *warnings(found), f"The report is {page}."]))
    return failed


def usual_stretch(device: str | None) -> float:
    """How much longer a run has to be here until every arm counts."""
    from train.device import choose_precision, find_device

    return 2.0 if choose_precision("auto", find_device(device or "auto")) == "fp32" else 1.0


def stretched(experiment: Path, factor: float, out: Path) -> Path:
    """The experiment with every length so many times as long, as a file in `out`."""
    values = read_yaml(experiment)
    values["seconds"] = [factor * each for each in values["seconds"]]
    for arm in values["arms"].values():
        if isinstance(arm, dict) and "also" in arm:
            arm["also"] = [factor * each for each in arm["also"]]
    out.mkdir(parents=True, exist_ok=True)
    path = out / experiment.name
    write_whole(path, yaml.safe_dump(values, sort_keys=False))
    return path


if __name__ == "__main__":
    sys.exit(run(main))
