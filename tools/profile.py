"""`daae profile`: loader alone, step alone, both together, interleaved on this machine; then what to change.

CPU-milliseconds per image stand beside images/s: they hardly move when others use the machine, and they predict what
more cores bring. Warm-up is done first and reported apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import ResourceError, UsageError
from train.command import parse, read_yaml, run

if TYPE_CHECKING:
    import torch

    from pipeline.loader import Backend, Loader
    from pipeline.store import Store
    from pipeline.views import Batch
    from train.config import Run

ROUNDS = 5
BALANCED = 0.10  # loader and step this close to one another: neither is the bottleneck
FREE_RIDE = 0.85  # together at least this share of the step alone: the loader costs the step nothing to speak of
NAMES = {"ffcv": "FFCV", "shards": "shards", "dali": "DALI", "resident": "resident"}


@dataclass(frozen=True)
class Profile:
    """Where do the seconds go? Times loader, step and both on this machine, names the bottleneck and what to change."""

    data: Path
    """Store made by `daae convert`."""
    preset: str = "mae-tiny"
    """Whose views, model and batch are timed; `daae pretrain --list-presets` names them."""
    config: Path | None = None
    """YAML of settings laid over the preset; config.yaml of a run folder fits."""
    seconds: float = 10.0
    """Of each of the three timings, after warm-up."""
    loader: Literal["auto", "ffcv", "shards", "dali", "resident", "all"] = "auto"
    """auto: the one that `daae pretrain` would take. all: compare those that work here."""
    batch: int | None = None
    """Images per step. Default: the preset's, or fewer where a step of it would take too long or not fit."""
    workers: int | None = None
    """Decoding threads, 0 chooses. Default: the preset's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """Default: the preset's."""
    compile: bool = False
    """torch.compile the loss, as `daae pretrain --compile` does."""
    peers: bool = False
    """Instead: our loader beside those of torchvision, FFCV and DALI, on this store's JPEGs, for --seconds each."""
    quiet: bool = False
    """No progress on the terminal."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True)
class Spread:
    """Over the rounds."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Stage:
    """One thing that was timed."""

    images_per_second: Spread
    cpu_ms_per_image: float  # of the whole process, all threads, user and system; median over the rounds
    data_wait: float = 0.0  # share of the seconds in which the step waited for the loader

    @property
    def rate(self) -> float:
        return self.images_per_second.median

    @property
    def cores(self) -> float:
        """How many cores were busy."""
        return self.rate * self.cpu_ms_per_image / 1000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a profile finds: enough for `verdict` to judge by."""

    preset: str
    device: str
    device_name: str
    precision: str
    can_bf16: bool  # the device has units for it
    compiled: bool
    batch: int  # images per timed step
    run_batch: int  # and per step of the run
    workers: int
    cores: float  # that this process may use
    threads: int  # of torch
    images: int  # in the store
    stored_side: float  # mean of the longer sides in it, pixels
    view_side: int  # of the largest view, pixels
    backend: str  # the loader that the run would take; of those in `loader` and `both`
    loader: dict[str, Stage]
    step: Stage
    both: dict[str, Stage]
    copy_images_per_second: float | None = None  # decoded pictures from host memory to a GPU
    memory_gb: float = 0.0  # CUDA: peak of the device. CPU: this process
    other_cores: float = 0.0  # taken by other processes while the machine had none to spare
    warm_up_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    rounds: int = ROUNDS

    @property
    def images_per_second(self) -> float:
        """What a run may reckon with."""
        return self.both[self.backend].rate

    @property
    def loader_rate(self) -> float:
        """Images/s of the loader alone: what it reaches beside the step it reaches alone too, whatever a round says."""
        return max(self.loader[self.backend].rate, self.images_per_second)

    @property
    def step_rate(self) -> float:
        """Images/s of the step alone. Beside other busy processes a round of it alone may even be the slower one."""
        return max(self.step.rate, self.images_per_second)

    @property
    def seconds_per_epoch(self) -> float:
        whole = self.images // self.run_batch * self.run_batch
        return (whole or self.images) / self.images_per_second


# --- the verdict ------------------------------------------------------------------------------------------------------


def verdict(measured: Measured) -> str:
    """What limits the run, by how much, and the setting to change with the gain to expect at most."""
    loader, step, both = measured.loader_rate, measured.step_rate, measured.both[measured.backend]
    wait = f"data-wait {percent(both.data_wait)}"
    if max(loader, step) <= (1 + BALANCED) * min(loader, step):
        together = f"{loader:,.0f} and {step:,.0f} images/s, {both.rate:,.0f} together"
        if both.rate < FREE_RIDE * min(loader, step):
            return (
                f"Balanced: loader and step are within 10 % ({together}, since they share {measured.cores:g} cores). "
                f"{_advice(_cheaper_loading(measured)) or 'More cores help both'}."
            )
        return f"Balanced: loader and step are within 10 % ({together}). Speeding up only one of them gains nothing."
    if loader < step:
        return (
            f"The loader limits this run: {loader:,.0f} images/s against the step's {step:,.0f} ({wait}). "
            f"{_loader_limits(measured)}."
        )
    if both.rate < FREE_RIDE * step and measured.device == "cpu":
        advice = _advice(_cheaper_loading(measured)) or "Use a GPU, or more cores"
        return (
            f"The step limits this run, and the loader takes cores from it: {both.rate:,.0f} images/s together, "
            f"{step:,.0f} without loading ({wait}). {advice}."
        )
    return (
        f"The step limits this run: {step:,.0f} images/s against the loader's {loader:,.0f} ({wait}). "
        f"A faster loader gains nothing; {_faster_step(measured)} (at most {_times(loader / step)}, "
        "then the loader limits)."
    )


def _loader_limits(measured: Measured) -> str:
    """The sentence that says why, if it is not plainly decoding, and what to change."""
    loader = measured.loader[measured.backend]
    copy = measured.copy_images_per_second
    if copy is not None and copy < 1.25 * loader.rate:
        remedies = [each for each in _cheaper_loading(measured) if each[1] != "workers"]
        what = f"It is the copy to the GPU, which manages {copy:,.0f} images/s alone"
        return f"{what}. {_advice(remedies) or 'Store smaller pictures, or use --loader dali'}"
    decodes_on_gpu = measured.device != "cpu" and measured.backend == "dali"
    idle = 1 - loader.cores / min(measured.workers, measured.cores)
    if idle > 0.5 and not decodes_on_gpu and not measured.other_cores:
        gain = _times(
            _together(measured, loader.rate / (1 - idle), loader.cpu_ms_per_image) / measured.images_per_second
        )
        return (
            f"Its threads wait {percent(idle)} of the time for the disk. "
            f"Put the store on a local disk or into memory, such as /dev/shm (up to {gain})"
        )
    advice = _advice(_cheaper_loading(measured))
    return advice or f"More cores gain up to {_times(measured.step_rate / measured.images_per_second)}"


Remedy = tuple[float, str, str]  # gain, kind, words


def _cheaper_loading(measured: Measured) -> list[Remedy]:
    """What would make loading faster or cheaper, with the gain of the whole run, largest first."""
    loader, now = measured.loader[measured.backend], measured.images_per_second
    cpu_ms, found = loader.cpu_ms_per_image, []
    for name, stage in measured.both.items():
        if name != measured.backend:
            found.append((stage.rate / now, "backend", f"pass --loader {name}"))
    workers = int(measured.cores)
    if workers > measured.workers and loader.rate < measured.step_rate:
        faster = _together(measured, loader.rate * workers / measured.workers, cpu_ms)
        found.append((faster / now, "workers", f"raise --workers from {measured.workers} to {workers}"))
    side = math.ceil(1.75 * measured.view_side / 16) * 16  # at 224: 400, which decodes 1.6 times as fast as 500
    if measured.stored_side > 1.1 * side:
        less = (measured.stored_side / side) ** 2  # decoding costs by the pixel
        faster = _together(measured, loader.rate * less, cpu_ms / less)
        found.append((faster / now, "side", f"convert again with --max-side {side}"))
    return sorted((one for one in found if one[0] >= 1 + BALANCED), reverse=True)


def _together(measured: Measured, loader_rate: float, cpu_ms: float) -> float:
    """Images/s of a run whose loader manages `loader_rate` alone at `cpu_ms` an image. On a CPU the two share cores."""
    rate = min(loader_rate, measured.step_rate)
    if measured.device == "cpu":
        step_ms = min(measured.step.cpu_ms_per_image, measured.both[measured.backend].cpu_ms_per_image)
        rate = min(rate, measured.cores * 1000 / (cpu_ms + step_ms))
    return rate


def _advice(remedies: list[Remedy]) -> str:
    """The two best as the beginning of a sentence; nothing where nothing helps."""
    best = [f"{words} (up to {_times(gain)})" for gain, _, words in remedies[:2]]
    sentence = ", or ".join(best)
    return sentence[:1].upper() + sentence[1:]


def _faster_step(measured: Measured) -> str:
    ways = []
    if measured.device == "cpu":
        if measured.threads < int(measured.cores):
            ways.append(f"all {int(measured.cores)} cores (torch has {measured.threads} of them: see OMP_NUM_THREADS)")
        ways.append("a GPU")
    elif not measured.compiled:
        ways.append("--compile")
    if measured.precision == "fp32" and measured.can_bf16:
        ways.append("--precision bf16")
    ways.append("a smaller --model.depth or --model.width")
    return f"use {', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else f"use {ways[0]}"


def _times(factor: float) -> str:
    return f"{factor:.1f}x" if factor < 9.95 else f"{factor:.0f}x"


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One round of one timing."""

    images: int
    seconds: float
    cpu_seconds: float
    wait_seconds: float


