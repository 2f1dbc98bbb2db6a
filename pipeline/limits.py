"""How much of the machine this process may use, by affinity, control groups and the kernel's limits, and how errors
read when that runs out."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DaaeError, DataError, ResourceError

SPARE_FILES = 256  # for whatever else this process opens
BROKEN = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)  # a disk or network, not the file on it
MEMORY_PHRASES = (
    "out of memory", "not enough memory", "can't allocate", "cannot allocate", "allocation failed", "alloc_failed",
    "allocator_failure", "bad_alloc",
)  # fmt: skip


def affinity() -> int:
    """Cores that this process may run on: Slurm and taskset cut them down."""
    return len(os.sched_getaffinity(0))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control group allows, None without a limit. Containers are limited so."""
    quotas = []
    for folder in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # version 2: "150000 100000" or "max 100000"
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())  # version 1: -1 without a limit
            if quota > 0:
                quotas.append(quota / int((folder / "cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control group allows, None without a limit."""
    limits = []
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    # Version 1 says "no limit" with a number near 2^63.
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def usable_cores(root: Path = Path("/")) -> float:
    """What affinity and quota leave; 1.5 cores are possible."""
    return min(affinity(), cpu_quota(root) or affinity())


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The control group of this process and its parents: the tightest of their limits holds.

    In a container the path that the kernel names may lie outside of what is mounted; its mounted root then has the
    container's own limits.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        for place in (Path(path), *Path(path).parents):
            yield mount / place.relative_to("/") if place.is_absolute() else mount / place


def make_room_for_files(count: int) -> None:
    """Raise the limit of open files where `count` more would pass it, as far as this process may.

    It is usually 1,024 at first, and a store of a million pictures has about as many shards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = 0
    with contextlib.suppress(OSError):
        there = len(os.listdir("/proc/self/fd"))
    wanted = there + count + SPARE_FILES
    top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < top:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))


def machine_fault(path: Path | str, error: OSError) -> ResourceError | None:
    """What to raise where a file cannot be read for a reason that is the machine's; None where it is the file's own."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return ResourceError(
            f"{path} cannot be opened: {error.strerror}, and this process may have {most:,} open at once. Allow more "
            "with `ulimit -n`."
        )
    if error.errno == errno.ENOMEM:
        return ResourceError(f"there is no memory to read {path}. Use fewer --workers, or give the process more.")
    if error.errno in BROKEN:
        return ResourceError(f"{path} cannot be read: {error.strerror}. Look at the disk or network that holds it.")
    return None


def unreadable(path: Path | str, error: OSError) -> DaaeError:
    """What to raise where a file cannot be read, whosever fault that is."""
    return machine_fault(path, error) or DataError(f"{path} cannot be read: {error.strerror or error}.")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, the host's or a GPU's, is what was missing: only torch has a class for it, and not always."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error).lower() for words in MEMORY_PHRASES)
