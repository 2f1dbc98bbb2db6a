"""`daae profile --tune FILE`: which loader, how many threads and how far ahead, found by measuring and written as YAML.

Every candidate trains beside its loader for a moment, in turns; the slower half is dropped and the others get twice the
time, until one is left. The settings that a run would take by itself stay until the end, to say what is gained.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.staging import write_whole
from train.timing import Sample

if TYPE_CHECKING:
    import torch

    from pipeline.loader import Backend
    from pipeline.store import Store
    from tools.profile import Profile
    from train.config import Run
    from train.rehearsal import Machine

AHEAD = (2, 4)
HARDWARE = (0.5, 0.65, 0.8, 0.9)  # shares for the GPU's hardware decoder; 0.65 is DALI's own
SHORTEST = 0.3  # seconds of one measurement
LEAST_GAIN = 0.03  # less than this is noise: the defaults stay


@dataclass
class Candidate:
    loader: Backend
    workers: int
    ahead: int
    hw_decoder_load: float | None = None  # None: not DALI on a GPU
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def applied(self, run: Run) -> Run:
        speed = replace(run.speed, workers=self.workers, ahead=self.ahead)
        if self.hw_decoder_load is not None:
            speed = replace(speed, hw_decoder_load=self.hw_decoder_load)
        return replace(run, loader=self.loader, speed=speed)

    def settings(self) -> dict[str, Any]:
        speed: dict[str, Any] = {"workers": self.workers, "ahead": self.ahead}
        if self.hw_decoder_load is not None:
            speed["hw_decoder_load"] = self.hw_decoder_load
        return {"loader": self.loader, "speed": speed}

    def words(self) -> str:
        hardware = "" if self.hw_decoder_load is None else f", hw-decoder-load {self.hw_decoder_load:g}"
        return f"{self.loader}, {self.workers} worker{'s' * (self.workers > 1)}, {self.ahead} ahead{hardware}"


def candidates(default: Candidate, backends: list[Backend], cores: int, on_gpu: bool) -> list[Candidate]:
    """The default first, then every other combination worth a try."""
    workers = sorted({1, 2, cores // 2, cores} & set(range(1, cores + 1)))
    found = [default]
    for loader in backends:
        for threads in workers:
            for ahead in AHEAD:
                for share in HARDWARE if loader == "dali" and on_gpu else (None,):
                    one = Candidate(loader, threads, ahead, share)
                    if one.settings() != default.settings():
                        found.append(one)
    return found


def search(machine: Machine, store: Store, batch: int, tried: list[Candidate], seconds: float, say) -> Candidate:
    """The fastest within the time, or the default (the first) where nothing is clearly faster."""
    default, alive, end = tried[0], list(tried), time.monotonic() + seconds
    rounds = max(1, math.ceil(math.log2(len(alive))))
    for turn in range(rounds):
        each = max(SHORTEST, (end - time.monotonic()) / (rounds - turn) / len(alive) / 2)
        for place, one in enumerate(alive):
            if time.monotonic() > end and place:
                break
            say(f"round {turn + 1} of {rounds}: {place + 1} of {len(alive)}, {one.words()}")
            one.rates.append(rate_of(machine, store, batch, one, each))
        alive = sorted((one for one in alive if one.rates), key=lambda one: -one.rate)[: max(1, len(alive) // 2)]
        if default not in alive:
            alive.append(default)
    best = max(alive, key=lambda one: one.rate)
    return best if best.rate > (1 + LEAST_GAIN) * default.rate else default


def rate_of(machine: Machine, store: Store, batch: int, one: Candidate, seconds: float) -> float:
    """Images/s of loader and step together."""
    from tools.profiling.stages import open_warm
    from train.rehearsal import endless

    run = one.applied(machine.run)
    loader = open_warm(store, replace(run, optim=replace(run.optim, batch=batch)))
    with contextlib.closing(loader), contextlib.closing(endless(loader, 1)) as batches:
        machine.step(next(batches))
        sample: Sample = machine.time(lambda: next(batches), machine.step, seconds)
    return sample.images / sample.seconds


def tune(flags: Profile) -> int:
    """Search, write the file, say what was found."""
    import torch

    from pipeline import native
    from pipeline.limits import usable_cores
    from pipeline.loader import decoding_threads
    from tools.profile import settings, telling
    from tools.profiling.bottleneck import OURS, decoder_facts, pillow_note
    from tools.profiling.stages import usable_backends
    from train.data import open_store
    from train.device import resolve
    from train.rehearsal import Machine, fit_batch

    path = flags.tune
    assert path is not None
    wish = settings(flags)
    store = open_store(wish)
    wish = resolve(wish, store)
    device: torch.device = torch.device(wish.device)
    on_gpu = device.type == "cuda"
    with telling(flags.quiet) as say:
        say("finding the batch")
        machine = Machine(wish, device)
        batch = flags.batch or fit_batch(machine, 1.0)
        machine.compile()
        hardware = wish.speed.hw_decoder_load if wish.loader == "dali" and on_gpu else None
        threads = decoding_threads(wish.speed.workers, device)
        default = Candidate(wish.loader, threads, wish.speed.ahead, hardware)  # pyright: ignore[reportArgumentType]
        backends: list[Backend] = [default.loader]
        if flags.loader in ("auto", "all"):
            backends = usable_backends(store)
        tried = candidates(default, backends, max(1, int(usable_cores())), on_gpu)
        best = search(machine, store, batch, tried, flags.tune_seconds, say)
    write_whole(path, as_yaml(best, default))
    measured, no_decoder = [one for one in tried if one.rates], native.why_not()
    if flags.json:
        rows = [{**one.settings(), "images_per_second": one.rate} for one in measured]
        found = {"chosen": best.settings(), "default": default.settings(), "tried": rows, **decoder_facts(no_decoder)}
        print(json.dumps(found))
        return 0
    for one in sorted(measured, key=lambda one: -one.rate):
        print(f"{one.rate:8,.0f} images/s  {one.words()}{'  (by itself)' if one is default else ''}")
    if len(measured) < len(tried):
        print(f"Tried {len(measured)} of {len(tried)}: a longer --tune-seconds tries all.")
    if no_decoder is not None and any(one.loader in OURS for one in measured):
        print(pillow_note(no_decoder))
    if best is default:
        print(f"Nothing is more than {LEAST_GAIN:.0%} faster than what a run takes by itself; {path} says that.")
    else:
        print(f"{best.rate / default.rate:.2f}x what a run takes by itself. Pass --config {path} to `daae pretrain`.")
    return 0


def as_yaml(best: Candidate, default: Candidate) -> str:
    import yaml

    return (
        f"# By `daae profile --tune`: {best.rate:,.0f} images/s, against {default.rate:,.0f} with "
        f"{default.words()}.\n{yaml.safe_dump(best.settings(), sort_keys=False)}"
    )
