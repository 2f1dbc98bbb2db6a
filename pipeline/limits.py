"""What affinity and control groups leave this process of the machine: less than there is, in a container or a job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
