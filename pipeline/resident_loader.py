"""The whole store decoded once into one uint8 tensor on the device: nothing is read or decoded while training.

For data sets that fit, and as the upper bound of what a loader can give.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import DataError, ResourceError
from pipeline.geometry import crop_resize
from pipeline.jpeg import StoredJpegs
from pipeline.limits import memory_limit
from pipeline.sampling import Geometry, View
from pipeline.store import Store

MOST = 0.6  # of the memory that is free
AT_ONCE = 256  # pictures that wait beside the tensor


class ResidentSource:
    def __init__(self, store: Store, views: dict[str, View], *, device: torch.device, workers: int, batch: int):
        self.sides = {name: view.side for name, view in views.items()}
        shape = (store.count, store.max_height, store.max_width, 3)
        size, free = float(np.prod(shape, dtype=np.float64)), free_bytes(device)
        if size > MOST * free:
            raise ResourceError(
                f"--loader resident: {store.count:,} pictures of up to {shape[1]} x {shape[2]} px take "
                f"{size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free. Use --loader auto."
            )
        self.pictures = torch.zeros(shape, dtype=torch.uint8, device=device)
        jpegs = StoredJpegs.in_shards(store)

        def decode(sample: int) -> tuple[int, Tensor]:
            try:
                with Image.open(io.BytesIO(jpegs.read(sample).tobytes())) as image:
                    return sample, torch.from_numpy(np.array(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError):
                raise DataError(jpegs.sentence(sample, 1)) from None

        with ThreadPoolExecutor(max(1, workers)) as pool:
            for start in range(0, store.count, AT_ONCE):
                for sample, picture in pool.map(decode, range(start, min(start + AT_ONCE, store.count))):
                    self.pictures[sample, : picture.shape[0], : picture.shape[1]] = picture.to(device)
        jpegs.close()
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
        del self.pictures


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    free, limit = psutil.virtual_memory().available, memory_limit()
    return float(free if limit is None else min(free, limit - psutil.Process().memory_info().rss))
