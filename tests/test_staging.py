"""A folder in the making is one process' alone, also where several find it abandoned at the same moment."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.staging import staging


def locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock, as another process would. Raises BlockingIOError where it is held."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    return handle


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a process that was killed has left of tmp_path/out."""
    folder = tmp_path / ".out.partial-1"
    folder.mkdir()
    (folder / "a").write_text("a")
    return folder


def test_nobody_else_looks_at_what_was_left_while_one_takes_it(tmp_path, left):
    def adopt(folder: Path) -> bool:
        with pytest.raises(BlockingIOError):
            locked(tmp_path)
        return folder == left

    before = descriptors()
    with staging(tmp_path / "out", adopt=adopt) as folder:
        assert (folder / "a").read_text() == "a"
        with pytest.raises(BlockingIOError):
            locked(folder)
        os.close(locked(tmp_path))  # others may begin as soon as that is settled
    assert (tmp_path / "out/a").read_text() == "a"
    assert descriptors() <= before


def test_a_parent_folder_that_somebody_holds_is_not_waited_for_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.staging.PARENT_SECONDS", 0.3)
    handle, began = locked(tmp_path), time.monotonic()
    with staging(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    os.close(handle)
    assert time.monotonic() - began < 10
    assert (tmp_path / "out/a").read_text() == "a"


def test_who_comes_second_is_told_so(tmp_path, left):
    held = []

    def adopt(folder: Path) -> bool:
        held.append(locked(folder))  # another one was faster
        return True

    before = descriptors()
    with (
        pytest.raises(UsageError, match=r"/out is being written by another process \(see .*/\.out\.partial-\d+\)\."),
        staging(tmp_path / "out", adopt=adopt),
    ):
        pass
    os.close(held[0])
    assert descriptors() <= before
