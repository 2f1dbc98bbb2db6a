"""FFCV backend: pictures from one memory-mapped .beton, decoded in compiled code by TurboJPEG.

FFCV's own crops draw from a generator that cannot be seeded, so it is asked only for whole pictures, in our order.
"""

from __future__ import annotations

# FFCV is not annotated, and what pyright infers from it (one allocation, no `is_parallel`) is narrower than it takes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportFunctionMemberAccess=false, reportIncompatibleMethodOverride=false
import contextlib
import queue
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numba
import numpy as np
import torch
from torch import Tensor

threads = torch.get_num_threads()
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402 (the thread count must be read before)
from ffcv.libffcv import imdecode  # noqa: E402
from ffcv.loader import Loader as FFCVLoader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402

from pipeline.errors import DataError, StalledError  # noqa: E402
from pipeline.jpeg import JpegReader, damaged  # noqa: E402
from pipeline.store import Store  # noqa: E402


def _only_numba_threads(cls, count: int) -> None:
    cls.num_threads = count
    numba.set_num_threads(count)


# FFCV sets torch's thread count to its own number of workers, at import and again at every epoch, in every thread:
# a training step on the CPU would run on one core. It keeps its hands off torch from here on.
Compiler.set_num_threads = classmethod(_only_numba_threads)
torch.set_num_threads(threads)


def _without_numbas_farewell(shown: Callable) -> Callable:
    """At exit numba's finalizers fail on FFCV's compiled functions and print a traceback that means nothing."""

    def hook(failure) -> None:
        if not (failure.exc_type is KeyError and type(failure.object).__name__ == "finalize"):
            shown(failure)

    return hook


sys.unraisablehook = _without_numbas_farewell(sys.unraisablehook)

STATUS = 1  # bytes behind each canvas: 0 where TurboJPEG was content
POLL_SECONDS = 1.0


class CanvasDecoder(SimpleRGBImageDecoder):
    """Decodes pictures of any size into the top left corner of a fixed canvas, and keeps what the decoder returned.

    FFCV's decoders ignore that return value: a damaged sample would be black, or the picture before it.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def declare_state_and_memory(self, previous_state):
        bytes_ = np.dtype("<u1")
        size = self.height * self.width * 3
        state = replace(previous_state, jit_mode=True, shape=(size + STATUS,), dtype=bytes_)
        return state, (AllocationQuery((size + STATUS,), bytes_), AllocationQuery((size,), bytes_))

    def generate_code(self) -> Callable:
        read, decode_jpeg, each = self.memory_read, Compiler.compile(imdecode), Compiler.get_iterator()
        pitch, size = self.width * 3, self.height * self.width * 3

        def decode(batch_indices, memory, metadata, storage_state):
            canvases, scratches = memory
            for place in each(len(batch_indices)):
                field = metadata[batch_indices[place]]
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                canvas, scratch = canvases[place], scratches[place]
                jpeg = read(field["data_ptr"], storage_state)
                status = decode_jpeg(jpeg, scratch, height, width, height, width, 0, 0, 1, 1, False, False)
                for row in range(height):
                    start = row * width * 3
                    canvas[row * pitch : row * pitch + width * 3] = scratch[start : start + width * 3]
                canvas[size] = 0 if status == 0 else 1
            return canvases[: len(batch_indices)]

        decode.is_parallel = True
        return decode


class FFCVSource:
    """Yields canvases from FFCV's EpochIterator, which takes any list of samples: our order, from any batch on."""

    def __init__(self, store: Store, *, device: torch.device, workers: int, batch: int, patience: float = 240.0):
        assert store.beton is not None
        self.store, self.device, self.patience = store, device, patience
        self.height, self.width = store.max_height, store.max_width
        size = store.beton.stat().st_size
        end = np.fromfile(store.beton, "<u8", count=1, offset=16)[0]  # header: where the allocation table starts
        if not 0 < end < size:
            raise DataError(f"{store.beton} is incomplete: its table is at byte {end:,} of {size:,}. Convert again.")
        self.loader = FFCVLoader(
            str(store.beton),
            batch_size=batch,
            num_workers=workers,
            batches_ahead=1,  # the loader's thread is what runs ahead
            drop_last=False,
            pipelines={"image": [CanvasDecoder(self.height, self.width)], "label": None},
        )

    def canvases(self, ids: list[np.ndarray]) -> Iterator[Tensor]:
        if not ids:
            return
        epoch = EpochIterator(self.loader, np.concatenate(ids).astype(np.uint64))
        try:
            for batch in ids:
                flat = torch.from_numpy(self._next(epoch))
                flagged = flat[:, -1].numpy() != 0
                if flagged.any() and (sentence := damaged(self.store, JpegReader(self.store), batch[flagged])):
                    raise DataError(sentence)
                canvas = flat[:, :-STATUS].unflatten(1, (self.height, self.width, 3))
                yield canvas.to(self.device, non_blocking=True) if self.device.type == "cuda" else canvas
        finally:
            epoch.close()
            # Its thread may be waiting to hand over a batch; take it so that the thread sees the flag and ends.
            with contextlib.suppress(queue.Empty):
                epoch.output_queue.get_nowait()

    def _next(self, epoch: EpochIterator) -> np.ndarray:
        """FFCV's own `next` waits for ever when its thread has died: ask in turns, and look."""
        until = time.monotonic() + self.patience
        while True:
            with contextlib.suppress(queue.Empty):
                _slot, (canvas,) = epoch.output_queue.get(timeout=POLL_SECONDS)
                return canvas
            if not epoch.is_alive():
                raise StalledError(f"FFCV's decoding thread died while reading {self.store.beton}.")
            if time.monotonic() > until:
                raise StalledError(f"FFCV decoded nothing from {self.store.beton} for {self.patience:.0f} s.")

    def close(self) -> None:
        pass
