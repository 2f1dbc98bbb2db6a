"""`daae profile`: every stage alone, the loader, the step, both together, interleaved; then what to change.

CPU-milliseconds per image stand beside images/s: they hardly move when others use the machine, and they predict what
more cores bring. Warm-up is done first and reported apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline import native
from pipeline.errors import UsageError
from pipeline.limits import usable_cores
from tools.profiling.bottleneck import (
    OURS,
    ROUNDS,
    Limit,
    Measured,
    Part,
    decoder_facts,
    limit,
    percent,
    pillow_note,
    verdict,
)
from train.command import parse, run
from train.timing import Neighbours, Stage, stopwatch, summarise

if TYPE_CHECKING:
    from pipeline.loader import Backend
    from train.config import Run

NAMES = {"ffcv": "FFCV", "shards": "shards", "dali": "DALI", "resident": "resident"}
PARTS: dict[Part, str] = {
    "storage": "read and check",
    "decode": "decode",
    "cut": "cut the views",
    "copy": "copy to the GPU",
}


@dataclass(frozen=True)
class Profile:
    """Where do the seconds go? Times loader, step and both on this machine, names the bottleneck and what to change."""

    data: Path | None = None
    """Store made by `daae convert`; --step alone needs none."""
    preset: str | None = None
    """Whose views, model and batch are timed; `daae pretrain --list-presets` names them. Default: the --config's, or
    mae-tiny."""
    config: Path | None = None
    """YAML of settings laid over the preset, as `daae pretrain` takes it; config.yaml of a run folder fits."""
    seconds: float = 10.0
    """Of each timing (stages, loader, step, both), after warm-up."""
    loader: Literal["auto", "ffcv", "shards", "dali", "resident", "all"] = "auto"
    """auto: the one that `daae pretrain` would take. all: compare those that work here."""
    batch: int | None = None
    """Images per step. Default: the preset's, or fewer where a step of it would take too long or not fit."""
    workers: int | None = None
    """Decoding threads, 0 chooses. Default: the preset's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None
    """Default: the preset's."""
    compile: bool = False
    """torch.compile the loss, as `daae pretrain --compile` does."""
    step: bool = False
    """Instead: what the seconds of the training step go into, and its share of what the machine can multiply."""
    trace: Path | None = None
    """With --step: write three steps as a trace for chrome://tracing or ui.perfetto.dev."""
    peers: bool = False
    """Instead: our loader beside those of torchvision, FFCV and DALI, on this store's JPEGs, for --seconds each. With
    --step: our step beside those of transformers and lightly, at the size of the preset."""
    knobs: bool = False
    """With --step: DAAE's step beside MAE's, by what makes it cheaper, at the size of the preset."""
    techniques: bool = False
    """With --step: what each thing gains that makes our step faster, by leaving it out, at the size of the preset."""
    tune: Path | None = None
    """Instead: try loaders, threads and batches ahead, and write the fastest as YAML that --config takes."""
    tune_seconds: float = 120.0
    """How long --tune may take."""
    views: Path | None = None
    """Instead: draw some images on their way to the encoder, as stored, cut, coloured and hidden, as a PNG."""
    html: Path | None = None
    """Write the stages as a page with a bar for each."""
    png: Path | None = None
    """Write the bars as a picture."""
    quiet: bool = False
    """No progress on the terminal."""
    json: bool = False
    """Print one JSON object instead of the table."""


# --- the profile ------------------------------------------------------------------------------------------------------


