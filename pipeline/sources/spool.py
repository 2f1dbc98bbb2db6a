"""Pictures that cannot be read at random, copied once into one file beside the store in the making."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.errors import ResourceError
from pipeline.staging import disk_error, size_in_words


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def check_room(spool: Path, name: str, copied: int) -> None:
    """Raises ResourceError where the disk of the spool has no room for so many bytes of the source `name`."""
    free = shutil.disk_usage(spool.parent).free
    if copied > free:
        raise ResourceError(
            f"{spool.parent} has {size_in_words(free)} free, the pictures of {name} need about "
            f"{size_in_words(copied)} there while they are converted. Free some, or choose another disk."
        )


class Spool:
    """Pictures of a stream, one behind the other in one file; `file` is made when the first one comes."""

    def __init__(self, path: Path, largest: int) -> None:
        self.path, self.largest = path, largest
        self.at = 0
        self._file: BinaryIO | None = None

    def add(self, source: Readable, size: int) -> int:
        """Copy a picture; returns where it begins. One that is too large for a picture is left out: its size tells.

        A stream that ends early leaves no trace.
        """
        if size > self.largest:
            return 0
        if self._file is None:
            self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__())
        start, left = self.at, size
        self._file.seek(start)
        while left:
            block = source.read(min(left, 1 << 20))
            if not block:
                raise EOFError("it ends inside a file")
            try:
                self._file.write(block)
            except OSError as error:
                raise disk_error(error, self.path) from None
            left -= len(block)
        self.at = start + size
        return start

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            if error is None:
                try:
                    file.truncate(self.at)
                    os.fsync(file.fileno())
                except OSError as failure:
                    raise disk_error(failure, self.path) from None
