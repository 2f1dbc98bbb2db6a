"""JPEG bytes in, the crops of every view out: each picture is decoded once, and only where a view looks.

`RegionDecoder` is native/crops.c. `PillowDecoder` does the same with Pillow: what the other is compared with, and what
is used where nothing can be compiled.
"""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline import native
from pipeline.sampling import GOLDEN, Geometry

MOST_VIEWS = 16

# A row for each picture of a batch; crops.c calls it sample_t. `file` is an open file, or -1 for `data` in memory.
SAMPLE = np.dtype([
    ("data", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("sum", "<u8"),
    ("file", "<i4"), ("height", "<i4"), ("width", "<i4"), ("status", "<i4"),
])  # fmt: skip

FAILURES = {
    1: "its JPEG is damaged",
    2: "it is not the picture that the index describes",
    3: "there is no memory to decode it",
    4: "the file ends before it or cannot be read",
    5: "its bytes are not those that were converted",
}


STAGES = {1: "reading", 2: "decoding", 3: "cutting the views of"}


class Decoder(Protocol):
    """Decodes batches; not for two callers at once."""

    def decode(self, samples: np.ndarray, where: Sequence[Geometry], outs: Sequence[np.ndarray]) -> np.ndarray:
        """Fill `outs`, one (B, S, S, 3) uint8 array for each view, from the boxes of `where`.

        samples: (B,) SAMPLE. Returns the places in the batch of the pictures that failed; their `status` says why.
        """
        ...

    def doing(self) -> tuple[str, int | None]:
        """What it is at, and at which place of the batch, as far as known: for whoever waits for `decode` in vain."""
        ...

    def close(self) -> None: ...


class RegionDecoder:
    """native/crops.c on a number of threads of its own; no lock of the interpreter is held meanwhile.

    Pixels are within 54 dB of Pillow's, and the same on any number of threads. Raises OSError where it cannot be made.
    """

    def __init__(self, threads: int, *, simd: bool = True):
        self._library = native.library()
        self._handle = self._library.crops_open(max(1, threads), int(simd))
        if not self._handle:
            raise MemoryError(f"no memory for {threads} decoding threads")

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
        failed = self._library.crops_batch(self._handle, count, views, *(each.ctypes.data for each in arrays))
        return np.flatnonzero(samples["status"]) if failed else np.empty(0, np.int64)

    def doing(self) -> tuple[str, int | None]:
        place = ctypes.c_int()
        stage = self._library.crops_doing(self._handle, ctypes.byref(place))
        return (STAGES[stage], place.value) if stage else ("reading and decoding", None)

    def close(self) -> None:
        if self._handle:
            self._library.crops_close(self._handle)
            self._handle = None


class PillowDecoder:
    """Pillow's decode, crop, antialiased bilinear resize and flip, which every other decoder is held against."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="pillow")

    def decode(self, samples: np.ndarray, where: Sequence[Geometry], outs: Sequence[np.ndarray]) -> np.ndarray:
        def one(place: int) -> None:
            data = read_sample(samples[place])
            samples["status"][place], image = _picture(samples[place], data)
            if image is None:
                return
            for geometry, out in zip(where, outs, strict=True):
                top, left, high, wide = geometry.boxes[place].tolist()
                view = image.crop((left, top, left + wide, top + high))
                pixels = np.asarray(view.resize(out.shape[1:3], Image.Resampling.BILINEAR))
                out[place] = pixels[:, ::-1] if geometry.flip[place] else pixels

        list(self._pool.map(one, range(len(samples))))
        return np.flatnonzero(samples["status"])

    def doing(self) -> tuple[str, int | None]:
        return "reading and decoding", None

    def close(self) -> None:
        self._pool.shutdown()


def read_sample(sample: np.void) -> bytes:
    """A picture's bytes; fewer than its size where the file ends before or cannot be read."""
    if sample["file"] < 0:
        return ctypes.string_at(int(sample["data"]), int(sample["size"]))
    try:
        return os.pread(int(sample["file"]), int(sample["size"]), int(sample["offset"]))
    except OSError:
        return b""


def _picture(sample: np.void, data: bytes) -> tuple[int, Image.Image | None]:
    """A key of FAILURES, or 0 and the picture."""
    if len(data) < int(sample["size"]):
        return 4, None
    if sample["sum"] and checksum(data) != int(sample["sum"]):
        return 5, None
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (int(sample["width"]), int(sample["height"])):
                return 2, None
            return 0, image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return 1, None


def open_decoder(threads: int) -> Decoder:
    """The compiled one where there is one."""
    try:
        return RegionDecoder(threads)
    except OSError:
        return PillowDecoder(threads)


def checksum(data: bytes | np.ndarray) -> int:
    """What crops.c computes of a JPEG's bytes: changes with any one word of eight bytes."""
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
