"""The picture of every sample of a store: where it lies, in shards or in an FFCV file, and its bytes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from pipeline.decoder import CHANGED, FAILURES, NO_MEMORY, SAMPLE, UNREADABLE, by_pillow, checksum_in_c, read_sample
from pipeline.errors import DaaeError, DataError, ResourceError
from pipeline.limits import machine_fault, make_room_for_files
from pipeline.store import Store


class StoredPictures:
    """An address book of samples and the open files that it points into.

    Files are read, never mapped: one that is cut short meanwhile then costs an error and not the process, and one that
    is replaced is read on as it was. All stay open: a batch may need any of them, and reads them in threads of its own.
    """

    def __init__(self, store: Store, paths: list[Path], file: np.ndarray, offset: np.ndarray):
        """file: (N,) which of `paths` holds sample i; offset: (N,) the byte of it at which its picture begins.

        store: with its tables held in memory. Raises DataError, ResourceError: a file cannot be opened.
        """
        self.store, self.paths, self._file, self._offset = store, paths, file, offset
        self._raw = np.repeat([part.raw for part in store.parts], [part.count for part in store.parts])
        self._open: list[int] = []
        make_room_for_files(len(paths))
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for path in paths:
                try:
                    self._open.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                except OSError as error:
                    what = DataError(f"{path} cannot be opened: {error.strerror}.")
                    raise machine_fault(path, error) or what from None
            stack.pop_all()

    @classmethod
    def in_shards(cls, store: Store) -> StoredPictures:
        """Any store's: where there are no shards, its index points into the FFCV file. Its tables are held in memory.

        Raises DataError, ResourceError: a file cannot be opened, or the tables are not what was written.
        """
        store.hold_tables()
        return cls(store, store.shards, store.index["shard"], store.index["offset"])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """(len(ids),) SAMPLE, for a decoder."""
        index = self.store.index[ids]
        rows = np.zeros(len(ids), SAMPLE)
        rows["file"] = np.array(self._open, np.int32)[self._file[ids]]
        rows["offset"], rows["raw"] = self._offset[ids], self._raw[ids]
        for name in ("size", "height", "width", "sum"):
            rows[name] = index[name]
        return rows

    def read(self, sample: int) -> np.ndarray:
        """(size,) uint8: what is stored of one sample.

        Raises DataError where it is not whole, or not as converted; ResourceError where the machine cannot read it.
        """
        (row,) = self.rows(np.array([sample]))
        try:
            data = np.frombuffer(read_sample(row), np.uint8)
        except (OSError, OverflowError) as error:
            raise self._unreadable(sample, error) from None
        if data.size < row["size"] or checksum_in_c(data) != row["sum"]:
            raise DataError(self.sentence(sample, UNREADABLE if data.size < row["size"] else CHANGED))
        return data

    def picture(self, sample: int) -> np.ndarray:
        """(H, W, 3) uint8 as Pillow decodes a sample: the reference that every backend is compared with.

        Raises DataError, ResourceError.
        """
        (row,) = self.rows(np.array([sample]))
        try:
            status, image = by_pillow(row, self.read(sample).tobytes())
        except MemoryError:
            status, image = NO_MEMORY, None
        if image is None:
            raise self.failure(sample, status)
        return np.array(image)

    def failure(self, sample: int, status: int) -> DaaeError:
        """What to raise for a decoder's status: only what is wrong with the store is a DataError.

        A decoder does not say why it could not read: the picture is read once more.
        """
        if status == NO_MEMORY:
            return ResourceError(
                f"there is no memory to decode {self._named(sample)}. Use fewer --workers or a smaller --batch."
            )
        if status == UNREADABLE:
            try:
                self.read(sample)
            except DaaeError as error:
                return error
            return ResourceError(
                f"{self._path(sample)} could not be read, and a moment later it could. Look at the disk or network "
                "that holds it."
            )
        return DataError(self.sentence(sample, status))

    def sentence(self, sample: int, status: int) -> str:
        """What a decoder's status says of a sample, where that lies and what to do."""
        store, number = self.store.owner(sample)
        return (
            f"{self._named(sample)} cannot be used: {FAILURES[status]} ({self._path(sample).name} at byte "
            f"{int(self._offset[sample]):,}; source {store.name(number)}). Convert the images again."
        )

    def _unreadable(self, sample: int, error: Exception) -> DaaeError:
        fault = machine_fault(self._path(sample), error) if isinstance(error, OSError) else None
        return fault or DataError(self.sentence(sample, UNREADABLE))

    def _named(self, sample: int) -> str:
        store, number = self.store.owner(sample)
        return f"sample {number:,} of {store.root}"

    def _path(self, sample: int) -> Path:
        return self.paths[int(self._file[sample])]

    def forget(self, ids: np.ndarray) -> None:
        """Ask the kernel to drop what it keeps of these samples in memory, so that the disk itself can be measured."""
        for row in self.rows(ids):
            os.posix_fadvise(int(row["file"]), int(row["offset"]), int(row["size"]), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())
