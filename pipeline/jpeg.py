"""The JPEG of every sample of a store: where it lies, in shards or in an FFCV file, and its bytes."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.decoder import FAILURES, SAMPLE, checksum_in_c, read_sample
from pipeline.errors import DataError
from pipeline.store import Store


class StoredJpegs:
    """An address book of samples and the open files that it points into.

    Files are read, never mapped: one that is cut short meanwhile then costs an error and not the process, and one that
    is replaced is read on as it was.
    """

    def __init__(self, store: Store, paths: list[Path], file: np.ndarray, offset: np.ndarray):
        """file: (N,) which of `paths` holds sample i; offset: (N,) the byte of it at which its JPEG begins."""
        self.store, self.paths, self._file, self._offset = store, paths, file, offset
        self._open: list[int] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for path in paths:
                try:
                    self._open.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                except OSError as error:
                    raise DataError(f"{path} cannot be opened: {error.strerror}.") from None
            stack.pop_all()

    @classmethod
    def in_shards(cls, store: Store) -> StoredJpegs:
        return cls(store, store.shards, store.index["shard"], store.index["offset"])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """(len(ids),) SAMPLE, for a decoder."""
        index = self.store.index[ids]
        rows = np.zeros(len(ids), SAMPLE)
        rows["file"] = np.array(self._open, np.int32)[self._file[ids]]
        rows["offset"] = self._offset[ids]
        for name in ("size", "height", "width", "sum"):
            rows[name] = index[name]
        return rows

    def read(self, sample: int) -> np.ndarray:
        """(size,) uint8: the JPEG file of one sample. Raises DataError where it is not whole, or not as converted."""
        (row,) = self.rows(np.array([sample]))
        data = np.frombuffer(read_sample(row), np.uint8)
        if data.size < row["size"] or checksum_in_c(data) != row["sum"]:
            raise DataError(self.sentence(sample, 4 if data.size < row["size"] else 5))
        return data

    def sentence(self, sample: int, status: int) -> str:
        """What a decoder's status says of a sample, where that lies and what to do."""
        path, (store, number) = self.paths[int(self._file[sample])], self.store.owner(sample)
        return (
            f"sample {number:,} of {store.root} cannot be used: {FAILURES[status]} ({path.name} at byte "
            f"{int(self._offset[sample]):,}; source {store.name(number)}). Convert the images again."
        )

    def forget(self, ids: np.ndarray) -> None:
        """Ask the kernel to drop what it keeps of these samples in memory, so that the disk itself can be measured."""
        for row in self.rows(ids):
            os.posix_fadvise(int(row["file"]), int(row["offset"]), int(row["size"]), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())


def picture(data: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as Pillow decodes a stored JPEG: the reference that every backend is compared with."""
    with Image.open(io.BytesIO(data.tobytes())) as image:
        return np.asarray(image.convert("RGB"))
