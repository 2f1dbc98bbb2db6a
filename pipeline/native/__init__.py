"""The part in C, compiled once per machine: crops.c, which needs a compiler and libjpeg-turbo's headers.

`make setup` compiles it (`python -m pipeline.native`); whoever did not run that has it compiled on first use. Where it
cannot be, loaders decode with Pillow: the same crops, several times slower.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "crops.c"
COMPILE_SECONDS = 120.0
# Without contraction a * b + c is rounded twice everywhere, so that filters are equal on every machine.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]


def library() -> ctypes.CDLL:
    """The compiled crops.c, made on first use. Raises OSError with the reason where it cannot be made."""
    found = _load()
    if isinstance(found, str):
        raise OSError(found)
    return found


@functools.cache
def _load() -> ctypes.CDLL | str:
    try:
        loaded = ctypes.CDLL(str(built()))
    except OSError as error:
        return str(error)
    pointer, count = ctypes.c_void_p, ctypes.c_int
    loaded.crops_open.restype, loaded.crops_open.argtypes = pointer, [count, count]
    loaded.crops_close.restype, loaded.crops_close.argtypes = None, [pointer]
    loaded.crops_batch.restype, loaded.crops_batch.argtypes = count, [pointer, count, count, *[pointer] * 4]
    loaded.crops_whole.restype, loaded.crops_whole.argtypes = count, [pointer, count, count, pointer]
    loaded.crops_doing.restype, loaded.crops_doing.argtypes = count, [pointer, ctypes.POINTER(count)]
    loaded.checksum.restype, loaded.checksum.argtypes = ctypes.c_uint64, [pointer, ctypes.c_uint64]
    return loaded


def why_not() -> str | None:
    """Why there is no region decoder here, in a few words; None where there is one."""
    found = _load()
    return found if isinstance(found, str) else None


def built() -> Path:
    """The library for this source and machine: beside the source, or in the user's cache where that is read-only."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:12]
    name = f"crops-{digest}-{platform.system()}-{platform.machine()}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "daae"
    for folder in (SOURCE.parent, cache):
        if (folder / name).is_file():
            return folder / name
    for folder in (SOURCE.parent, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as work:
                return _compile(Path(work) / name).replace(folder / name)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    raise OSError(f"neither {SOURCE.parent} nor {cache} can be written")


def _compile(target: Path) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise OSError("no C compiler (cc, gcc or clang)")
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(target), "-ljpeg", "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"{compiler} did not finish within {COMPILE_SECONDS:.0f} s") from None
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise OSError(f"{compiler} failed: {first}; libjpeg-turbo's headers come with libjpeg-dev")
    return target
