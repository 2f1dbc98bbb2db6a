"""Files and folders that are there whole or not at all, and folders that one process at a time may write in.

What is built grows beside its destination under a hidden name and is renamed when it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from pipeline.errors import Preempted, ResourceError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, or a limit of file sizes
PARENT_SECONDS = 5.0  # that the lock of a parent folder is waited for: another process holds it for moments


class _Terminated(BaseException):
    """SIGTERM or SIGHUP. No Exception, so that no clean-up code on the way can swallow it."""


@contextlib.contextmanager
def terminable(doing: str) -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the block like Ctrl-C does, so that everything half-written is removed.

    Raises Preempted (exit code 75: the same command starts again) instead of the signal's silent death.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in caught:  # once is enough: a second signal must not interrupt the clean-up
            signal.signal(other, signal.SIG_IGN)
        raise _Terminated(signal.Signals(number).name)

    caught = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    # A parent that ignores SIGHUP (nohup) wants the work to go on.
    caught = {number: before for number, before in caught.items() if before != signal.SIG_IGN}
    try:
        for number in caught:
            signal.signal(number, stop)
        yield
    except _Terminated as name:
        raise Preempted(f"stopped by {name} while {doing}; nothing half-written is left. Run it again.") from None
    finally:
        for number, before in caught.items():
            signal.signal(number, before)


@contextlib.contextmanager
def staging(
    destination: Path,
    *,
    replace: bool = False,
    adopt: Callable[[Path], bool] | None = None,
    keep: Callable[[Path, BaseException], bool] | None = None,
) -> Iterator[Path]:
    """A new empty folder beside `destination` that takes its place when the block ends, and vanishes if it raises.

    The folder is locked while its process lives, so what a killed process left behind is known and removed here,
    also after a restart of the machine or from another container. With `replace`, an older destination is moved out
    of the way first and removed last.
    adopt: whether work can go on in a folder that a killed process left; the block is then given that one, not empty.
    keep: whether what is there when the block raises is worth keeping for such a later process.
    Raises UsageError where another process is building the same destination, ResourceError where the place cannot be
    written or is full.
    """
    destination = destination.resolve()
    parent, name = destination.parent, destination.name
    folder = parent / f".{name}.partial-{os.getpid()}"
    old = parent / f".{name}.old-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(parent):
            adopted = _clear_leftovers(parent, name, destination, adopt)
            if adopted is not None:
                os.rename(adopted, folder)
            else:
                folder.mkdir()
            lock = _locked(folder, destination)
    except OSError as error:
        raise ResourceError(f"{parent} cannot be written: {error.strerror}.") from None
    kept = False
    try:
        try:
            yield folder
        except BaseException as error:
            kept = keep is not None and keep(folder, error)
            raise
        sync(folder)
        if replace and destination.exists():
            os.rename(destination, old)
        os.rename(folder, destination)
        sync(parent)
    except OSError as error:
        raise disk_error(error, folder) from None
    finally:
        os.close(lock)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not destination.exists():
            os.rename(old, destination)
        shutil.rmtree(old, ignore_errors=True)


def disk_error(error: OSError, where: Path) -> Exception:
    """A full disk, quota or broken medium as a sentence; any other OSError comes back as it is."""
    if is_full(error):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(where.parent).free
            return ResourceError(
                f"no space left while writing {where.parent} ({error.strerror}; {size_in_words(free)} free now). "
                "Free some disk space and run it again; what was written has been removed."
            )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
        return ResourceError(f"{error.filename or where.parent} cannot be written: {error.strerror}.")
    return error


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk, a quota or a limit of file sizes is used up."""
    return isinstance(error, OSError) and error.errno in FULL


def size_in_words(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Hold the lock of a folder: no other process is to find abandoned in it what this one is about to take.

    Whoever cannot have it within PARENT_SECONDS goes on without: nothing may hang, and `_locked` still tells who came
    second.
    """
    lock, end = os.open(parent, os.O_RDONLY), time.monotonic() + PARENT_SECONDS
    try:
        while time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def _locked(folder: Path, destination: Path) -> int:
    """A descriptor that holds the lock of a folder while it is open. Raises UsageError where another process has it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise UsageError(f"{destination} is being written by another process (see {folder}).") from None
        raise
    return lock


def _clear_leftovers(parent: Path, name: str, destination: Path, adopt: Callable[[Path], bool] | None) -> Path | None:
    """Remove what killed processes left, but for one folder that is adopted."""
    adopted = None
    for kind in ("partial", "old"):
        prefix = f".{name}.{kind}-"
        for left in sorted(path for path in parent.iterdir() if path.name.startswith(prefix) and path.is_dir()):
            if not left.name.removeprefix(prefix).isdigit():
                continue
            os.close(_locked(left, destination))
            # Killed between the two renames of a replacement: the older folder is still whole.
            if kind == "old" and not destination.exists():
                os.rename(left, destination)
            elif kind == "partial" and adopted is None and adopt is not None and adopt(left):
                adopted = left
            else:
                shutil.rmtree(left)
    return adopted


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a small file: a reader sees the old one or the new one, never half of it. Raises ResourceError."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write_durably(aside, content if isinstance(content, bytes) else content.encode())
        os.replace(aside, path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(out: Path, kind: str, marks: tuple[str, ...], *, overwrite: bool) -> Iterator[Path]:
    """Make the folder `out` of a `kind` of work and hold its lock; with `overwrite`, empty it.

    marks: files by which such a folder is known; what holds anything else is left alone, whatever is asked.
    The lock is the kernel's (flock), so it ends with the process however that ends.
    Raises UsageError: in use, or holds something else; ResourceError: cannot be written.
    """
    lock = out / ".lock"
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file, not a folder.")
        ours = any((out / name).exists() for name in (*marks, lock.name))
        if out.is_dir() and any(out.iterdir()) and not ours:
            raise UsageError(f"--out {out} holds files that are no {kind}. Choose another folder.")
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ResourceError(f"--out {out} cannot be written: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 100).decode(errors="replace").strip() or "another process"
            raise UsageError(f"--out {out} is in use by {owner}.") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        if overwrite:
            for path in (path for path in out.iterdir() if path != lock):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield out
    finally:
        os.close(handle)
