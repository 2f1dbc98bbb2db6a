"""`make demo`: from nothing to a report, by the commands that a person would type, each printed before it runs.

    doctor -> fetch -> convert -> profile -> compare -> report

It may be stopped anywhere and called again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ResourceError, UsageError
from tools.children import PassOn
from tools.commands import DATA_SETS, PATIENCE_SECONDS, Commands, Parts
from tools.comparing.records import read_study
from tools.comparing.verdict import verdict
from train.command import nearest, parse, run
from train.journal import duration


@dataclass(frozen=True)
class Demo:
    """Fetch images, convert them, train MAE and DAAE for the same seconds, score both and write a report."""

    data: str = "emoji"
    """emoji, elpv, imagenette, synthetic, or a folder of your own images."""
    out: Path = Path("demo")
    """Where everything goes."""
    seconds: float = 90.0
    """Training seconds of each run."""
    seeds: tuple[int, ...] = (0,)
    """Three give an interval, and take three times as long."""
    presets: tuple[str, ...] = ("mae-tiny", "daae-tiny")
    """The recipes to compare; the first is the baseline."""
    evaluations: int = 2
    """Scores taken during a run."""


def main(argv: list[str]) -> int:
    flags = parse(Demo, argv, prog="python -m tools.demo")
    start = time.monotonic()
    with PassOn(PATIENCE_SECONDS) as stop:
        study = tour(flags, Commands(flags.out, stop, "the demo"))
    answer = verdict(read_study([study]))
    print(
        f"\nDone in {duration(time.monotonic() - start)}. The report is {flags.out / 'report.html'}: {answer.sentence} "
        f"{answer.meaning} For other images: make demo DATA=/my/images (or elpv, imagenette, synthetic)."
    )
    return 0


def tour(flags: Demo, commands: Commands) -> Path:
    """Run the commands in their order. Returns the comparison's folder; raises what a failing command failed with."""
    name, source, parts = source_of(flags.data)
    commands.call("doctor")
    if source is None:
        source = flags.out / "images" / name
        commands.call("fetch", name, str(source))
    store, tests = commands.stores(name, source, parts)
    try:  # of a store that is there already nothing has been written yet
        flags.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"--out {flags.out} cannot be written: {error.strerror}.") from None
    bars = flags.out / f"profile-{name}.html"
    if not bars.exists():
        words = ["--data", str(store), "--preset", flags.presets[-1], "--seconds", "3", "--html", str(bars)]
        commands.call("profile", *words)
    study = flags.out / f"compare-{name}-{flags.seconds:g}s"
    words = ["--presets", *flags.presets, "--data", str(store)]
    words += ["--tests", *map(str, tests)] if tests else []
    words += ["--label", parts.label] if parts.label else []
    words += ["--seconds", f"{flags.seconds:g}", "--seeds", *map(str, flags.seeds)]
    commands.call("compare", *words, "--evaluations", str(flags.evaluations), "--out", str(study))
    commands.call("report", str(study), "--html", str(flags.out / "report.html"))
    return study


def source_of(wish: str) -> tuple[str, Path | None, Parts]:
    """The data set's name, its folder where it is the user's own, and its parts. Raises UsageError."""
    if wish in DATA_SETS:
        return wish, None, DATA_SETS[wish]
    folder = Path(wish).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"--data {wish} is neither a folder nor one of {', '.join(DATA_SETS)}.{nearest(wish, DATA_SETS)}"
        )
    return folder.resolve().name, folder, Parts("")


if __name__ == "__main__":
    sys.exit(run(main))