class Machine:
    """The device with a throwaway network on it: takes steps, and counts seconds honestly."""

    def __init__(self, wish: Run, device: torch.device):
        from model.network import Network
        from train.optim import make_optimizer

        self.run, self.device = wish, device
        self.network = Network(wish.method, wish.model, wish.seed).to(device).train()
        self.optimizer = make_optimizer(self.network, wish.optim, device)

    def step(self, batch: Batch) -> None:
        """Raises ResourceError where the batch does not fit the GPU."""
        import torch

        from train.step import train_step

        try:
            # Rate 0: the weights stay where they are, so that no round meets a network that diverged.
            train_step(self.run, self.network, self.optimizer, batch, self.device, lr=0.0)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            count = len(batch.id)
            raise ResourceError(
                f"a step of {count:,} images does not fit {self.device}. Use --batch {count // 2} or less."
            ) from None

    def random_batch(self, size: int) -> Batch:
        """Pictures of noise: arithmetic on zeros would run faster than on anything real."""
        import torch

        from pipeline.views import Batch

        images = {
            name: torch.randint(256, (size, view.side, view.side, 3), dtype=torch.uint8, device=self.device)
            for name, view in self.run.method.views(self.run.model).items()
        }
        return Batch(images, torch.full((size,), -1, device=self.device), torch.arange(size), 0)

    def settle(self) -> None:
        """CUDA calls return before the work is done."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def time(self, take: Callable[[], Batch], work: Callable[[Batch], None] | None, seconds: float) -> Sample:
        """Take batches, and work on them, for so many seconds, to the nearest batch and at least for one."""
        images, batches, waited, elapsed = 0, 0, 0.0, 0.0
        self.settle()
        cpu, start = time.process_time(), time.perf_counter()
        while batches == 0 or elapsed + elapsed / batches / 2 < seconds:
            asked = time.perf_counter()
            batch = take()
            waited += time.perf_counter() - asked
            if work is not None:
                work(batch)
            images, batches, elapsed = images + len(batch.id), batches + 1, time.perf_counter() - start
        self.settle()
        return Sample(images, time.perf_counter() - start, time.process_time() - cpu, waited)


def endless(loader: Loader, epoch: int) -> Generator[Batch]:
    """Epoch after epoch, with the hiccup between two of them that a run has too."""
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def summarise(samples: list[Sample]) -> Stage:
    rates = [each.images / each.seconds for each in samples]
    return Stage(
        Spread(statistics.median(rates), min(rates), max(rates)),
        statistics.median(1000 * each.cpu_seconds / each.images for each in samples),
        statistics.median(each.wait_seconds / each.seconds for each in samples),
    )


def fit_batch(machine: Machine, limit: float) -> int:
    """The run's batch, or the largest near it by doubling of which a step takes `limit` seconds and fits the memory.

    Nobody waits for a step of 4,096 images of a ViT-B on a CPU to learn that it is slow.
    """
    most = machine.run.optim.batch
    size = first = min(most, 16 * machine.run.optim.accumulate)
    crowded = False
    while True:
        pictures = machine.random_batch(size)
        try:
            machine.step(pictures)  # the first of a size allocates
            took = min(machine.time(lambda batch=pictures: batch, machine.step, 0.0).seconds for _ in range(2))
        except ResourceError:
            if size == first:
                raise
            size, crowded = max(first, size // 2), True
            continue
        if took > limit:
            return max(first, size // 2)
        if size == most or crowded or 2 * took > limit:
            return size
        size = min(most, size * 2 ** int(math.log2(limit / took)))


def copy_rate(machine: Machine, batch: int) -> float | None:
    """Images/s that host memory can send to the GPU: every view of a batch, from page-locked memory."""
    if machine.device.type != "cuda":
        return None
    crops = [image.cpu().pin_memory() for image in machine.random_batch(batch).images.values()]
    start, copies = time.perf_counter(), 0
    while copies < 3 or time.perf_counter() - start < 0.3:
        for crop in crops:
            crop.to(machine.device, non_blocking=True)
        machine.settle()
        copies += 1
    return copies * batch / (time.perf_counter() - start)


class Neighbours:
    """How many cores other processes took since it was made, if that left none free: then our rates are too low."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        import psutil

        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        return time.perf_counter(), sum(times[:8]) - idle, idle, time.process_time()

    def cores(self) -> float:
        seconds, busy, idle, own = (now - before for now, before in zip(self._now(), self.start, strict=True))
        others = (busy - own) / seconds
        return round(others, 1) if others > 0.2 and idle / seconds < 0.3 else 0.0


