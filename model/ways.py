"""Names of the ways to attend (attention.py has them), and how a setting spells which is used where. No torch here."""

from __future__ import annotations

import re

from pipeline.errors import UsageError

WAYS = ("any", "products", "flash", "efficient", "cudnn")  # any: torch chooses


def parse_ways(text: str) -> dict[tuple[int, ...] | None, str]:
    """ "12x50x64=products 16x197x32=any" -> by heads, tokens and width of a head; one name alone is for every length.

    Raises UsageError.
    """
    found: dict[tuple[int, ...] | None, str] = {}
    for word in text.split():
        lengths, _, way = word.rpartition("=")
        if way not in WAYS or (lengths and not re.fullmatch(r"\d+x\d+x\d+", lengths)):
            raise UsageError(f"--speed.attention {word}: auto, {', '.join(WAYS)}, or HEADSxTOKENSxWIDTH=WAY of these.")
        found[tuple(map(int, lengths.split("x"))) if lengths else None] = way
    return found
