"""A slow disk, for real: a library that is loaded before libc's and sleeps before each pread."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>

static ssize_t slow(const char *name, int file, void *to, size_t bytes, off_t at) {
    static double per_call = -1, per_byte;
    if (per_call < 0) {
        per_byte = atof(getenv("SLOW_DISK_NS_PER_BYTE"));
        per_call = atof(getenv("SLOW_DISK_MS")) * 1e6;
    }
    double wait = per_call + per_byte * (double)bytes;
    struct timespec pause = {(time_t)(wait / 1e9), (long)(wait - 1e9 * (time_t)(wait / 1e9))};
    nanosleep(&pause, NULL);
    return ((ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, name))(file, to, bytes, at);
}

ssize_t pread(int file, void *to, size_t bytes, off_t at) { return slow("pread", file, to, bytes, at); }
ssize_t pread64(int file, void *to, size_t bytes, off_t at) { return slow("pread64", file, to, bytes, at); }
"""


def slow_disk(*, milliseconds: float = 0.0, megabytes_per_second: float = 0.0) -> dict[str, str]:
    """The environment of a process whose every pread takes so long before it begins. Needs a C compiler."""
    per_byte = 1e3 / megabytes_per_second if megabytes_per_second else 0.0
    return {
        **os.environ, "LD_PRELOAD": str(_library()), "SLOW_DISK_MS": str(milliseconds),
        "SLOW_DISK_NS_PER_BYTE": str(per_byte),
    }  # fmt: skip


@functools.cache
def _library() -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler
    work = Path(tempfile.mkdtemp(prefix="slow-disk-"))
    (work / "slow.c").write_text(SOURCE)
    library = work / "slow.so"
    command = [compiler, "-O1", "-shared", "-fPIC", str(work / "slow.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library