# --- the profile ------------------------------------------------------------------------------------------------------


def profile(flags: Profile) -> Measured:
    """Time everything that the flags ask for.

    Raises DataError, ResourceError and UsageError as `daae pretrain` would: nothing is profiled that cannot train.
    """
    import numpy as np
    import torch

    from pipeline.store import Store
    from tools.doctor import usable_cores
    from train.device import choose_precision, device_name, memory_gb, resolve

    store, wish = Store.open(flags.data), settings(flags)
    wish = resolve(wish, store)
    device, cores, warm_up = torch.device(wish.device), usable_cores(), {}
    # What open_loader does with 0 workers, done here so that the number is known.
    workers = wish.speed.workers or (1 if device.type == "cpu" else max(1, int(cores)))
    backends: list[Backend] = usable_backends(store) if flags.loader == "all" else [wish.loader]
    with telling(flags.quiet) as say, contextlib.ExitStack() as opened:
        say("finding the batch")
        with stopwatch(warm_up, "step"):
            machine = Machine(wish, device)
            batch = flags.batch or fit_batch(machine, max(1.0, flags.seconds / ROUNDS / 2))
        loaders = {}
        for name in backends:
            say(f"{NAMES[name]} starts")
            with stopwatch(warm_up, name):
                loaders[name] = open_warm(store, wish, name, batch, workers)
                opened.callback(loaders[name].close)
        say("the step starts" + (" and compiles" if wish.speed.compile else ""))
        with stopwatch(warm_up, "step"):
            resident, took = warm_step(machine, loaders[wish.loader])
        # Three timings of --seconds each, whatever is compared: with two loaders each of the five has less.
        share = 3 * flags.seconds / (1 + 2 * len(loaders))
        rounds = max(1, min(ROUNDS, int(share / took)))
        neighbours, samples = Neighbours(), []
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            samples.append(one_round(machine, loaders, resident, turn + 1, share / rounds))
        names, sizes = list(loaders), store.index
        return Measured(
            preset=wish.preset, device=str(device), device_name=device_name(device), precision=wish.precision,
            can_bf16=choose_precision("auto", device) == "bf16", compiled=wish.speed.compile,
            batch=batch, run_batch=wish.optim.batch, workers=workers, cores=cores, threads=torch.get_num_threads(),
            images=store.count,
            stored_side=float(np.maximum(sizes["height"], sizes["width"]).mean()),
            view_side=max(view.side for view in wish.method.views(wish.model).values()), backend=wish.loader,
            loader={name: summarise([each[f"loader {name}"] for each in samples]) for name in names},
            step=summarise([each["step"] for each in samples]),
            both={name: summarise([each[f"both {name}"] for each in samples]) for name in names},
            copy_images_per_second=copy_rate(machine, batch) if wish.loader in ("ffcv", "shards") else None,
            memory_gb=memory_gb(device)[0], other_cores=neighbours.cores(), warm_up_seconds=warm_up, rounds=rounds,
        )  # fmt: skip


