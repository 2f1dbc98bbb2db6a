"""How processes of ours are started: on our modules and the libraries', whatever lies in the working directory."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])


def python(*words: str) -> list[str]:
    """A command line of this interpreter.

    `python -m` looks into the working directory first, and there a user's `profile.py` or `queue.py` would stand in for
    the library of that name. So it does not, unless that is where this very process found us.
    """
    return [sys.executable, *([] if sys.path[0] == ROOT else ["-P"]), *words]
