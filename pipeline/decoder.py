"""Stored bytes in, the crops of every view out: each picture is decoded once, and only where a view looks.

`RegionDecoder` is native/crops.c. `PillowDecoder` does the same with Pillow: what the other is compared with, and what
is used where nothing can be compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from pipeline import native
from pipeline.errors import ResourceError
from pipeline.sampling import GOLDEN, MOST_VIEWS, Geometry

# A store holds what `--max-pixels` let pass, and its index says how large that is.
Image.MAX_IMAGE_PIXELS = None
MOST_WAITING = 64  # pictures that are done and not yet taken

T = TypeVar("T")

# A row for each picture of a batch; crops.c calls it sample_t. `file` is an open file, or -1 for `data` in memory; with
# an open file `data` is where the bytes are read to, or 0. `raw`: they are RGB pixels, row by row, and no JPEG.
SAMPLE = np.dtype([
    ("data", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("sum", "<u8"),
    ("file", "<i4"), ("height", "<u2"), ("width", "<u2"), ("raw", "<i4"), ("status", "<i4"),
])  # fmt: skip

DONE, DAMAGED, OTHER_PICTURE, NO_MEMORY, UNREADABLE, CHANGED = range(6)  # as crops.c numbers them
FAILURES = {
    DAMAGED: "its JPEG is damaged",
    OTHER_PICTURE: "it is not the picture that the index describes",
    NO_MEMORY: "there is no memory to decode it",
    UNREADABLE: "the file ends before it or cannot be read",
    CHANGED: "its bytes are not those that were converted",
}


STAGES = {1: "reading", 2: "decoding", 3: "cutting the views of"}


class Decoder(Protocol):
    """Decodes batches; not for two callers at once."""

    def decode(self, samples: np.ndarray, where: Sequence[Geometry], outs: Sequence[np.ndarray]) -> np.ndarray:
        """Fill `outs`, one (B, S, S, 3) uint8 array for each view, from the boxes of `where`.

        samples: (B,) SAMPLE. Without views pictures are only read and checked; where S is 0 they are decoded as far as
        the box needs and nothing is cut, which is how the profiler looks inside.
        Returns the places in the batch of the pictures that failed; their `status` says why.
        """
        ...

    def doing(self) -> tuple[str, int | None]:
        """What it is at, and at which place of the batch, as far as known: for whoever waits for `decode` in vain."""
        ...

    def close(self) -> None: ...


class RegionDecoder:
    """native/crops.c on a number of threads of its own; no lock of the interpreter is held meanwhile.

    Pixels are within 54 dB of Pillow's, and the same on any number of threads. Raises OSError where it cannot be made,
    ResourceError without memory.
    """

    def __init__(self, threads: int, *, simd: bool = True):
        self._library, self._lock = native.library(), threading.Lock()
        self._handle = self._library.crops_open(max(1, threads), int(simd))
        if not self._handle:
            raise ResourceError(f"there is no memory for {threads} decoding threads. Use fewer --workers.")

    def decode(self, samples: np.ndarray, where: Sequence[Geometry], outs: Sequence[np.ndarray]) -> np.ndarray:
        views, count = len(outs), len(samples)
        assert samples.dtype == SAMPLE
        assert samples.flags.c_contiguous
        assert len(where) == views <= MOST_VIEWS
        boxes = np.empty((count, views, 5), np.int32)
        for view, geometry in enumerate(where):
            boxes[:, view, :4] = geometry.boxes
            boxes[:, view, 4] = geometry.flip
        sides = np.array([out.shape[1] for out in outs], np.int32)
        for out, side in zip(outs, sides.tolist(), strict=True):
            assert (out.shape, out.dtype, out.flags.c_contiguous) == ((count, side, side, 3), np.uint8, True)
        places = np.array([out.ctypes.data for out in outs], np.uint64)
        arrays = (samples, boxes, sides, places)
        with self._lock:
            if not self._handle:
                raise RuntimeError("the decoder is closed")
            failed = self._library.crops_batch(self._handle, count, views, *(each.ctypes.data for each in arrays))
        return np.flatnonzero(samples["status"]) if failed else np.empty(0, np.int64)

    def decode_whole(self, samples: np.ndarray, denominator: int) -> None:
        """Decode whole JPEGs at 1/denominator of their size and keep nothing: what libjpeg-turbo alone takes.

        denominator: 1, 2, 4 or 8. Raises ValueError where a sample cannot be decoded.
        """
        samples = np.ascontiguousarray(samples)
        if self._library.crops_whole(self._handle, len(samples), denominator, samples.ctypes.data):
            raise ValueError(f"{np.count_nonzero(samples['status'])} of {len(samples)} samples cannot be decoded")

    def doing(self) -> tuple[str, int | None]:
        if not self._handle:
            return "waiting", None
        place = ctypes.c_int()
        stage = self._library.crops_doing(self._handle, ctypes.byref(place))
        return (STAGES[stage], place.value) if stage else ("reading and decoding", None)

    def close(self) -> None:
        """A read that hangs may come back yet: what it writes to is left to it."""
        idle, handle, self._handle = self._lock.acquire(blocking=False), self._handle, None
        if idle:
            self._library.crops_close(handle)
            self._lock.release()


class PillowDecoder:
    """Pillow's decode, crop, antialiased bilinear resize and flip, which every other decoder is held against."""

    def __init__(self, threads: int):
        self.threads = max(1, threads)

    def decode(self, samples: np.ndarray, where: Sequence[Geometry], outs: Sequence[np.ndarray]) -> np.ndarray:
        def one(place: int) -> int:
            sample = samples[place]
            try:
                data = read_sample(sample)
            except (OSError, OverflowError):  # an offset that no file can have
                return UNREADABLE
            try:
                status = _unlike(sample, data)
                if status == DONE and sample["file"] >= 0 and sample["data"]:
                    ctypes.memmove(int(sample["data"]), data, len(data))
                if status != DONE or not where:
                    return status
                status, image = by_pillow(sample, data)
                if image is not None:
                    _cut(image, place, where, outs)
            except MemoryError:
                return NO_MEMORY
            return status

        for place, status in in_threads(one, len(samples), self.threads):
            samples["status"][place] = status
        return np.flatnonzero(samples["status"])

    def doing(self) -> tuple[str, int | None]:
        return "reading and decoding", None

    def close(self) -> None:
        """Nothing is left of it: its threads end with each batch."""


