"""Tables on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def plain_table() -> Table:
    """Columns without lines: what is printed below a sentence."""
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))


def page_table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Headings and rows as lines of Markdown. sides: l or r for each column."""
    headings, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [headings, ["---" if side == "l" else "---:" for side in sides], *others]
    return [f"| {' | '.join(cells)} |" for cells in lines]
