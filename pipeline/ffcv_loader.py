"""FFCV backend: one .beton, decoded by ours.

Of FFCV's own loader nothing is left: its crops draw from a generator that cannot be seeded, it decodes whole pictures,
once for each view, it ignores what the decoder returns, so that a damaged sample is black or the picture before it, and
every process compiles its code anew for a quarter of a minute.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.beton import picture_offsets
from pipeline.limits import unreadable
from pipeline.sampling import View
from pipeline.shard_loader import FileSource
from pipeline.store import Store
from pipeline.stored import StoredPictures


class FFCVSource(FileSource):
    """The pictures of a .beton, which the converter has filled with the bytes of the shards."""

    def __init__(self, store: Store, views: dict[str, View], *, device: torch.device, workers: int, ahead: int):
        super().__init__(in_beton(store), views, device=device, workers=workers, ahead=ahead)


def in_beton(store: Store) -> StoredPictures:
    """The store's tables are held in memory. Raises DataError, ResourceError."""
    store.hold_tables()
    files = [(part.beton, part.count) for part in store.parts if part.beton is not None]
    offsets = np.concatenate([_offsets(path, count) for path, count in files])
    which = np.repeat(np.arange(len(files)), [count for _, count in files])
    return StoredPictures(store, [path for path, _ in files], which, offsets)


def _offsets(path: Path, count: int) -> np.ndarray:
    try:
        return picture_offsets(path, count)
    except OSError as error:
        raise unreadable(path, error) from None
