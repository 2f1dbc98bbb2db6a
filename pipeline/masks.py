"""How many patches a mask leaves, for whoever counts them before there is a picture."""

from __future__ import annotations


def kept_count(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: MAE rounds down (int(N (1 - ratio)))."""
    return int(patches * (1 - mask_ratio))
