"""`daae methods`: what each method is, what it looks at and what that costs beside MAE, from its own description."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.errors import UsageError
from pipeline.masks import kept_count
from train.command import nearest, parse, run

if TYPE_CHECKING:
    from model.objectives import Objective

HEADINGS = ("", "idea", "views, px", "tokens", "FLOPs", "labels", "paper")
SIDES = "lllrrll"
BELOW = (
    "At each method's defaults with a ViT-B/16 at 224 px: patches that the encoder sees, FLOPs beside MAE's. "
    "adainf is a recipe and no --objective: its views and FLOPs are simclr's."
)


@dataclass(frozen=True)
class Methods:
    """Name the pre-training methods: idea, views, tokens, FLOPs beside MAE's, whether they need labels, paper."""

    measure: bool = False
    """Take steps of each in turns, and tell what one takes and keeps in memory beside MAE's."""
    only: tuple[str, ...] = ()
    """With --measure: these methods alone, beside MAE; default: all."""
    size: str = "vits16"
    """With --measure: of the presets, such as tiny or vits16."""
    batch: int = 16
    """With --measure: images of a step."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """With --measure: auto is what `daae pretrain` would take here."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True)
class Row:
    """A method at its defaults, with a ViT-B of patches of 16 at 224 px."""

    name: str
    idea: str
    views: str  # such as "2 x 224, 6 x 96"; a share that is hidden stands behind its view
    tokens: int  # patches that the encoder sees of an image, in all views
    cost: float  # FLOPs of a training step an image, MAE being 1
    supervised: bool
    paper: str

    @classmethod
    def of(cls, name: str, method: Objective, idea: str, paper: str) -> Row:
        from model.objectives.mae import MAE
        from train.presets import VIT_B

        views = method.views(VIT_B).values()
        sides = Counter(
            f"{view.side}" + (f" ({view.mask_ratio:.0%} hidden)" if view.mask_ratio else "") for view in views
        )
        return cls(
            name, idea, ", ".join(f"{count} x {side}" if count > 1 else side for side, count in sides.items()),
            sum(kept_count((view.side // VIT_B.patch) ** 2, view.mask_ratio) for view in views),
            round(method.macs(VIT_B) / MAE().macs(VIT_B), 2), method.supervised, paper,
        )  # fmt: skip

    def cells(self) -> list[str]:
        labels = "yes" if self.supervised else ""
        return [self.name, self.idea, self.views, f"{self.tokens}", f"{self.cost:.2f}", labels, self.paper]


def rows() -> list[Row]:
    """Every method, and AdaInf, which is a recipe on top of some of them."""
    from model.objectives import OBJECTIVES
    from model.objectives.simclr import SimCLR
    from train import adainf

    found = [Row.of(name, method(), method.idea, method.paper) for name, method in OBJECTIVES.items()]
    return [*found, Row.of(adainf.NAME, adainf.weaker(SimCLR()), adainf.IDEA, adainf.PAPER)]


def markdown() -> str:
    """The table as docs/methods.md has it; `python -m tools.results --write` puts it there."""
    from tools.tables import page_table

    cells = ([f"`{name}`", *others] for name, *others in (row.cells() for row in rows()))
    return "\n".join([*page_table([HEADINGS, *cells], SIDES), "", BELOW, ""])


def main(argv: list[str]) -> int:
    flags = parse(Methods, argv, prog="daae methods")
    if flags.measure:
        return _measure(flags)
    found = rows()
    if flags.json:
        print(json.dumps({row.name: asdict(row) for row in found}, indent=1))
        return 0
    from rich.console import Console

    from tools.tables import plain_table

    table = plain_table()
    for heading, side in zip(HEADINGS, SIDES, strict=True):
        table.add_column(heading, justify="right" if side == "r" else "left")
    for row in found:
        table.add_row(*row.cells())
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(table)
    console.print(BELOW)
    return 0


def _measure(flags: Methods) -> int:
    from model.objectives import OBJECTIVES
    from train.device import choose_device, choose_precision, device_name

    for name in flags.only:
        if name not in OBJECTIVES:
            raise UsageError(f"--only {name} is no method.{nearest(name, OBJECTIVES)}")
    if flags.batch < 2:
        raise UsageError(f"--batch {flags.batch}: at least 2.")
    from tools.profiling.method_costs import measure

    device = choose_device("auto")
    precision = choose_precision(flags.precision, device)
    found = measure(list(flags.only or OBJECTIVES), flags.size, flags.batch, precision)
    if flags.json:
        from tools.profile import record

        costs = {each.preset: {**asdict(each), "speed": each.speed} for each in found}
        told = {"batch": flags.batch, "precision": precision, "methods": costs}
        print(json.dumps(record(str(device), told), indent=1))
        return 0
    from tools.tables import plain_table, print_whole

    table = plain_table()
    for heading in ("", "FLOPs", "seconds", "least", "most", "speed", "images/s", "kept, MB an image"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in found:
        seconds = [f"{value:.2f}" for value in (each.seconds.median, each.seconds.min, each.seconds.max)]
        rate, kept = f"{each.images_per_second:,.1f}", f"{each.saved_mb:.1f}"
        table.add_row(each.preset, f"{each.flops:.2f}", *seconds, f"{each.speed:.2f}", rate, kept)
    print_whole(table)
    print(
        f"FLOPs and seconds of a step beside MAE's, batch {flags.batch}, {precision}, {device_name(device)}; "
        "speed: of what its FLOPs foretell. Kept: by the forward pass, for the backward pass."
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