def _cut(image: Image.Image, place: int, where: Sequence[Geometry], outs: Sequence[np.ndarray]) -> None:
    """Every view of the picture at this place of a batch."""
    for geometry, out in zip(where, outs, strict=True):
        if out.shape[1] == 0:
            continue
        top, left, high, wide = geometry.boxes[place].tolist()
        view = image.crop((left, top, left + wide, top + high))
        pixels = np.asarray(view.resize(out.shape[1:3], Image.Resampling.BILINEAR))
        out[place] = pixels[:, ::-1] if geometry.flip[place] else pixels


def in_threads(
    work: Callable[[int], T], count: int, threads: int, patience: float | None = None
) -> Iterator[tuple[int, T]]:
    """(i, work(i)) for every i below count, in the order in which they are done.

    The threads are daemons: one that hangs in the kernel is left behind, where the end of the process would wait for an
    executor's. Raises what `work` raises, and queue.Empty where nothing was done for `patience` seconds.
    """
    places, over = iter(range(count)), threading.Event()  # one step of an iterator in C is one thread's alone
    done: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue(MOST_WAITING)

    def loop() -> None:
        for place in places:
            made, failed = None, None
            try:
                made = work(place)
            except BaseException as error:  # whatever it is, the one that waits must hear of it
                failed = error
            while not over.is_set():
                with contextlib.suppress(queue.Full):
                    done.put((place, made, failed), timeout=0.2)
                    break
            if over.is_set():
                return

    for _ in range(min(threads, count)):
        threading.Thread(target=loop, name="pictures", daemon=True).start()
    try:
        for _ in range(count):
            place, made, failed = done.get(timeout=patience)
            if failed is not None:
                raise failed
            yield place, made
    finally:
        over.set()


