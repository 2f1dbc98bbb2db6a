"""Tables on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDEST = 1000  # columns, of a table that nothing cuts


def plain_table() -> Table:
    """Columns without lines: what is printed below a sentence."""
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))


def width_of(table: Table) -> int:
    """Columns that it takes with nothing cut."""
    return Console(width=WIDEST).measure(table).maximum


def print_whole(table: Table) -> None:
    """Nothing is cut: a terminal that is narrower wraps."""
    Console(width=max(Console().width, width_of(table)), highlight=False).print(table)


def page_table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Headings and rows as lines of Markdown. sides: l or r for each column."""
    headings, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [headings, ["---" if side == "l" else "---:" for side in sides], *others]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def page_block(rows: Sequence[Sequence[str]], captions: Sequence[str]) -> list[str]:
    """Figures behind names as lines of Markdown, with where they come from folded away below."""
    where = ["<details><summary>Machine, versions, commands</summary>", "", *(f"- {each}" for each in captions)]
    return [*page_table(rows, "l" + "r" * (len(rows[0]) - 1)), "", *where, "", "</details>", ""]
