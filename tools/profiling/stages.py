"""Every stage between a file and a step, each timed alone on the store and the machine at hand.

    storage -> decode -> cut -> copy -> views -> step        alone
    loader: all up to the copy, as a run has it; both: loader and step together

What the machine could give at most stands beside them: whole pictures decoded, bytes copied, bytes read.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from pipeline import sampling
from pipeline.decoder import RegionDecoder, fetch
from pipeline.errors import StalledError
from pipeline.loader import Loader
from pipeline.shard_loader import FileSource, send
from pipeline.views import Batch
from tools.profiling.bottleneck import Part
from train.data import open_data
from train.rehearsal import Machine, endless
from train.timing import Sample, Watch

if TYPE_CHECKING:
    from pipeline.decoder import Decoder
    from pipeline.loader import Backend
    from pipeline.store import Store
    from pipeline.stored import StoredPictures
    from train.config import Run

COPIES_TO = ("cuda",)  # kinds of devices that crops are sent to over a bus
LIMIT_SECONDS = 0.3  # for each of the machine's limits
COPY_BYTES = 64 << 20

T = TypeVar("T")


def watched(work: Callable[[Callable[[], None]], T], seconds: float, doing: str) -> T:
    """What `work` returns or raises, from a thread of its own: one that hangs in a read is left behind.

    work: is given what it has to call each time that it has got on. Raises StalledError where it did not for `seconds`.
    """
    done: Future[T] = Future()
    moved = time.monotonic()

    def got_on() -> None:
        nonlocal moved
        moved = time.monotonic()

    def settle() -> None:
        try:
            done.set_result(work(got_on))
        except BaseException as error:  # whatever it is, the one that waits must hear of it
            done.set_exception(error)

    threading.Thread(target=settle, name="profile", daemon=True).start()
    while not wait([done], min(1.0, seconds / 4)).done:
        if time.monotonic() - moved > seconds:
            raise StalledError(f"nothing was read for {seconds:.0f} s while {doing}. Look at the disk that holds it.")
    return done.result()


def _check(stored: StoredPictures, ids: np.ndarray, rows: np.ndarray, failed: np.ndarray) -> None:
    """What cannot be read or decoded is not timed. Raises DataError, ResourceError."""
    if failed.size:
        place = int(failed[0])
        raise stored.failure(int(ids[place]), int(rows["status"][place]))


# --- the loader's parts -----------------------------------------------------------------------------------------------


class Parts:
    """The stages of a backend that reads files, on batches of the store, each alone; of others what can be told."""

    def __init__(self, loader: Loader, wish: Run, device: torch.device):
        self.loader, self.device, self.source = loader, device, loader.source
        self.views = wish.method.views(wish.model)
        self.ids = self._endless()

    def _endless(self) -> Iterator[np.ndarray]:
        loader, epoch = self.loader, 1_000_000  # pictures in an order that no timing of the loader has met
        while True:
            order = loader.store.order(loader.seed, epoch)
            yield from (sampling.batch_ids(order, step, loader.batch) for step in range(loader.batches))
            epoch += 1

    def round(self, seconds: float) -> dict[Part, Sample]:
        """Each part for the same images, for so many seconds in all. Raises DataError, ResourceError, StalledError."""
        source = self.source
        if isinstance(source, FileSource):
            work = functools.partial(self._of_files, source, seconds)
        else:
            stored, reader = stored_pictures(source), getattr(source, "reader", None)
            if stored is None or reader is None:
                return {}
            work = functools.partial(self._reading, stored, reader, seconds)
        return watched(work, self.loader.stall_seconds, f"the loader's parts of {self.loader.store.root} were timed")

    def _reading(
        self, stored: StoredPictures, reader: Decoder, seconds: float, got_on: Callable[[], None]
    ) -> dict[Part, Sample]:
        watch, images, end = Watch(), 0, time.perf_counter() + seconds
        while images == 0 or time.perf_counter() < end:
            ids = next(self.ids)
            rows = stored.rows(ids)
            with watch:
                _room, failed = fetch(reader, rows)
            _check(stored, ids, rows, failed)
            got_on()
            images += len(rows)
        return {"storage": watch.sample(images)}

    def _of_files(self, source: FileSource, seconds: float, got_on: Callable[[], None]) -> dict[Part, Sample]:
        read, region, whole, copy = Watch(), Watch(), Watch(), Watch()
        images, end = 0, time.perf_counter() + seconds
        while images == 0 or time.perf_counter() < end:
            ids = next(self.ids)
            boxes = self.loader.where(0, ids)
            where = [boxes[name] for name in self.views]
            rows = source.stored.rows(ids)
            with read:
                _room, failed = fetch(source.decoder, rows)  # the rows point into it from here on
            _check(source.stored, ids, rows, failed)
            got_on()
            with region:
                failed = source.decoder.decode(rows, where, [np.empty((len(ids), 0, 0, 3), np.uint8) for _ in where])
            _check(source.stored, ids, rows, failed)
            crops = source.room(len(ids))
            with whole:
                failed = source.decoder.decode(rows, where, [each.numpy() for each in crops.values()])
            _check(source.stored, ids, rows, failed)
            got_on()
            if self.device.type in COPIES_TO:
                with copy:
                    send(crops, self.device)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
            images += len(ids)
        decoded = region.sample(images)
        found: dict[Part, Sample] = {
            "storage": read.sample(images), "decode": decoded, "cut": whole.sample(images).minus(decoded)
        }  # fmt: skip
        if self.device.type in COPIES_TO:
            found["copy"] = copy.sample(images)
        return found


def stored_pictures(source: object) -> StoredPictures | None:
    """What a backend reads from while it runs; the resident one has read it all."""
    return getattr(source, "stored", None)


# --- the machine's limits ---------------------------------------------------------------------------------------------

LIMITS = {
    "decode_whole": "libjpeg-turbo, whole pictures, images/s a core",
    "decode_half": "libjpeg-turbo, half their size, images/s a core",
    "decode_eighth": "libjpeg-turbo, an eighth of it: their coefficients alone, images/s a core",
    "read_disk": "random pictures from the disk, images/s",
    "read_cached": "random pictures from the page cache, images/s",
    "copy_gb": "memory to memory, GB/s",
    "to_gpu_gb": "page-locked memory to the GPU, GB/s",
}


def machine_limits(loader: Loader, device: torch.device) -> dict[str, float]:
    """The figures of LIMITS that this machine has, a third of a second each. Raises DataError, ResourceError,
    StalledError."""
    found = {"copy_gb": _copy_gb(torch.device("cpu"))}
    if device.type == "cuda":
        found["to_gpu_gb"] = _copy_gb(device)
    stored = stored_pictures(loader.source)
    if stored is None:
        return found
    work = functools.partial(_limits_of_storage, loader, stored)
    return found | watched(work, loader.stall_seconds, f"the disk under {loader.store.root} was timed")


def _limits_of_storage(loader: Loader, stored: StoredPictures, got_on: Callable[[], None]) -> dict[str, float]:
    def read(ids: np.ndarray) -> None:
        for sample in ids.tolist():
            stored.read(sample)
            got_on()

    found, order = {}, loader.store.order(loader.seed, 2_000_000)[:512]
    stored.forget(order)
    found["read_disk"], seen = _rate(read, order)
    found["read_cached"], _ = _rate(read, seen)
    with contextlib.suppress(OSError), contextlib.closing(RegionDecoder(1)) as decoder:
        rows = stored.rows(seen[:128])
        _room, failed = fetch(decoder, rows)
        _check(stored, seen[:128], rows, failed)
        rows = rows[rows["raw"] == 0]
        if not len(rows):
            return found
        for name, denominator in (("decode_whole", 1), ("decode_half", 2), ("decode_eighth", 8)):
            found[name], _ = _rate(lambda part, d=denominator: decoder.decode_whole(part, d), rows)
            got_on()
    return found


def _rate(work: Callable[[np.ndarray], object], items: np.ndarray) -> tuple[float, np.ndarray]:
    """Items a second, eight at a time until the time or the items are over; and the items that were taken."""
    start, taken = time.perf_counter(), 0
    while taken < len(items) and time.perf_counter() - start < LIMIT_SECONDS:
        work(items[taken : taken + 8])
        taken += 8
    taken = min(taken, len(items))
    return taken / (time.perf_counter() - start), items[:taken]


def _copy_gb(device: torch.device) -> float:
    """10^9 bytes a second."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source)
    copies, start = 0, time.perf_counter()
    while copies == 0 or time.perf_counter() - start < LIMIT_SECONDS:
        target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        copies += 1
    return copies * COPY_BYTES / (time.perf_counter() - start) / 1e9


