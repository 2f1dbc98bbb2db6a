"""Few files are open at a time, and what the machine lacks is never taken for a fault of a file."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import ResourceError
from pipeline.handles import LIMIT, Handles, steadily


def open_below(folder: Path) -> set[str]:
    """Names of the files in a folder that this process has open."""
    names = set()
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is gone
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_relative_to(folder):
                names.add(path.name)
    return names


def failing(number: int, times: int):
    """A read that fails so often and then answers; and how often it was called."""
    calls = []

    def read() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return "read"

    return read, calls


def test_the_file_that_was_not_used_for_longest_is_closed(tmp_path):
    paths = [tmp_path / str(i) for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(b"0123456789"[i:])
    handles = Handles(3)
    assert [handles.read(path, 2, 1) for path in paths[:3]] == [b"12", b"23", b"34"]
    first = handles.file(paths[0])
    assert handles.read(paths[3], 99, 3) == b"6789"
    assert open_below(tmp_path) == {"0", "2", "3"}
    assert handles.file(paths[0]) == first
    assert handles.read(paths[1], 1, 0) == b"1"
    assert open_below(tmp_path) == {"0", "3", "1"}
    handles.close()
    assert open_below(tmp_path) == set()
    assert handles.read(paths[4], 1, 0) == b"4"
    handles.close()
    assert Handles().limit == LIMIT
    with pytest.raises(FileNotFoundError):
        handles.read(tmp_path / "none", 1, 0)


def test_a_file_is_opened_anew_where_the_disk_failed(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    handles, genuine, calls = Handles(), os.pread, []
    assert handles.read(tmp_path / "a", 3, 0) == b"old"

    def stale(handle: int, size: int, at: int) -> bytes:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return genuine(handle, size, at)

    monkeypatch.setattr(os, "pread", stale)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(tmp_path / "a")
    assert handles.read(tmp_path / "a", 3, 0) == b"new"
    handles.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_machine_lacks_is_said_at_once(number):
    read, calls = failing(number, 1)
    with pytest.raises(ResourceError, match="/data/a"):
        steadily("/data/a", read)
    assert len(calls) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_asked_a_second_time(number):
    read, calls = failing(number, 1)
    assert steadily("/data/a", read) == "read"
    read, calls = failing(number, 2)
    with pytest.raises(ResourceError, match=r"/data/new\\nline cannot be read"):
        steadily(b"/data/new\nline", read)
    assert len(calls) == 2


def test_other_errors_come_as_they_are():
    read, calls = failing(errno.EACCES, 1)
    with pytest.raises(PermissionError):
        steadily("/data/a", read)
    assert len(calls) == 1