def profile(flags: Profile) -> Measured:
    """Time everything that the flags ask for.

    Raises DataError, ResourceError and UsageError as `daae pretrain` would: nothing is profiled that cannot train.
    """
    import numpy as np
    import torch

    from pipeline.loader import decoding_threads
    from tools.profiling.stages import Parts, machine_limits, one_round, open_warm, usable_backends, warm_step
    from train.data import open_store
    from train.device import choose_precision, device_name, memory_gb, resolve
    from train.rehearsal import Machine, fit_batch

    wish = settings(flags)
    store = open_store(wish)
    wish = resolve(wish, store)
    device, warm_up = torch.device(wish.device), {}
    workers = decoding_threads(wish.speed.workers, device)
    backends: list[Backend] = [wish.loader]  # pyright: ignore[reportAssignmentType]
    if flags.loader == "all":
        backends = list(dict.fromkeys([*backends, *usable_backends(store)]))
    with telling(flags.quiet) as say, contextlib.ExitStack() as opened:
        say("finding the batch")
        with stopwatch(warm_up, "step"):
            machine = Machine(wish, device)
            batch = flags.batch or fit_batch(machine, max(1.0, flags.seconds / ROUNDS / 2))
        loaders = {}
        for name in backends:
            say(f"{NAMES[name]} starts")
            with stopwatch(warm_up, name):
                loaders[name] = open_warm(store, replace(wish, loader=name, optim=replace(wish.optim, batch=batch)))
                opened.callback(loaders[name].close)
        say("the step starts" + (" and compiles" if wish.speed.compile else ""))
        with stopwatch(warm_up, "step"):
            resident, took = warm_step(machine, loaders[wish.loader])
        parts = Parts(loaders[wish.loader], wish, device)
        # Four timings of --seconds each, whatever is compared: with two loaders each of the six has less.
        share = 4 * flags.seconds / (2 + 2 * len(loaders))
        rounds = max(1, min(ROUNDS, int(share / took)))
        neighbours, samples = Neighbours(), []
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            samples.append(one_round(machine, loaders, parts, resident, turn + 1, share / rounds))
        others = neighbours.cores()
        say("the machine's limits")
        limits = machine_limits(loaders[wish.loader], device)

        def stage(name: str) -> Stage:
            return summarise([each[name] for each in samples])

        sizes = store.index
        return Measured(
            preset=wish.preset, device=str(device), device_name=device_name(device), precision=wish.precision,
            can_bf16=choose_precision("auto", device) == "bf16", compiled=wish.speed.compile,
            batch=batch, run_batch=wish.optim.batch, workers=workers, cores=usable_cores(),
            threads=torch.get_num_threads(), images=store.per_epoch,
            stored_side=float(np.maximum(sizes["height"], sizes["width"]).mean()),
            view_side=max(view.side for view in wish.method.views(wish.model).values()), backend=wish.loader,
            parts={part: stage(f"part {part}") for part in PARTS if f"part {part}" in samples[0]},
            views=stage("views"), step=stage("step"),
            loader={name: stage(f"loader {name}") for name in loaders},
            both={name: stage(f"both {name}") for name in loaders},
            limits=limits, memory_gb=memory_gb(device)[0], other_cores=others, warm_up_seconds=warm_up, rounds=rounds,
            no_decoder=native.why_not(),
        )  # fmt: skip


def check_flags(flags: Profile) -> None:
    """Raises UsageError before anything is opened."""
    for name, value, least in (("batch", flags.batch, 1), ("workers", flags.workers, 0)):
        if value is not None and value < least:
            raise UsageError(f"--{name} is at least {least}, not {value}.")
    for name, value in (("seconds", flags.seconds), ("tune-seconds", flags.tune_seconds)):
        if not 0.1 <= value <= 86400:
            raise UsageError(f"--{name} is from 0.1 to 86400, not {value:g}.")
    for name in ("html", "png", "tune", "views", "trace"):
        path: Path | None = getattr(flags, name)
        endings = {"tune": (".yaml", ".yml"), "views": (".png",), "trace": (".json",)}.get(name, (f".{name}",))
        if path is not None and path.suffix not in endings:
            raise UsageError(f"--{name} writes a {endings[0]} file, not {path.name}.")
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"--{name} {path}: there is no folder {path.parent}.")
    peers = flags.peers and not flags.step  # --step --peers is one wish
    others = (("tune", flags.tune), ("peers", peers), ("step", flags.step), ("views", flags.views))
    instead = [name for name, asked in others if asked]
    if len(instead) > 1 or (instead and flags.html) or (flags.png and instead and instead != ["step"]):
        raise UsageError(
            "--tune, --peers, --step and --views each do something else instead of a profile: pass one of them, "
            "without a picture (--step draws a --png)."
        )
    if (flags.trace is not None or flags.knobs or flags.techniques) and not flags.step:
        raise UsageError("--trace, --knobs and --techniques go with --step.")
    drawn = flags.trace is not None or flags.png is not None
    if flags.step and flags.peers + flags.knobs + flags.techniques + drawn > 1:
        raise UsageError("--step takes one of --peers, --knobs, --techniques, and a picture or trace.")
    if flags.data is None and not flags.step:
        raise UsageError("--data (a store made by `daae convert`) is required. See `daae profile --help`.")