# --- the loader, and both together ------------------------------------------------------------------------------------


def usable_backends(store: Store) -> list[Backend]:
    """Those that a store and this machine have all parts of; `resident` is asked for by name, since it takes memory."""
    from importlib.util import find_spec

    there: dict[Backend, bool] = {
        "ffcv": store.beton is not None,
        "shards": True,
        "dali": find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None,
    }
    return [name for name, works in there.items() if works]


def open_warm(store: Store, run: Run) -> Loader:
    """A loader that has compiled what it compiles and made its first batches."""
    loader = open_data(run, store)
    with contextlib.closing(endless(loader, 0)) as batches:
        for _ in range(2):
            next(batches)
    return loader


def warm_step(machine: Machine, loader: Loader) -> tuple[Batch, float]:
    """A real batch that stays on the device, and the seconds of a step on it once everything is allocated."""
    with contextlib.closing(endless(loader, 0)) as batches:
        resident = next(batches)
    machine.compile()
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)
    machine.step(resident)
    return resident, machine.time(lambda: resident, machine.step, 0.0).seconds


def one_round(
    machine: Machine, loaders: dict[Backend, Loader], parts: Parts, resident: Batch, turn: int, seconds: float
) -> dict[str, Sample]:
    """Each timing once, so that what disturbs the machine for a while disturbs all of them.

    No two timings read the same epoch: the second would find in memory what the first has read from the disk.
    """
    fresh = itertools.count(10_000 * turn, 1_000)
    samples: dict[str, Sample] = {f"part {name}": each for name, each in parts.round(seconds).items()}
    samples["views"] = machine.time(lambda: resident, machine.make_views, seconds / 4)
    samples["step"] = machine.time(lambda: resident, machine.step, seconds)
    for name, loader in loaders.items():
        with contextlib.closing(endless(loader, next(fresh))) as batches:
            next(batches)  # opens the epoch
            samples[f"loader {name}"] = machine.time(lambda source=batches: next(source), None, seconds)
        with contextlib.closing(endless(loader, next(fresh))) as batches:
            machine.step(next(batches))  # meanwhile the queue fills, as it is in the middle of a run
            samples[f"both {name}"] = machine.time(lambda source=batches: next(source), machine.step, seconds)
    return samples
