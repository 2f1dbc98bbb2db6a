"""Backends that read pictures from files themselves: shards here, an FFCV file in ffcv_loader.py.

A batch is one call into the decoder, which reads, checks, decodes and crops every view of every picture of it.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipeline.decoder import open_decoder
from pipeline.sampling import Geometry, View
from pipeline.store import Store
from pipeline.stored import StoredPictures


class Blocks:
    """Host memory that is used again once nobody refers to it: pages new from the kernel cost more than small crops do.

    Whatever shows a part of a block, array or tensor, refers to it. Such references may go at any time in any thread,
    and new ones come from old ones alone: a block that nobody but the pool refers to stays unused until it is taken.
    """

    def __init__(self, most: int):
        self.most = most  # blocks that are kept; whoever holds on to more has the others to himself
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()  # two that take at once must not find the same block

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Of uint8, not initialised."""
        size = math.prod(shape)
        with self._lock:
            for block, count in zip(self._kept, _references(self._kept), strict=True):
                if block.size == size and count == UNUSED:
                    return block.reshape(shape)
            block = np.empty(size, np.uint8)
            if len(self._kept) < self.most:
                self._kept.append(block)
            return block.reshape(shape)


def _references(blocks: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


UNUSED = _references([np.empty(0, np.uint8)])[0]  # what is counted of a block that is in a list and nowhere else


class FileSource:
    """Crops of every view from the pictures of an address book."""

    def __init__(
        self, stored: StoredPictures, views: dict[str, View], *, device: torch.device, workers: int, ahead: int
    ):
        self.stored, self.device = stored, device
        self.sides = {name: view.side for name, view in views.items()}
        # Of each view `ahead` wait, one is filled, and the caller has one and the one before it.
        self.blocks = {name: Blocks(ahead + 3) for name in views}
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
                boxes, rows, images = drawn.pop(0).result(), self.stored.rows(ids), self.room(len(ids))
                self._asked = ids
                failed = self.decoder.decode(
                    rows, [boxes[name] for name in images], [each.numpy() for each in images.values()]
                )
                if failed.size:
                    first = int(failed[0])
                    raise self.stored.failure(int(ids[first]), int(rows["status"][first]))
                self._asked = None
                yield send(images, self.device)

    def room(self, count: int) -> dict[str, Tensor]:
        """Memory on the host for the crops of a batch: page-locked where it is to leave for a GPU meanwhile."""
        shapes = {name: (count, side, side, 3) for name, side in self.sides.items()}
        if self.device.type == "cuda":
            return {name: torch.empty(shape, dtype=torch.uint8, pin_memory=True) for name, shape in shapes.items()}
        return {name: torch.from_numpy(self.blocks[name].take(shape)) for name, shape in shapes.items()}

    def doing(self) -> str:
        ids = self._asked
        if ids is None:
            return "copying a batch to the GPU" if self.device.type == "cuda" else "making a batch"
        what, place = self.decoder.doing()
        which = f"{len(ids):,} samples" if place is None else f"sample {ids[place]:,}"
        return f"{what} {which} of {self.stored.store.root}"

    def close(self) -> None:
        self.decoder.close()
        self.stored.close()


def send(images: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """To the device, without waiting for the bytes to arrive."""
    return {name: each.to(device, non_blocking=True) for name, each in images.items()}


class ShardSource(FileSource):
    """WebDataset shards, at any place in any order."""

    def __init__(self, store: Store, views: dict[str, View], *, device: torch.device, workers: int, ahead: int):
        super().__init__(StoredPictures.in_shards(store), views, device=device, workers=workers, ahead=ahead)
