"""Files that are read at random, few of them open at a time; and reading where the disk or network below may fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.limits import BROKEN, machine_fault, unreadable
from pipeline.names import printable

T = TypeVar("T")
LIMIT = 64  # a process may often open no more than 1,024, and a source or a store can have more files than that


class Handles:
    """Descriptors of files, opened when they are first asked for. Of too many, the one not used for longest is closed.

    For one thread: another one could close what this one reads.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._open: dict[bytes | str | Path, int] = {}  # the one not used for longest comes first

    def file(self, path: bytes | str | Path) -> int:
        """A descriptor to read from, good until `limit` other files have been asked for. Raises OSError."""
        handle = self._open.pop(path, None)
        if handle is None:
            while len(self._open) >= self.limit:
                self.forget(next(iter(self._open)))
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = handle
        return handle

    def read(self, path: bytes | str | Path, size: int, at: int) -> bytes:
        """The `size` bytes that begin at byte `at`; fewer where the file ends before. Raises OSError, ResourceError."""
        return self.using(path, lambda handle: os.pread(handle, size, at))

    def using(self, path: bytes | str | Path, read: Callable[[int], T]) -> T:
        """What `read` returns of a descriptor; the file is opened anew where it must be read again.

        Raises ResourceError as `steadily` does, and what `read` raises.
        """

        def once() -> T:
            try:
                return read(self.file(path))
            except OSError:
                self.forget(path)  # a stale handle stays stale
                raise

        return steadily(path, once)

    def forget(self, path: bytes | str | Path) -> None:
        """Close a file, where it is open."""
        handle = self._open.pop(path, None)
        if handle is not None:
            os.close(handle)

    def close(self) -> None:
        """Close all of them. They are opened again when they are asked for."""
        for path in list(self._open):
            self.forget(path)


def steadily(path: bytes | str | Path, read: Callable[[], T]) -> T:
    """What `read` returns. It is called a second time where the disk or the network failed: that may be over at once.

    path: what is read. Raises ResourceError where it fails again or the machine lacks something; other errors as they
    come.
    """
    try:
        return read()
    except OSError as error:
        if error.errno not in BROKEN:
            check_machine(path, error)
            raise
    try:
        return read()
    except OSError as error:
        check_machine(path, error)
        raise


def read_whole(path: Path) -> bytes:
    """All bytes of a small file. Raises DataError, ResourceError."""
    try:
        return steadily(path, path.read_bytes)
    except OSError as error:
        raise unreadable(path, error) from None


def check_machine(path: bytes | str | Path, error: Exception) -> None:
    """Raises ResourceError where reading `path` failed for a reason that is no fault of the file."""
    fault = machine_fault(printable(os.fsencode(path)), error) if isinstance(error, OSError) else None
    if fault is not None:
        raise fault from None