def usable_backends(store: Store) -> list[Backend]:
    """Those that a store and this machine have all parts of; `resident` is asked for by name, since it takes memory."""
    from importlib.util import find_spec

    there: dict[Backend, bool] = {
        "ffcv": store.beton is not None,
        "shards": bool(store.shards),
        "dali": bool(store.shards) and find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None,
    }
    return [name for name, works in there.items() if works]


def open_warm(store: Store, wish: Run, backend: Backend, batch: int, workers: int) -> Loader:
    """A loader that has compiled what it compiles and made its first batches."""
    from pipeline.loader import open_loader

    loader = open_loader(
        store, wish.method.views(wish.model), batch=batch, seed=wish.seed, backend=backend, device=wish.device,
        workers=workers, stall_seconds=wish.speed.stall_seconds,
    )  # fmt: skip
    with contextlib.closing(endless(loader, 0)) as batches:
        for _ in range(2):
            next(batches)
    return loader


def warm_step(machine: Machine, loader: Loader) -> tuple[Batch, float]:
    """A real batch that stays on the device, and the seconds of a step on it once everything is allocated."""
    import torch

    with contextlib.closing(endless(loader, 0)) as batches:
        resident = next(batches)
    if machine.run.speed.compile:
        machine.network.compile(dynamic=False)
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)
    machine.step(resident)
    return resident, machine.time(lambda: resident, machine.step, 0.0).seconds


