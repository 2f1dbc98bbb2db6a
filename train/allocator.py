"""How a process that trains on a CPU takes its memory: it keeps what it once had, in huge pages.

A step takes hundreds of large tensors and frees them again. By default glibc's malloc gives each back to the kernel,
which hands it out anew in pages of 4 KiB, each cleared first: a tenth to a quarter of a step in bfloat16. malloc
reads its settings once, when a process starts; hence the process starts again, as itself.
"""

from __future__ import annotations

import contextlib
import os
import sys

SETTINGS = "GLIBC_TUNABLES"
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
HUGE_PAGES_SINCE = (2, 35)  # glibc


def keep_memory() -> None:
    """Call it first: what was imported before is imported again. Does nothing where malloc is not glibc's or has
    settings of the user's, and beside a GPU, whose tensors are none of malloc's."""
    if SETTINGS not in os.environ and glibc() >= HUGE_PAGES_SINCE and not os.path.exists("/dev/nvidiactl"):
        os.environ[SETTINGS] = KEPT
        _start_again()


def give_memory_back() -> None:
    """The other way: malloc as it comes."""
    if os.environ.get(SETTINGS) == KEPT:
        del os.environ[SETTINGS]
        _start_again()


def glibc() -> tuple[int, ...]:
    """Its version; (0,) where there is none."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(int(part) for part in version.split(".")) if name == "glibc" else (0,)
    return (0,)


def _start_again() -> None:
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