def read_sample(sample: np.void) -> bytes:
    """A picture's bytes; fewer than its size where the file ends before. Raises OSError where it cannot be read."""
    if sample["file"] < 0:
        return ctypes.string_at(int(sample["data"]), int(sample["size"]))
    return os.pread(int(sample["file"]), int(sample["size"]), int(sample["offset"]))


def _unlike(sample: np.void, data: bytes) -> int:
    """A key of FAILURES, or 0 for the bytes that the store describes."""
    if len(data) < int(sample["size"]):
        return UNREADABLE
    return CHANGED if sample["sum"] and checksum(data) != int(sample["sum"]) else DONE


def by_pillow(sample: np.void, data: bytes) -> tuple[int, Image.Image | None]:
    """A key of FAILURES, or 0 and the picture, from these bytes. Raises MemoryError."""
    size = int(sample["width"]), int(sample["height"])
    if sample["raw"]:
        fits = len(data) == 3 * size[0] * size[1]
        return (DONE, Image.frombytes("RGB", size, data)) if fits else (OTHER_PICTURE, None)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != size:
                return OTHER_PICTURE, None
            return DONE, image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return DAMAGED, None


def fetch(decoder: Decoder, samples: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Read a batch from its open files and check it: (B) arrays that are JPEG or PPM files, and the places of the
    pictures that failed.

    The rows point into that memory afterwards, which must outlive their use.
    """
    heads = [
        ppm_head(height, width) if raw else b"" for raw, height, width in samples[["raw", "height", "width"]].tolist()
    ]
    ends = np.cumsum(samples["size"] + np.array([len(head) for head in heads], np.uint64))
    room = np.empty(int(ends[-1]), np.uint8)
    starts = ends - samples["size"]
    samples["data"] = room.ctypes.data + starts
    for start, head in zip(starts.tolist(), heads, strict=True):
        room[start - len(head) : start] = np.frombuffer(head, np.uint8)
    failed = decoder.decode(samples, [], [])
    samples["file"] = -1
    return np.split(room, ends[:-1]), failed


def ppm_head(height: int, width: int) -> bytes:
    """What makes a file of 8-bit RGB pixels that lie row by row: portable pixmap, which everything can read."""
    return b"P6\n%d %d\n255\n" % (width, height)


def undecodable(samples: np.ndarray) -> np.ndarray:
    """The places of the pictures that Pillow cannot decode: for libraries that name no sample when they fail."""
    for place, sample in enumerate(samples):
        samples["status"][place] = by_pillow(sample, read_sample(sample))[0]
    return np.flatnonzero(samples["status"])


def clean(jpeg: bytes) -> bool:
    """Whether libjpeg decodes every row without a warning, as the region decoder demands and Pillow does not.

    True where there is no region decoder. jpeg: one that Pillow could open.
    """
    decoder = _checker()
    if decoder is None:
        return True
    data = np.frombuffer(jpeg, np.uint8)
    row = np.zeros(1, SAMPLE)
    row["data"], row["size"], row["file"] = data.ctypes.data, data.size, -1
    try:
        decoder.decode_whole(row, 1)
    except ValueError:
        return False
    return True


@functools.cache
def _checker() -> RegionDecoder | None:
    with contextlib.suppress(OSError):
        return RegionDecoder(1)
    return None


def open_decoder(threads: int) -> Decoder:
    """The compiled one where there is one."""
    try:
        return RegionDecoder(threads)
    except OSError:
        return PillowDecoder(threads)


def checksum(data: bytes | np.ndarray) -> int:
    """What crops.c computes of a picture's bytes: changes with any one word of eight bytes."""
    size = len(data)
    whole = np.zeros(-(-size // 8) * 8, np.uint8)
    whole[:size] = np.frombuffer(data, np.uint8)
    words = whole.view("<u8")
    with np.errstate(over="ignore"):
        factors = np.uint64(GOLDEN) * (2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1))
        mixed = (words ^ (words >> np.uint64(32))) * factors
        total = int((mixed ^ (mixed >> np.uint64(29))).sum(dtype=np.uint64)) + size
    return total % (1 << 64) or 1


def checksum_in_c(data: np.ndarray) -> int:
    """The same, at the speed of memory where crops.c could be compiled."""
    try:
        return native.library().checksum(data.ctypes.data, data.size)
    except OSError:
        return checksum(data)
