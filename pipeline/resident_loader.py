"""The whole store decoded once into one uint8 tensor on the device: nothing is read or decoded while training.

For data sets that fit, and as the upper bound of what a loader can give.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.decoder import in_threads
from pipeline.errors import ResourceError, StalledError
from pipeline.geometry import crop_resize
from pipeline.limits import memory_limit
from pipeline.sampling import Geometry, View
from pipeline.store import Store
from pipeline.stored import StoredPictures

MOST = 0.6  # of the memory that is free


class ResidentSource:
    """Raises DataError (a sample is damaged), ResourceError (no room), StalledError when it is made."""

    def __init__(
        self, store: Store, views: dict[str, View], *, device: torch.device, workers: int, stall_seconds: float
    ):
        self.sides = {name: view.side for name, view in views.items()}
        shape = (store.count, store.max_height, store.max_width, 3)
        size, free = float(np.prod(shape, dtype=np.float64)), free_bytes(device)
        if size > MOST * free:
            raise ResourceError(
                f"--loader resident: {store.count:,} pictures of up to {shape[1]} x {shape[2]} px take "
                f"{size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free. Use --loader auto."
            )
        self.pictures = torch.zeros(shape, dtype=torch.uint8, device=device)
        under_way: set[int] = set()
        with contextlib.closing(StoredPictures.in_shards(store)) as stored:

            def decoded(sample: int) -> Tensor:
                under_way.add(sample)
                picture = torch.from_numpy(stored.picture(sample))
                under_way.discard(sample)
                return picture

            try:
                for sample, picture in in_threads(decoded, store.count, max(1, workers), stall_seconds):
                    self.pictures[sample, : picture.shape[0], : picture.shape[1]] = picture.to(device)
            except queue.Empty:
                which = next(iter(set(under_way)), 0)
                raise StalledError(
                    f"nothing was read for {stall_seconds:.0f} s, at sample {which:,} of {store.root}. Look at the "
                    "disk that holds the store, or allow more with --speed.stall-seconds."
                ) from None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # batches are cut on another stream

    def batches(
        self, plan: list[np.ndarray], where: Callable[[np.ndarray], dict[str, Geometry]]
    ) -> Iterator[dict[str, Tensor]]:
        for ids in plan:
            canvas = self.pictures[torch.from_numpy(ids).to(self.pictures.device)]
            yield {name: crop_resize(canvas, geometry, self.sides[name]) for name, geometry in where(ids).items()}

    def doing(self) -> str:
        return "cutting the views of a batch"

    def close(self) -> None:
        self.pictures = torch.empty(0, dtype=torch.uint8)


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        # The driver counts as used what torch keeps of tensors that are gone, and gives to the next.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    import psutil

    free, limit = psutil.virtual_memory().available, memory_limit()
    return float(free if limit is None else min(free, limit - psutil.Process().memory_info().rss))
