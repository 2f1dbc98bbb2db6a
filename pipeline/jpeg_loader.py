"""Backends that read JPEGs from files themselves: shards here, an FFCV file in ffcv_loader.py.

A batch is one call into the decoder, which reads, checks, decodes and crops every view of every picture of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipeline.decoder import open_decoder
from pipeline.errors import DataError
from pipeline.jpeg import StoredJpegs
from pipeline.sampling import Geometry, View
from pipeline.store import Store


class JpegSource:
    """Crops of every view from the JPEGs of an address book."""

    def __init__(self, jpegs: StoredJpegs, views: dict[str, View], *, device: torch.device, workers: int):
        self.jpegs, self.device = jpegs, device
        self.sides = {name: view.side for name, view in views.items()}
        self.decoder = open_decoder(workers)
        self._asked: np.ndarray | None = None  # the ids that the decoder is at

    def batches(
        self, plan: list[np.ndarray], where: Callable[[np.ndarray], dict[str, Geometry]]
    ) -> Iterator[dict[str, Tensor]]:
        # Boxes of the next batch are drawn while this one is decoded: otherwise every core but one would wait for them.
        with ThreadPoolExecutor(1, thread_name_prefix="boxes") as beside:
            drawn = [beside.submit(where, ids) for ids in plan[:1]]
            for place, ids in enumerate(plan):
                drawn += [beside.submit(where, after) for after in plan[place + 1 : place + 2]]
                boxes, rows, images = drawn.pop(0).result(), self.jpegs.rows(ids), self.room(len(ids))
                self._asked = ids
                failed = self.decoder.decode(
                    rows, [boxes[name] for name in images], [each.numpy() for each in images.values()]
                )
                self._asked = None
                if failed.size:
                    first = int(failed[0])
                    raise DataError(self.jpegs.sentence(int(ids[first]), int(rows["status"][first])))
                yield send(images, self.device)

    def room(self, count: int) -> dict[str, Tensor]:
        """Memory on the host for the crops of a batch: page-locked where it is to leave for a GPU meanwhile."""
        return {
            name: torch.empty(count, side, side, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            for name, side in self.sides.items()
        }

    def doing(self) -> str:
        ids = self._asked
        if ids is None:
            return "copying a batch to the GPU" if self.device.type == "cuda" else "making a batch"
        what, place = self.decoder.doing()
        which = f"{len(ids):,} samples" if place is None else f"sample {ids[place]:,}"
        return f"{what} {which} of {self.jpegs.store.root}"

    def close(self) -> None:
        self.decoder.close()
        self.jpegs.close()


def send(images: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """To the device, without waiting for the bytes to arrive."""
    return {name: each.to(device, non_blocking=True) for name, each in images.items()}


class ShardSource(JpegSource):
    """WebDataset shards, at any place in any order."""

    def __init__(self, store: Store, views: dict[str, View], *, device: torch.device, workers: int, batch: int):
        super().__init__(StoredJpegs.in_shards(store), views, device=device, workers=workers)
