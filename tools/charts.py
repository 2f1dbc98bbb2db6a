"""Curves as SVG that stands inside a page: its ink follows the page's text colour, nothing in it points outside."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# Mid-tones that read on white and on near-black alike; also apart for the common colour blindnesses.
COLOURS = ("#3b82d6", "#e0772f", "#2f9e6e", "#b565c9", "#c9a227", "#d6497a", "#5aa9b8", "#8a7a66")
INK = "#010203"  # becomes the page's text colour
FAINT = "#040506"  # becomes its colour of rules and lesser words
POINTS = 6000  # on one chart, over all its lines


@dataclass(frozen=True)
class Line:
    """Points joined in order. `marked` puts a dot on each."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marked: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line with a name at its end."""

    y: float
    name: str


def chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    levels: Sequence[Level] = (),
    log_x: bool = False,
    small: bool = False,
    description: str = "",
) -> str:
    """An <svg> element for lines; `name` makes the ids in it its own. Text stays text and is escaped."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    # parse_math: an arm may be called "$lr$". path.simplify drops points that no eye can tell.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "path.simplify": True,
        "axes.edgecolor": FAINT, "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
        "text.color": INK, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.9) if small else (8.6, 3.9))
        # Fixed margins: matplotlib's own layout takes longer than all the drawing.
        figure.subplots_adjust(*((0.16, 0.18, 0.98, 0.96) if small else (0.08, 0.13, 0.985, 0.97)))
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.grid(True, color=FAINT, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        for line in lines:
            step = max(1, math.ceil(len(line.x) * len(lines) / POINTS))
            style = {"linewidth": 1.2, "alpha": 0.45} if line.faint else {"linewidth": 2.0, "alpha": 1.0}
            mark = {"marker": "o", "markersize": 5} if line.marked else {}
            axes.plot(
                list(line.x[::step]), list(line.y[::step]), color=line.colour, solid_joinstyle="round", **style, **mark
            )
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        for place, level in enumerate(sorted(levels, key=lambda each: each.y)):
            # Baselines lie close together: the name of the lowest goes under its line.
            under = place == 0 and len(levels) > 1
            axes.axhline(level.y, color=INK, linewidth=1.1, linestyle=(0, (5, 4)), alpha=0.6)
            axes.annotate(
                level.name, (1.0, level.y), xycoords=("axes fraction", "data"), xytext=(0, -3 if under else 3),
                textcoords="offset points", ha="right", va="top" if under else "bottom", fontsize=10, color=INK,
            )  # fmt: skip
        axes.margins(y=0.12 if levels else 0.05)  # room for a name below the lowest level
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return inline(buffer.getvalue(), name, description)


def inline(svg: str, name: str, description: str) -> str:
    """The bare <svg> of matplotlib's file: no prologue, no addresses, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    # An HTML parser knows the prefix only in this one spelling; plain href is the newer name of the same thing.
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    # The page's font and joins, coordinates to a hundredth of a point, no line breaks: a third of the bytes.
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    head, _, rest = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(description or name)}">{rest}'


def chip(arm: str, colours: dict[str, str]) -> str:
    """An arm's name behind a dot of its colour."""
    return f'<i class="chip" style="background:{colours[arm]}"></i>{escape(arm)}'


def legend(arms: Iterable[str], colours: dict[str, str]) -> str:
    return '<p class="legend">' + "".join(f"<span>{chip(arm, colours)}</span>" for arm in arms) + "</p>"
