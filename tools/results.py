"""The tables in README and docs, from the comparisons that are kept: `python -m tools.results [--write]`.

docs/records/NAME holds what `daae compare` left of one: experiment.yaml and records.jsonl. Its table stands between the
lines `<!-- results of NAME -->` and `<!-- end of results -->`, wherever a page has them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.staging import write_whole
from tools.compare import HEADINGS, rows
from tools.records import RECORDS, read_study
from tools.verdict import leading_name, verdict, warnings
from train.command import parse, run

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "docs/records"
BLOCK = re.compile(r"(<!-- results of (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


@dataclass(frozen=True)
class Results:
    """Print the table of every comparison that is kept."""

    write: bool = False
    """Put each where README and docs have its place."""


def main(argv: list[str]) -> int:
    flags = parse(Results, argv, prog="python -m tools.results")
    for page in pages() if flags.write else ():
        write_whole(page, filled(page.read_text()))
    if not flags.write:
        for folder in sorted(path.parent for path in KEPT.glob(f"*/{RECORDS}")):
            print(f"{folder.name}\n\n{markdown(folder)}")
    return 0


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def filled(text: str) -> str:
    """A page with its tables made anew. Raises DataError where it wants a comparison that is not kept."""
    return BLOCK.sub(lambda found: found[1] + markdown(KEPT / found[2]) + found[3], text)


def markdown(folder: Path) -> str:
    """A table of a comparison and what it comes to, in words. Raises DataError."""
    if not (folder / RECORDS).exists():
        raise DataError(f"{folder} holds no comparison ({RECORDS}), and a page asks for its table.")
    study = read_study([folder])
    lines = [f"{leading_name(study)}, %:", "", _row(HEADINGS), _row(["---", *["---:"] * (len(HEADINGS) - 1)])]
    lines += [_row([f"`{cells[0].strip()}`" if own else cells[0].strip(), *cells[1:]]) for own, cells in rows(study)]
    answer = verdict(study)
    caveats = [f"- {each}" for each in warnings(study)]
    return "\n".join([*lines, "", f"{answer.sentence} {answer.meaning}", "", *caveats, *[""] * bool(caveats)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(run(main))
