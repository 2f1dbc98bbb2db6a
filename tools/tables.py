"""Tables on a terminal."""

from __future__ import annotations

from rich.table import Table


def plain_table() -> Table:
    """Columns without lines: what is printed below a sentence."""
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
