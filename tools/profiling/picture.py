"""The stages of a profile as bars: milliseconds that an image spends in each, on a page or as a picture."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any

from pipeline.staging import write_whole
from tools import page
from tools.charts import COLOURS, FAINT, INK, inline
from tools.profile import NAMES, duration, limit_lines, number, rows
from tools.profiling.bottleneck import Measured, limit, percent, verdict

WAITED_FOR = COLOURS[1]  # the stage that limits the run; the others share one colour
LINE, EDGES = 0.42, 0.8  # inches: of a bar, and of everything above and below the bars


def write_picture(path: Path, measured: Measured) -> None:
    """Bars as a page that stands alone where the name ends in .html, else as PNG."""
    write_whole(path, document(measured) if path.suffix == ".html" else bars(measured, "png"))


def document(measured: Measured) -> str:
    facts = (
        f"{measured.preset}, batch {measured.batch:,}, {measured.precision} on {measured.device_name}; "
        f"{measured.images:,} images of {measured.stored_side:.0f} px, loader {NAMES[measured.backend]}, "
        f"{measured.workers} decoding threads, {measured.cores:g} cores. "
        f"An epoch takes {duration(measured.seconds_per_epoch)}."
    )
    figures = [
        [escape(name), number(stage.rate), f"{stage.cpu_ms_per_image:.2f}", percent(measured.share(stage)),
         percent(stage.data_wait) if name.startswith("both") else ""]
        for _, name, stage in rows(measured)
    ]  # fmt: skip
    svg = inline(bars(measured, "svg").decode(), "stages", "milliseconds of an image in each stage")
    sections = [
        f'<p class="kicker">Where do the seconds go?</p><h1>{escape(measured.preset)}</h1>'
        f'<div class="verdict"><p class="answer">{escape(verdict(measured))}</p></div>'
        f'<p class="facts">{escape(facts)}</p>',
        f'<section><h2>Milliseconds of an image</h2><figure class="chart">{svg}</figure></section>',
        "<section><h2>Figures</h2>"
        + page.table(["stage", "images/s", "CPU-ms/image", "share", "data-wait"], figures)
        + "<p>Share: of an image's seconds in loader and step together. Stages that overlap sum to more than all.</p>"
        "</section>",
        page.notes("What the machine could give", limit_lines(measured), ""),
    ]
    return page.document(f"Profile of {measured.preset}", sections, "Made by <code>daae profile</code>.")


def bars(measured: Measured, kind: str) -> bytes:
    """A bar for each stage, in the order in which an image meets them, as "svg" for a page or as "png"."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    stages, limited = rows(measured), limit(measured)
    on_page = kind == "svg"
    ink, faint = (INK, FAINT) if on_page else ("#16181d", "#646b78")
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "stages", "text.parse_math": False, "font.size": 11,
        "axes.edgecolor": faint, "axes.labelcolor": faint, "xtick.color": faint, "ytick.color": ink,
        "text.color": ink, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        height = EDGES + LINE * len(stages)
        figure = Figure(figsize=(8.6, height), dpi=110)
        figure.subplots_adjust(0.22, 0.75 * EDGES / height, 0.93, 1 - 0.05 * EDGES / height)
        (FigureCanvasSVG if on_page else FigureCanvasAgg)(figure)
        axes = figure.add_subplot()
        if on_page:
            figure.patch.set_alpha(0)
            axes.patch.set_alpha(0)
        places, clock = range(len(stages)), [1000 * stage.seconds_per_image for _, _, stage in stages]
        axes.barh(places, clock, 0.62, color=[WAITED_FOR if key == limited else COLOURS[0] for key, _, _ in stages])
        axes.scatter(
            [stage.cpu_ms_per_image for _, _, stage in stages], places, marker="|", s=160, color=ink, linewidths=2,
            label="of all CPU threads together",
        )  # fmt: skip
        for place, value in zip(places, clock, strict=True):
            beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
            axes.annotate(f"{value:.3g}", (value, place), **beside)
        axes.set_yticks(places, [name for _, name, _ in stages])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds an image")
        axes.legend(loc="lower right", frameon=False, fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if on_page else None)
    return buffer.getvalue()
