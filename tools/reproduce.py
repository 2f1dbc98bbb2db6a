"""`daae reproduce`: is the 2x real here? The standard set, from nothing to a sentence."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.children import Stop
from tools.commands import DATA_SETS, PATIENCE_SECONDS, Commands
from tools.compare import summary
from tools.comparing.records import read_study
from tools.comparing.verdict import verdict, warnings
from train.command import parse, run

NAME = "emoji"
EXPERIMENTS = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Reproduce:
    """Train MAE, DAAE and DAAE without its decoder for several lengths and seeds; say whether the claim held here."""

    out: Path = Path("reproduce")
    """Images, stores, runs, records and the report; the same command goes on with what is there."""
    quick: bool = False
    """Short runs of two arms with two seeds, in a quarter of an hour on two cores: shows the way, settles nothing."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print one JSON object instead of the sentence."""


def main(argv: list[str]) -> int:
    flags = parse(Reproduce, argv, prog="daae reproduce")
    experiment = EXPERIMENTS / ("quick.yaml" if flags.quick else "standard.yaml")
    study, page = flags.out / experiment.stem, flags.out / f"{experiment.stem}.html"
    with Stop(PATIENCE_SECONDS) as stop:
        commands = Commands(flags.out, stop, "the reproduction", loud=False)
        parts, images = DATA_SETS[NAME], flags.out / "images" / NAME
        commands.call("fetch", NAME, str(images))
        store, tests = commands.stores(NAME, images, parts)
        words = ["--experiment", str(experiment), "--data", str(store), "--tests", *map(str, tests)]
        words += ["--device", flags.device] if flags.device else []
        commands.call("compare", *words, "--out", str(study))
        commands.call("report", str(study), "--html", str(page))
    found = read_study([study])
    answer = verdict(found)
    if flags.json:
        facts = {**asdict(answer), "warnings": warnings(found), "arms": summary(found)}
        print(json.dumps({"report": str(page), **facts}))
    else:
        print("\n".join([f"{answer.sentence} {answer.meaning}", *warnings(found), f"The report is {page}."]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
