"""What the training seconds of each arm went into: bars for the report, milliseconds an image."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from tools.charts import COLOURS
from tools.comparing.records import Group
from tools.page import table

ASIDE = ("start-up", "evaluation", "checkpoint")  # not on the training clock


def milliseconds(group: Group) -> dict[str, float]:
    """Training milliseconds an image by part, mean over the arm's runs; empty where none has kept a ledger."""
    kept = [trial for trial in group.trials if trial.spent]
    parts = dict.fromkeys(part for trial in kept for part in trial.spent if part not in ASIDE)
    return {part: statistics.fmean(1000 * run.spent.get(part, 0.0) / run.images for run in kept) for part in parts}


def beside(group: Group) -> list[str]:
    """Mean over the arm's runs of what was off the clock, seconds, of the share of the device's products, and of GB."""
    aside = [[trial.spent[part] for trial in group.trials if part in trial.spent] for part in ASIDE]
    mfu, memory = ([t.ledger[name] for t in group.trials if t.ledger.get(name)] for name in ("mfu", "memory_gb"))
    cells = [(values, "{:,.1f}") for values in aside] + [(mfu, "{:.0%}"), (memory, "{:.1f}")]
    return [form.format(statistics.fmean(values)) if values else "–" for values, form in cells]


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
    off = [[escape(group.arm), *beside(group)] for group in groups if group.arm in spent]
    headings = ["arm", *(f"{part}, s" for part in ASIDE), "MFU", "peak memory, GB"]
    return (
        "<section><h2>Where the seconds went</h2><p>Training milliseconds an image, by part of the step; the encoder's "
        "and the decoder's own are forward only, and losses include the heads.</p>"
        f'<p class="legend">{legend}</p>{bars}{table(["arm", *shown, "all"], rows)}'
        "<p>Off this clock, a run: start-up, from the process to its first step, summed over restarts; evaluation and "
        "checkpoints. MFU: the share of the device's measured peak FLOP/s that the step's formula comes to.</p>"
        f"{table(headings, off)}</section>"
    )
