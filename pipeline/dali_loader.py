"""DALI backend: pictures from WebDataset shards by sample id, decoded by DALI on the CPU or the GPU.

On a GPU nvJPEG and the hardware decoder do the work and every view is cut there: the host only reads bytes.
"""

from __future__ import annotations

# DALI fills its modules at import, out of pyright's sight.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import backend, fn, pipeline_def, types
from torch import Tensor

from pipeline.decoder import fetch, open_decoder, undecodable
from pipeline.errors import DaaeError, DataError, ResourceError
from pipeline.geometry import crop_resize
from pipeline.limits import out_of_memory
from pipeline.sampling import Geometry, View
from pipeline.store import Store
from pipeline.stored import StoredPictures


class DALISource:
    """Feeds DALI our samples in our order: its own readers shuffle by a window and crop by a hidden state."""

    def __init__(
        self,
        store: Store,
        views: dict[str, View],
        *,
        device: torch.device,
        workers: int,
        batch: int,
        hw_decoder_load: float,
    ):
        self.stored, self.sides = StoredPictures.in_shards(store), {name: view.side for name, view in views.items()}
        self.reader = open_decoder(workers)
        self.on_gpu = on_gpu = device.type == "cuda"
        self.pipeline: Any = None

        @pipeline_def(
            batch_size=batch,
            num_threads=workers,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,  # the loader's thread is what runs ahead
        )
        def decode():
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            # Both switches cost a few percent and bring the pixels within 55 dB of Pillow's instead of 45.
            picture = fn.decoders.image(
                file, device="mixed" if on_gpu else "cpu", output_type=types.RGB,
                use_fast_idct=False, jpeg_fancy_upsampling=True, hw_decoder_load=hw_decoder_load,
            )  # fmt: skip
            return fn.pad(picture, axes=(0, 1), fill_value=0)  # to the largest of the batch, not of the store

        self._doing = "making a batch"
        try:
            self.pipeline = decode()
            self.pipeline.build()
        except BaseException as error:
            self.reader.close()
            self.stored.close()
            if not isinstance(error, RuntimeError) or out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:200]
            raise ResourceError(f"DALI does not start on {device}: {why}. Use --loader shards.") from None

    def batches(
        self, plan: list[np.ndarray], where: Callable[[np.ndarray], dict[str, Geometry]]
    ) -> Iterator[dict[str, Tensor]]:
        for ids in plan:
            self._doing = f"reading {len(ids):,} samples of {self.stored.store.root}"
            rows = self.stored.rows(ids)
            files, failed = fetch(self.reader, rows)
            if failed.size:
                raise self._failure(ids, rows, failed)
            self.pipeline.feed_input("file", files)
            self._doing = f"waiting for DALI to decode {len(ids):,} samples of {self.stored.store.root}"
            try:
                (decoded,) = self.pipeline.run()
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    raise ResourceError(
                        f"DALI has no memory to decode {len(ids):,} pictures at once. Use a smaller --batch, or "
                        "--loader shards, which decodes no more than the views look at."
                    ) from None
                failed = undecodable(rows)  # DALI names no sample
                why = " ".join(str(error).split())[:200]
                raise (
                    self._failure(ids, rows, failed) if failed.size else DataError(f"DALI cannot decode: {why}.")
                ) from None
            canvas = torch.from_dlpack(decoded.as_tensor())
            self._doing = "cutting the views of a batch"
            # Not DALI's resize: at the edge of a box it repeats pixels where Pillow cuts the filter off.
            crops = {name: crop_resize(canvas, geometry, self.sides[name]) for name, geometry in where(ids).items()}
            if canvas.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # DALI knows nothing of our stream and will reuse the canvas
            yield crops

    def doing(self) -> str:
        return self._doing

    def _failure(self, ids: np.ndarray, rows: np.ndarray, failed: np.ndarray) -> DaaeError:
        place = int(failed[0])
        return self.stored.failure(int(ids[place]), int(rows["status"][place]))

    def close(self) -> None:
        self.reader.close()
        self.stored.close()
        self.pipeline = None
        if self.on_gpu:
            backend.ReleaseUnusedMemory()  # else it stays in DALI's pool, out of torch's reach