def one_round(machine: Machine, loaders: dict[Backend, Loader], resident: Batch, epoch: int, seconds: float) -> dict:
    """Each timing once, so that what disturbs the machine for a while disturbs all of them."""
    samples = {"step": machine.time(lambda: resident, machine.step, seconds)}
    for name, loader in loaders.items():
        with contextlib.closing(endless(loader, epoch)) as batches:
            next(batches)  # opens the epoch
            samples[f"loader {name}"] = machine.time(lambda source=batches: next(source), None, seconds)
        with contextlib.closing(endless(loader, epoch)) as batches:
            machine.step(next(batches))  # meanwhile the queue fills, as it is in the middle of a run
            samples[f"both {name}"] = machine.time(lambda source=batches: next(source), machine.step, seconds)
    return samples


def settings(flags: Profile) -> Run:
    """The run that is profiled: preset < --config < flags."""
    from train.config import with_values
    from train.presets import open_preset

    for name, value, least in (("batch", flags.batch, 1), ("workers", flags.workers, 0)):
        if value is not None and value < least:
            raise UsageError(f"--{name} is at least {least}, not {value}.")
    if not 0.1 <= flags.seconds <= 3600:
        raise UsageError(f"--seconds is from 0.1 to 3600, not {flags.seconds:g}.")
    wish = open_preset(flags.preset)
    if flags.config is not None:
        wish = with_values(wish, read_yaml(flags.config), str(flags.config))
    if flags.loader != "all":
        wish = replace(wish, loader=flags.loader if flags.loader != "auto" else wish.loader)
    speed = replace(
        wish.speed,
        workers=wish.speed.workers if flags.workers is None else flags.workers,
        compile=wish.speed.compile or flags.compile,
    )
    wish.model.check()
    optim = wish.optim if flags.batch is None else replace(wish.optim, batch=flags.batch)
    return replace(
        wish, data=flags.data, speed=speed, optim=optim, precision=flags.precision or wish.precision,
        device=flags.device if flags.device != "auto" else wish.device,
    )  # fmt: skip


