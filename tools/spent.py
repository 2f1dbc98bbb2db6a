"""What the training seconds of each arm went into: bars for the report, milliseconds an image."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from tools.charts import COLOURS
from tools.page import table
from tools.records import Group

ASIDE = ("evaluation", "checkpoint")  # not on the training clock


def milliseconds(group: Group) -> dict[str, float]:
    """Training milliseconds an image by part, mean over the arm's runs; empty where none has kept a ledger."""
    kept = [trial.metrics[-1] for trial in group.trials if trial.metrics and trial.metrics[-1].get("spent")]
    parts = dict.fromkeys(part for row in kept for part in row["spent"] if part not in ASIDE)
    return {
        part: statistics.fmean(1000 * row["spent"].get(part, 0.0) / row["images"] for row in kept) for part in parts
    }


def section(groups: Sequence[Group]) -> str:
    """HTML; nothing where no run has kept a ledger."""
    spent = {group.arm: parts for group in groups if (parts := milliseconds(group))}
    if not spent:
        return ""
    longest = max(sum(parts.values()) for parts in spent.values())
    shown = list(dict.fromkeys(part for parts in sorted(spent.values(), key=len, reverse=True) for part in parts))
    shades = {part: COLOURS[place % len(COLOURS)] for place, part in enumerate(shown)}
    bars = "".join(
        f'<div class="bar"><span>{escape(arm)}</span><div>'
        + "".join(
            f'<i style="width:{100 * parts[part] / longest:.2f}%;background:{shades[part]}" '
            f'title="{escape(part)}: {parts[part]:.3g} ms"></i>'
            for part in shown
            if part in parts
        )
        + "</div></div>"
        for arm, parts in spent.items()
    )
    legend = "".join(
        f'<span><i class="chip" style="background:{shades[part]}"></i>{escape(part)}</span>' for part in shown
    )
    rows = [
        [escape(arm), *(f"{parts.get(part, 0.0):.2f}" for part in shown), f"{sum(parts.values()):.2f}"]
        for arm, parts in spent.items()
    ]
    return (
        "<section><h2>Where the seconds went</h2><p>Training milliseconds an image, by part of the step; the encoder's "
        "and the decoder's own are forward only, and losses hold the heads. Evaluation and checkpoints are off this "
        f'clock.</p><p class="legend">{legend}</p>{bars}{table(["arm", *shown, "all"], rows)}</section>'
    )
