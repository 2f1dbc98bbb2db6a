"""`daae profile --step`: what the seconds of a training step go into, and how near it is to the machine's limit."""

from __future__ import annotations

import dataclasses
import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.staging import write_whole
from tools.charts import COLOURS
from train.ledger import PARTS
from train.timing import Spread

if TYPE_CHECKING:
    from train.config import Run

ROUNDS = 5


@dataclass(frozen=True)
class StepProfile:
    """Medians over the rounds."""

    preset: str
    device_name: str
    precision: str
    compiled: bool
    batch: int
    images_per_second: Spread
    milliseconds: dict[str, float]  # of a step, by part; they sum to the whole
    gflop_per_image: float  # 6 x the documented multiply-accumulates
    gemm_tflops: float  # the machine's ceiling, measured just before
    memory_gb: float
    rounds: int

    @property
    def tflops(self) -> float:
        return self.images_per_second.median * self.gflop_per_image / 1000

    @property
    def mfu(self) -> float:
        """Share of the measured ceiling, not of a data sheet's."""
        return self.tflops / self.gemm_tflops


def profile_step(run: Run, seconds: float, batch: int | None) -> StepProfile:
    """Steps on one batch of random pictures that stays on the device, for so many seconds.

    run: resolved. Raises ResourceError where no batch fits.
    """
    import torch

    from train.ceiling import gemm_flops
    from train.device import device_name, memory_gb
    from train.rehearsal import Machine, fit_batch

    device = torch.device(run.device)
    machine = Machine(run, device)
    size = batch or fit_batch(machine, max(1.0, seconds / ROUNDS / 2))
    pictures = machine.random_batch(size)
    machine.compile()
    for _ in range(2):
        machine.step(pictures)
    ceiling = gemm_flops(device, run.precision)
    rates, spent = [], []
    for _ in range(ROUNDS):
        before = machine.stepper.ledger.read()
        sample = machine.time(lambda: pictures, machine.step, seconds / ROUNDS)
        steps, after = sample.images / size, machine.stepper.ledger.read()
        parts = {name: 1000 * (after[name] - before.get(name, 0.0)) / steps for name in after}
        parts["other"] = 1000 * sample.seconds / steps - sum(parts.values())
        rates.append(sample.images / sample.seconds)
        spent.append(parts)
    return StepProfile(
        run.preset, device_name(device), run.precision, run.speed.compile, size,
        Spread.of(rates),
        {name: statistics.median(each[name] for each in spent) for name in PARTS if name in spent[0]},
        6 * run.method.macs(run.model) / 1e9, ceiling / 1e12, memory_gb(device)[0], ROUNDS,
    )  # fmt: skip


def write_trace(run: Run, batch: int, path: Path) -> None:
    """Three steps as a trace that chrome://tracing and ui.perfetto.dev read."""
    import torch
    from torch.profiler import ProfilerActivity

    from train.rehearsal import Machine

    device = torch.device(run.device)
    machine = Machine(run, device)
    pictures = machine.random_batch(batch)
    machine.compile()
    for _ in range(2):
        machine.step(pictures)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=kinds) as trace:
        for _ in range(3):
            machine.step(pictures)
        machine.settle()
    trace.export_chrome_trace(str(path))


def as_json(measured: StepProfile) -> dict[str, Any]:
    return {**dataclasses.asdict(measured), "tflops": measured.tflops, "mfu": measured.mfu}


def sentence(measured: StepProfile) -> str:
    largest = max(measured.milliseconds, key=lambda name: measured.milliseconds[name])
    share = measured.milliseconds[largest] / sum(measured.milliseconds.values())
    return (
        f"{measured.images_per_second.median:,.0f} images/s: {measured.tflops:.3g} TFLOP/s, {measured.mfu:.0%} of the "
        f"{measured.gemm_tflops:.3g} that this machine multiplies in {measured.precision}; the largest part of a "
        f"step is {largest}, {share:.0%}."
    )


def show(measured: StepProfile) -> None:
    from rich.console import Console

    from tools.tables import plain_table

    whole = sum(measured.milliseconds.values())
    table = plain_table()
    for heading in ("", "ms a step", "share", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, spent in measured.milliseconds.items():
        table.add_row(name, f"{spent:,.1f}", f"{spent / whole:.0%}", "█" * round(40 * spent / whole))
    out = Console(highlight=False)
    compiled = ", compiled" if measured.compiled else ""
    out.print(
        f"[bold]{measured.preset}[/bold], batch {measured.batch:,}, {measured.precision}{compiled} on "
        f"{measured.device_name}; {measured.gflop_per_image:.2f} GFLOP an image, {measured.memory_gb:.1f} GB\n"
    )
    out.print(table)
    out.print()
    out.print(sentence(measured), style="bold", soft_wrap=True)


def write_picture(path: Path, measured: StepProfile) -> None:
    """The parts as one bar each, PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        names = list(measured.milliseconds)
        figure = Figure(figsize=(8.6, 0.8 + 0.42 * len(names)), dpi=110)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.barh(names, list(measured.milliseconds.values()), 0.62, color=COLOURS[0])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a step")
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