def settings(flags: Profile) -> Run:
    """The run that is profiled: preset < --config < flags, as `daae pretrain` reads them."""
    from train.pretrain import read_flags

    preset = flags.preset or ("mae-tiny" if flags.config is None else None)
    words = [] if preset is None else ["--preset", preset]
    wish, _, _ = read_flags([*words, *([] if flags.config is None else ["--config", str(flags.config)])])
    if flags.loader != "all":
        wish = replace(wish, loader=flags.loader if flags.loader != "auto" else wish.loader)
    speed = replace(
        wish.speed,
        workers=wish.speed.workers if flags.workers is None else flags.workers,
        compile=wish.speed.compile or flags.compile,
    )
    optim = wish.optim if flags.batch is None else replace(wish.optim, batch=flags.batch)
    wish = replace(
        wish, data=flags.data, speed=speed, optim=optim, precision=flags.precision or wish.precision,
        device=flags.device if flags.device != "auto" else wish.device,
    )  # fmt: skip
    wish.check()
    return wish


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
        "limit": limit(measured), "verdict": verdict(measured), **decoder_facts(measured.no_decoder),
    }  # fmt: skip


def show(measured: Measured, flags: Profile) -> None:
    from rich.console import Console

    from tools.tables import plain_table, print_whole

    table = plain_table()
    for heading in ("", "images/s", "min to max", "CPU-ms/image", "share", "data-wait"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for _, name, stage in rows(measured):
        spread = stage.images_per_second
        table.add_row(
            name, number(stage.rate), f"{number(spread.min)} to {number(spread.max)}",
            f"{stage.cpu_ms_per_image:.2f}", percent(measured.share(stage)),
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
    print_whole(table)
    out.print("Share: of an image's seconds in loader and step together; stages that overlap sum to more than all.\n")
    for line in limit_lines(measured):
        out.print(line, style="dim")
    warm = ", ".join(f"{NAMES.get(name, name)} {took:.1f} s" for name, took in measured.warm_up_seconds.items())
    out.print(f"Warm-up, not counted: {warm}.", style="dim")
    if measured.batch != measured.run_batch:
        out.print(f"The batch of {measured.run_batch:,} was cut to {measured.batch:,} for this; --batch sets it.")
    if measured.no_decoder is not None and measured.backend in OURS:
        out.print(pillow_note(measured.no_decoder), style="yellow", markup=False)
    if measured.other_cores:
        cores = "a core" if measured.other_cores == 1 else f"{measured.other_cores:g} cores"
        out.print(
            f"Other processes took {cores} meanwhile: on a quiet machine images/s are higher.",
            style="yellow",
        )
    chosen = ["--preset", flags.preset or "mae-tiny"] if flags.preset or flags.config is None else []
    chosen += [] if flags.config is None else ["--config", str(flags.config)]
    out.print(f"An epoch takes {duration(measured.seconds_per_epoch)}. To plan a run:")
    out.print(
        f"  {shlex.join(['daae', 'pretrain', *chosen, '--data', str(flags.data)])} \\\n"
        f"    --dry-run --images-per-second {measured.images_per_second:.4g}\n",
        soft_wrap=True,
    )
    # A percentage is not torn from its sign at the end of a line.
    words = textwrap.fill(verdict(measured).replace(" %", "\xa0%"), out.width, break_on_hyphens=False)
    out.print(words.replace("\xa0", " "), style="bold", soft_wrap=True)


def rows(measured: Measured) -> list[tuple[Limit | None, str, Stage]]:
    """Every stage in the order in which an image meets them: which limit it can be, its name, its figures."""
    found: list[tuple[Limit | None, str, Stage]] = []
    for part, stage in measured.parts.items():
        found.append((part, PARTS[part], stage))
    for name, stage in measured.loader.items():
        found.append(("loader" if name == measured.backend else None, f"loader {NAMES[name]}", stage))
    found.append((None, "device views", measured.views))
    found.append(("step", "step, views included", measured.step))
    for name, stage in measured.both.items():
        found.append((None, f"both   {NAMES[name]}", stage))
    return found


def limit_lines(measured: Measured) -> list[str]:
    """What the machine could give at most."""
    from tools.profiling.stages import LIMITS

    return [f"{words}: {number(measured.limits[name])}" for name, words in LIMITS.items() if name in measured.limits]


def number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    from train.journal import duration as words

    return words(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def profile_steps(flags: Profile) -> int:
    from tools.profiling import step_profile
    from train.device import resolve

    wish = resolve(settings(flags), None)
    with telling(flags.quiet) as say:
        say("steps")
        measured = step_profile.profile_step(wish, flags.seconds, flags.batch)
        if flags.trace is not None:
            say("the trace")
            step_profile.write_trace(wish, measured.batch, flags.trace)
    if flags.json:
        print(json.dumps(record(wish.device, step_profile.as_json(measured)), indent=1))
    else:
        step_profile.show(measured)
    if flags.png is not None:
        step_profile.write_picture(flags.png, measured)
    return 0


def beside_steps(flags: Profile) -> int:
    """--step --peers, --step --knobs and --step --techniques."""
    import torch

    from tools.profiling import step_peers, step_records, techniques
    from train.ceiling import gemm_flops
    from train.device import resolve

    wish = settings(flags)
    step_peers.check_size(wish, flags.config)
    wish = resolve(wish, None)
    kind, measure = "peers", step_peers.compare_steps
    if flags.knobs:
        kind, measure = "knobs", step_peers.compare_knobs
    if flags.techniques:
        kind, measure = "techniques", techniques.compare_techniques
    task = step_peers.Task(
        step_peers.OURS, wish.preset, flags.batch or 32, wish.device, wish.precision, compiled=wish.speed.compile
    )
    with telling(flags.quiet) as say:
        say("the machine's limit")
        ceiling = gemm_flops(torch.device(wish.device), wish.precision)
        found = measure(task, seconds=flags.seconds, say=say)
        ceiling = max(ceiling, gemm_flops(torch.device(wish.device), wish.precision))  # one moment may be a slow one
    plain = step_peers.run_of(task)
    told = record(wish.device, {
        "preset": wish.preset, "batch": task.batch, "seconds": flags.seconds, "precision": wish.precision,
        "compiled": task.compiled, "gflop_per_image": 6 * plain.method.macs(plain.model) / 1e9,
        "gemm_tflops": ceiling / 1e12, kind: found,
    })  # fmt: skip
    if flags.json:
        print(json.dumps(told, indent=1))
    else:
        step_peers.show(step_records.caption(told), step_records.table([told]))
    return 0


def record(device: str, told: dict) -> dict:
    """What was measured, with machine, versions and command: what docs/records keeps."""
    import torch

    from tools.comparing.records import as_typed
    from train.device import device_name
    from train.journal import environment

    found = environment(device_name(torch.device(device)))
    return {**told, "environment": {**found, "command": as_typed(found["command"])}}


def peers(flags: Profile) -> int:
    from tools.profiling.peers import compare_peers, show_peers

    cores = max(1, int(usable_cores()))
    workers, batch = min(flags.workers or cores, cores), flags.batch or 128
    with telling(flags.quiet) as say:
        assert flags.data is not None
        results, costs, scaled, notes = compare_peers(
            flags.data, seconds=flags.seconds, batch=batch, workers=workers, say=say
        )
    if flags.json:
        told = {"workers": workers, "batch": batch, "seconds": flags.seconds, "views": results, "costs": costs}
        facts = {"threads": scaled, "notes": notes, **decoder_facts(native.why_not())}
        print(json.dumps(record("cpu", {**told, **facts}), indent=1))
    else:
        show_peers(results, costs, scaled, notes)
    return 0


def draw(flags: Profile) -> int:
    import torch

    from pipeline.views import check_views
    from train.data import open_store
    from train.device import resolve
    from train.gallery import draw_stages

    assert flags.views is not None
    wish = settings(flags)
    store = open_store(wish)
    wish = resolve(wish, store)
    check_views(wish.method.views(wish.model), wish.model.patch)
    print(draw_stages(flags.views, wish, store, torch.device(wish.device)))
    return 0


def main(argv: list[str]) -> int:
    flags = parse(Profile, argv, prog="daae profile")
    check_flags(flags)
    if flags.step:
        return beside_steps(flags) if flags.peers or flags.knobs or flags.techniques else profile_steps(flags)
    if flags.peers:
        return peers(flags)
    if flags.views is not None:
        return draw(flags)
    if flags.tune is not None:
        from tools.profiling.tune import tune

        return tune(flags)
    measured = profile(flags)
    if flags.json:
        print(json.dumps(as_json(measured)))
    else:
        show(measured, flags)
    for path in (flags.html, flags.png):
        if path is not None:
            from tools.profiling.picture import write_picture

            write_picture(path, measured)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
