"""One loader for every backend: which samples, where to crop them, and a backend that does so, some batches ahead.

    ffcv       one .beton, decoded region by region on the CPU        ffcv_loader.py
    shards     WebDataset shards, decoded the same way                shard_loader.py
    dali       WebDataset shards, decoded by DALI on the CPU or GPU   dali_loader.py
    resident   the whole store, decoded once, on the device           resident_loader.py

Order, crops and flips come from `sampling`, so backends agree on everything but the decoder's last grey levels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline import sampling
from pipeline.errors import DaaeError, DataError, ResourceError, StalledError, UsageError
from pipeline.ffcv_loader import FFCVSource
from pipeline.limits import machine_fault, out_of_memory, usable_cores
from pipeline.resident_loader import ResidentSource
from pipeline.sampling import Geometry, View
from pipeline.shard_loader import ShardSource
from pipeline.store import Store
from pipeline.views import Batch

Backend = Literal["auto", "ffcv", "shards", "dali", "resident"]
CLOSE_SECONDS = 5.0  # that an epoch which is left waits for the batch under way; a read that hangs is left behind
STALLED_CLOSE_SECONDS = 1.0  # where the batch was waited for in vain


class Source(Protocol):
    """What a backend is: sample ids and boxes in, crops of every view out."""

    def batches(
        self, plan: list[np.ndarray], where: Callable[[np.ndarray], dict[str, Geometry]]
    ) -> Iterator[dict[str, Tensor]]:
        """For each array of B sample ids the (B, S, S, 3) uint8 crops of every view, on the device.

        They are the caller's to keep. where(ids) gives the boxes and flips of each view.
        Raises DataError naming the sample that cannot be decoded, ResourceError where the machine cannot.
        """
        ...

    def doing(self) -> str:
        """What `batches` is in the middle of, asked by another thread that has waited in vain."""
        ...

    def close(self) -> None: ...


class Loader:
    """Batches of an epoch, in the order that (seed, epoch) fixes.

    One background thread decodes and crops `ahead` batches while the caller trains. Every wait has a time limit.
    """

    def __init__(
        self,
        store: Store,
        source: Source,
        views: dict[str, View],
        *,
        batch: int,
        seed: int,
        device: torch.device,
        label: str | None,
        shuffle: bool,
        stall_seconds: float,
        rank: int,
        ranks: int,
        ahead: int = 2,
        only: np.ndarray | None = None,
    ):
        self.store, self.source, self.views, self.batch, self.seed = store, source, views, batch, seed
        self.device, self.shuffle, self.stall_seconds = device, shuffle, stall_seconds
        self.rank, self.ranks, self.ahead = rank, ranks, ahead
        self._left: threading.Thread | None = None  # of an epoch that was closed in the middle of a batch
        # One for all epochs: memory that is freed on a stream is used again on that one alone.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.chosen = None if only is None else np.asarray(only, np.int64)
        self.ordered = np.arange(store.count) if self.chosen is None else self.chosen
        count = store.per_epoch if self.chosen is None else len(self.chosen)
        # Training drops the last partial batch; evaluation must see every image and takes it.
        self.batches = count // batch if shuffle else -(-len(self.ordered) // batch)
        self.sizes = np.stack([store.index["height"], store.index["width"]], axis=1)
        self.labels = store.label(label)[0].astype(np.int64) if label else np.full(store.count, -1, np.int64)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch]:
        """Batches `start` to the end of an epoch. Starting anywhere costs nothing: no sample is read to be skipped."""
        if not self.shuffle:
            order = self.ordered
        elif self.chosen is None:
            order = self.store.order(self.seed, epoch)
        else:
            order = self.chosen[sampling.epoch_order(self.seed, epoch, len(self.chosen))]
        plan = [
            sampling.batch_ids(order, step, self.batch, self.rank, self.ranks) for step in range(start, self.batches)
        ]
        self._wait_for_the_last()
        ahead = _Ahead(self._make(epoch, plan), self.source.doing, self.stream, self.ahead, self.stall_seconds)
        try:
            yield from ahead
        finally:
            if not ahead.close():
                self._left = ahead.thread

    def _wait_for_the_last(self) -> None:
        """A source serves one thread at a time. Raises StalledError."""
        if self._left is not None:
            self._left.join(self.stall_seconds)
            if self._left.is_alive():
                raise StalledError(
                    f"the loader is {self.source.doing()} for an epoch that was left, and was not done with it in "
                    f"{self.stall_seconds:.0f} s. Look at the disk that holds the store, or allow more with "
                    "--speed.stall-seconds."
                )
            self._left = None

    def where(self, epoch: int, ids: np.ndarray) -> dict[str, Geometry]:
        """Boxes and flips of every view of these samples in this epoch."""
        cuts = {view.same_crop_as or name for name, view in self.views.items()}
        cut = {name: view for name, view in self.views.items() if name in cuts}
        drawn = sampling.geometries(cut, self.seed, epoch, ids, self.sizes[ids])
        return {name: drawn[view.same_crop_as or name] for name, view in self.views.items()}

    def _make(self, epoch: int, plan: list[np.ndarray]) -> Iterator[Batch]:
        batches = self.source.batches(plan, functools.partial(self.where, epoch))
        with contextlib.closing(batches):  # pyright: ignore[reportArgumentType]
            for ids, images in zip(plan, batches, strict=True):
                label = torch.from_numpy(self.labels[ids]).to(self.device, non_blocking=True)
                yield Batch(images, label, torch.from_numpy(ids), epoch)

    def close(self) -> None:
        self.source.close()


class _Ahead:
    """Runs an iterator in a thread, `ahead` items in advance. On CUDA it works on a stream of its own."""

    def __init__(
        self,
        items: Iterator[Batch],
        doing: Callable[[], str],
        stream: torch.cuda.Stream | None,
        ahead: int,
        stall_seconds: float,
    ):
        self.items, self.doing, self.stream, self.stall_seconds = items, doing, stream, stall_seconds
        self.ready: queue.Queue = queue.Queue(ahead)
        self.stop = threading.Event()
        self.stalled = False
        self.thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                for item in self.items:
                    done = torch.cuda.Event() if self.stream else None
                    if done is not None:
                        done.record(self.stream)
                    if not self._put((item, done)):
                        return
            self._put(None)
        except BaseException as error:  # whatever it is, the training thread must hear of it
            self._put(error)

    def _put(self, what: object) -> bool:
        while not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(what, timeout=0.2)
                return True
        return False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            try:
                what = self.ready.get(timeout=self.stall_seconds)
            except queue.Empty:
                self.stalled = True
                raise StalledError(
                    f"the loader made no batch for {self.stall_seconds:.0f} s: it is {self.doing()}. Look at the disk "
                    "that holds the store, or allow more with --speed.stall-seconds."
                ) from None
            if what is None:
                return
            if isinstance(what, BaseException):
                raise in_words(what) from what
            batch, done = what
            if done is not None:
                current = torch.cuda.current_stream(batch.label.device)
                current.wait_event(done)
                for tensor in (*batch.images.values(), batch.label):
                    tensor.record_stream(current)  # made on the loader's stream, used on this one
            yield batch

    def close(self) -> bool:
        """Whether its thread has ended. One that hangs is a daemon and ends with the process."""
        self.stop.set()
        end = time.monotonic() + (STALLED_CLOSE_SECONDS if self.stalled else CLOSE_SECONDS)
        while self.thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                self.ready.get_nowait()  # it may hold a finished batch: make room so that it sees the flag
            self.thread.join(timeout=0.05)
        return not self.thread.is_alive()


def in_words(error: BaseException) -> DaaeError:
    """What ended a loader, as a sentence and an exit code."""
    if isinstance(error, DaaeError):
        return error
    if out_of_memory(error):
        first = " ".join(str(error).split())[:100]
        return ResourceError(
            f"the loader has no memory for its batches ({type(error).__name__}{': ' * bool(first)}{first}). Use a "
            "smaller --batch, --speed.ahead or --workers, or another --loader."
        )
    fault = machine_fault(error.filename or "the store", error) if isinstance(error, OSError) else None
    return fault or StalledError(f"the loader stopped with {type(error).__name__}: {error}.")


def decoding_threads(wish: int, device: torch.device, ranks: int = 1) -> int:
    """How many threads read and decode where `workers` of them are wished for; 0 leaves it to us."""
    # Beside a training step on the CPU one decoding thread is enough and two would fight for the cores.
    return wish or (1 if device.type == "cpu" else max(1, int(usable_cores()) // ranks))


def check_batch(store: Store, batch: int, only: np.ndarray | None = None) -> None:
    """Raises DataError: no epoch, of these samples or of all, holds a whole batch."""
    count = store.per_epoch if only is None else len(only)
    if count < batch:
        of_them = store.drawn if only is None else " to train on"
        raise DataError(
            f"{store.root} has {count:,} images{of_them}, fewer than one batch of {batch:,}. "
            f"Use --batch {max(1, count // 2)} or fewer, or more images."
        )


def open_loader(
    store: Store,
    views: dict[str, View],
    *,
    batch: int,
    seed: int = 0,
    backend: Backend = "auto",
    device: torch.device | str = "cpu",
    workers: int = 0,
    label: str | None = None,
    shuffle: bool = True,
    ahead: int = 2,
    hw_decoder_load: float = 0.65,
    stall_seconds: float = 300.0,
    rank: int = 0,
    ranks: int = 1,
    ranks_here: int = 1,
    only: np.ndarray | None = None,
) -> Loader:
    """Open a store for training (`shuffle`) or for one ordered pass over every image.

    batch: images over all ranks. workers: decoding threads, 0 chooses. backend: see choose_backend for "auto". ahead:
    batches that are made and wait. hw_decoder_load: share of the JPEGs that DALI sends to a GPU's hardware decoder.
    ranks_here: processes that share this machine's cores. only: sample ids that an epoch is cut down to.
    Raises DataError (fewer images than a batch, tables or files of the store damaged), ResourceError (backend not
    installed, no memory, a disk that cannot be read), StalledError (`resident` reads here), UsageError (not in store).
    """
    if shuffle:
        check_batch(store, batch, only)
    if batch % ranks:
        raise UsageError(f"a batch of {batch} cannot be divided evenly among {ranks} processes.")
    device = torch.device(device)
    if backend == "auto":
        backend = choose_backend(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # DALI takes its memory beside torch, which would keep what no tensor needs any more
    try:
        source = _open_source(
            store, views, backend, device=device, workers=decoding_threads(workers, device, ranks_here),
            batch=batch // ranks, ahead=ahead, hw_decoder_load=hw_decoder_load, stall_seconds=stall_seconds,
        )  # fmt: skip
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise in_words(error) from None
    return Loader(
        store, source, views, batch=batch, seed=seed, device=device, label=label, shuffle=shuffle,
        stall_seconds=stall_seconds, rank=rank, ranks=ranks, ahead=ahead, only=only,
    )  # fmt: skip


def _open_source(
    store: Store,
    views: dict[str, View],
    backend: Backend,
    *,
    device: torch.device,
    workers: int,
    batch: int,
    ahead: int,
    hw_decoder_load: float,
    stall_seconds: float,
) -> Source:
    """What decodes and cuts for a loader, with the store's tables held in memory. batch: images of this process.

    Raises DataError, ResourceError, StalledError, UsageError; RuntimeError or MemoryError where there is no memory.
    """
    if backend == "ffcv":
        if store.beton is None:
            raise UsageError(f"{store.root} was written without ffcv. Convert again with --backends both.")
        return FFCVSource(store, views, device=device, workers=workers, ahead=ahead)
    if backend == "shards":
        return ShardSource(store, views, device=device, workers=workers, ahead=ahead)
    if backend == "resident":
        return ResidentSource(store, views, device=device, workers=workers, stall_seconds=stall_seconds)
    try:
        from pipeline.dali_loader import DALISource
    except ImportError as error:
        raise ResourceError(
            f"--loader {backend} needs {error.name or error}, which is not installed. "
            "Run `make setup`, or pass --loader auto."
        ) from None
    return DALISource(store, views, device=device, workers=workers, batch=batch, hw_decoder_load=hw_decoder_load)


def choose_backend(device: torch.device) -> Literal["shards", "dali"]:
    """On a GPU DALI, which decodes there; elsewhere the region decoder, on what the index points into: that needs no
    library to be found."""
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            importlib.import_module("pipeline.dali_loader")
            return "dali"
    return "shards"
