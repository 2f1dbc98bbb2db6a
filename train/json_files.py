"""JSON that a run or a comparison writes, read as far as it goes: a crash may have torn it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file; a last line that is torn is no row, and a file that is not there has none."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_object(path: Path) -> dict:
    """A JSON object; empty where the file is missing or torn."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