@contextlib.contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 2)


@contextlib.contextmanager
def telling(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is going on, on stderr: one changing line on a terminal, nothing elsewhere (it is over in a minute)."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda doing: status.update(f"{doing} …")


# --- what is shown ----------------------------------------------------------------------------------------------------


def as_json(measured: Measured) -> dict:
    return {
        **dataclasses.asdict(measured),
        "seconds_per_epoch": measured.seconds_per_epoch, "images_per_second": measured.images_per_second,
        "verdict": verdict(measured),
    }  # fmt: skip


def show(measured: Measured, data: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("", "images/s", "min to max", "CPU-ms/image", "cores busy", "data-wait"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [(f"loader {NAMES[name]}", stage) for name, stage in measured.loader.items()]
    rows += [("step", measured.step)]
    rows += [(f"both   {NAMES[name]}", stage) for name, stage in measured.both.items()]
    for name, stage in rows:
        spread = stage.images_per_second
        table.add_row(
            name, number(stage.rate), f"{number(spread.min)} to {number(spread.max)}",
            f"{stage.cpu_ms_per_image:.2f}", f"{stage.cores:.1f}",
            percent(stage.data_wait) if name.startswith("both") else "",
        )  # fmt: skip
    out = Console(highlight=False, soft_wrap=False)
    workers = "1 worker" if measured.workers == 1 else f"{measured.workers} workers"
    out.print(
        f"[bold]{measured.preset}[/bold], batch {measured.batch:,}, {measured.precision} on {measured.device_name}"
    )
    rounds = f"{measured.rounds} interleaved rounds" if measured.rounds > 1 else "one round"
    out.print(
        f"{measured.images:,} images of {measured.stored_side:.0f} px, {workers}, {measured.cores:g} cores, "
        f"{rounds}, {measured.memory_gb:.1f} GB\n"
    )
    out.print(table)
    out.print()
    warm = ", ".join(f"{NAMES.get(name, name)} {took:.1f} s" for name, took in measured.warm_up_seconds.items())
    out.print(f"Warm-up, not counted: {warm}.", style="dim")
    if measured.batch != measured.run_batch:
        out.print(f"The batch of {measured.run_batch:,} was cut to {measured.batch:,} for this; --batch sets it.")
    if measured.other_cores:
        out.print(
            f"Other processes took {measured.other_cores:g} cores meanwhile: on a quiet machine images/s are higher.",
            style="yellow",
        )
    out.print(f"An epoch takes {duration(measured.seconds_per_epoch)}. To plan a run:")
    out.print(
        f"  daae pretrain --preset {measured.preset} --data {shlex.quote(str(data))} \\\n"
        f"    --dry-run --images-per-second {measured.images_per_second:.4g}\n",
        soft_wrap=True,
    )
    # A percentage is not torn from its sign at the end of a line.
    words = textwrap.fill(verdict(measured).replace(" %", "\xa0%"), out.width, break_on_hyphens=False)
    out.print(words.replace("\xa0", " "), style="bold", soft_wrap=True)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    from train.journal import duration as words

    return words(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def peers(flags: Profile) -> int:
    from pipeline.loader import usable_cores
    from tools.peers import compare_peers, show_peers

    workers, batch = flags.workers or usable_cores(), flags.batch or 128
    with telling(flags.quiet) as say:
        results = compare_peers(flags.data, seconds=flags.seconds, batch=batch, workers=workers, say=say)
    if flags.json:
        print(json.dumps({"workers": workers, "batch": batch, "seconds": flags.seconds, "views": results}))
    else:
        show_peers(results)
    return 0


def main(argv: list[str]) -> int:
    flags = parse(Profile, argv, prog="daae profile")
    if flags.peers:
        return peers(flags)
    measured = profile(flags)
    if flags.json:
        print(json.dumps(as_json(measured)))
    else:
        show(measured, flags.data)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
