"""Steps that are taken to be timed: on a throwaway network, at a rate of 0."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pipeline.errors import ResourceError
from pipeline.views import Batch, group_size
from train.attention import settle_attention
from train.data import open_data
from train.step import Stepper, noise, views_of
from train.timing import Sample

if TYPE_CHECKING:
    from pipeline.loader import Loader
    from pipeline.store import Store
    from train.config import Run


class Machine:
    """The device with a throwaway network on it: takes steps, and counts seconds honestly."""

    def __init__(self, wish: Run, device: torch.device, *, watched: bool = True):
        """watched: the ledger is to tell encoder and decoder apart."""
        self.run, self.device = wish, device
        self.stepper = Stepper(replace(wish, speed=replace(wish.speed, compile=False)), device)
        settle_attention(self.stepper)
        self.stepper.prepare(watched=watched and not wish.speed.compile)

    def compile(self) -> None:
        """Once the batch is found: every size would be compiled anew."""
        if self.run.speed.compile:
            self.stepper.compile()

    def step(self, batch: Batch) -> None:
        """At a rate of 0 the weights stay where they are, so that no round meets a network that diverged."""
        self.stepper(batch, lr=0.0)

    def random_batch(self, size: int) -> Batch:
        return noise(self.run, size, self.device)

    def make_views(self, batch: Batch) -> None:
        """What a step does before the network: colour, normalisation, patches and masks of every view."""
        views_of(self.run, batch)

    def settle(self) -> None:
        """CUDA calls return before the work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, take: Callable[[], Batch], work: Callable[[Batch], None] | None, seconds: float) -> Sample:
        """Take batches, and work on them, for so many seconds, to the nearest batch and at least for one."""
        images, batches, waited, elapsed = 0, 0, 0.0, 0.0
        self.settle()
        self.stepper.ledger.read()  # no one else may: on a GPU it keeps events of every step until it is read
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


def fit_batch(machine: Machine, limit: float) -> int:
    """The run's batch, or the largest near it by doubling of which a step takes `limit` seconds and fits the memory.

    Nobody waits for a step of 4,096 images of a ViT-B on a CPU to learn that it is slow.
    """
    try:
        return _fitting(machine, limit)
    finally:
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()  # what larger batches took: a loader decodes beside torch, in memory of its own


def _fitting(machine: Machine, limit: float) -> int:
    run = machine.run
    most, unit = run.optim.batch, run.optim.accumulate * group_size(run.method.views(run.model))
    size = first = min(most, max(unit, 16 * run.optim.accumulate // unit * unit))
    crowded = False
    while True:
        pictures = machine.random_batch(size)
        try:
            machine.step(pictures)  # the first of a size allocates
            took = min(machine.time(lambda batch=pictures: batch, machine.step, 0.0).seconds for _ in range(2))
        except ResourceError:
            if size == first:
                raise
            size, crowded = max(first, size // 2 // unit * unit), True
            continue
        if took > limit:
            return max(first, size // 2 // unit * unit)
        if size == most or crowded or 2 * took > limit:
            return size
        size = min(most, size * 2 ** int(math.log2(limit / took)))


def predict(run: Run, store: Store, seconds: float = 3.0) -> Sample:
    """Images, and the seconds that loader and step take for them together, on batches of which a step takes a second.

    run: resolved. Raises what open_data raises, and ResourceError where not even a few images fit.
    """
    machine = Machine(run, torch.device(run.device))
    size = fit_batch(machine, 1.0)
    loader = open_data(replace(run, optim=replace(run.optim, batch=size)), store)
    machine.compile()
    with contextlib.closing(loader), contextlib.closing(endless(loader)) as batches:
        for _ in range(2):
            machine.step(next(batches))
        return machine.time(lambda: next(batches), machine.step, seconds)


def endless(loader: Loader, epoch: int = 0) -> Generator[Batch]:
    """Epoch after epoch, with the hiccup between two of them that a run has too."""
    while True:
        yield from loader.epoch(epoch)
        epoch += 1
