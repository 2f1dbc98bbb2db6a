"""Writing `images.beton`: FFCV's own writer, fed with the bytes that the shards already hold.

FFCV's writer re-encodes whatever it is given, prints a bar, waits for ever if its worker dies (one bad sample or a full
disk is enough), and importing it sets torch to one thread. So it runs as a process of its own, `python -m
pipeline.ffcv_writer FOLDER MODE`, with an `encode` that stores our bytes as they are, and is watched from both sides.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.beton import picture_offsets
from pipeline.errors import ResourceError, StalledError
from pipeline.handles import Handles
from pipeline.interpreter import python
from pipeline.staging import size_in_words
from pipeline.store import BETON

MIB = 1 << 20
POLL_SECONDS = 0.2
IMPORT_SECONDS = 120.0
END_SECONDS = 5.0  # that a killed process is waited for: one that hangs in the kernel would not end


def ffcv_missing() -> str | None:
    """Why FFCV cannot be imported here, in a few words, or None. Imports nothing, so it answers at once."""
    for package in ("ffcv", "numba", "cv2", "torch"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    spec = importlib.util.find_spec("ffcv")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        for library in Path(folder).parent.glob("ffcv/_libffcv*.so"):
            try:
                ctypes.CDLL(str(library))
            except OSError as error:
                return str(error)
            return None
    return "its C++ part was not built"


def write_beton(
    folder: Path, *, raw: bool, stall_seconds: float = 180.0, progress: Callable[[int], None] = lambda done: None
) -> Path:
    """Write `images.beton` from the shards, `index.npy` and `labels.npy` in `folder`, in a watched child process.

    raw: they hold pixels. stall_seconds: give up when the file has not grown for so long. progress: called
    several times a second with the bytes written so far.
    Raises ResourceError: FFCV cannot be imported, the disk is full, the writer died; StalledError: it stopped moving.
    """
    index = np.load(folder / "index.npy", mmap_mode="r")
    target = folder / BETON
    expected = int(index["size"].sum())
    shared = 32 * len(index)  # FFCV keeps its table, 24 bytes a picture, in shared memory while it writes
    with contextlib.suppress(OSError):
        facts = os.statvfs("/dev/shm")
        if facts.f_bavail * facts.f_frsize < shared:
            raise ResourceError(
                f"/dev/shm has less than the {shared:,} bytes that FFCV's writer needs. Make it larger."
            )
    # The writer compiles nothing of its own, and merely importing FFCV spends most of its seconds in numba.
    environment = os.environ | {"TQDM_DISABLE": "1", "NUMBA_DISABLE_JIT": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(
            python("-W", "ignore", "-m", "pipeline.ffcv_writer", os.path.abspath(folder), "raw" if raw else "jpg"),
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            size, moved = -1, time.monotonic()
            while child.poll() is None:
                now = target.stat().st_size if target.exists() else -1
                progress(max(0, min(now, expected)))
                # Before there is a file, FFCV is being imported.
                limit = stall_seconds if size >= 0 else max(stall_seconds, IMPORT_SECONDS)
                if now != size:
                    size, moved = now, time.monotonic()
                elif time.monotonic() - moved > limit:
                    raise StalledError(f"FFCV's writer has not moved for {limit:.0f} s. {_disk(folder)}")
                time.sleep(POLL_SECONDS)
        finally:
            _kill(child)
        if child.returncode != 0 or not target.exists():
            said.seek(0)
            raise _failure(said.read(), child.returncode, folder)
    progress(expected)
    return target


def move_index(beton: Path, index: np.ndarray) -> np.ndarray:
    """(count,) INDEX that points at the shards -> the same pictures inside the FFCV file, as shard 0."""
    moved = index.copy()
    moved["shard"], moved["offset"] = 0, picture_offsets(beton, len(index))
    return moved


def _failure(said: str, code: int, folder: Path) -> ResourceError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].isidentifier() and "Error" in line.split(":")[0]]
    why = errors[0] if errors else (lines[-1] if lines else f"exit code {code}")
    if code < 0:
        why = f"it was killed by {signal.Signals(-code).name}"
    return ResourceError(f"FFCV's writer failed: {why[:300]}. {_disk(folder)}")


def _disk(folder: Path) -> str:
    facts = os.statvfs(folder)
    free = size_in_words(facts.f_bavail * facts.f_frsize)
    return f"Its disk has {free} free; a store of `daae convert --backends dali` has no FFCV file."


def _kill(child: subprocess.Popen) -> None:
    """End the child and its worker; its resource tracker stays, and frees the shared memory."""
    if child.poll() is not None:
        return
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_SECONDS)
        return
    import psutil

    for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
        with contextlib.suppress(psutil.Error):
            if not any("resource_tracker" in word for word in process.cmdline()):
                process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_SECONDS)


# ------------------------------------------------------------------------------------------------- the child process


class _Pictures:
    """What FFCV's writer asks for samples: ((bytes, height, width), label)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = np.load(folder / "index.npy")
        labels = np.load(folder / "labels.npy")
        self.labels = labels[:, 0] if labels.shape[1] else np.full(len(labels), -1)
        self.files = Handles()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[tuple[np.ndarray, int, int], int]:
        row = self.index[i]
        shard = self.folder / f"shard-{int(row['shard']):05d}.tar"
        data = self.files.read(shard, int(row["size"]), int(row["offset"]))
        return (np.frombuffer(data, dtype="<u1"), int(row["height"]), int(row["width"])), int(self.labels[i])


def page_bytes(index: np.ndarray) -> int:
    """FFCV's page size: a power of two, at least twice the largest picture.

    The file is a whole number of pages, so a small store gets small ones.
    """
    small = int(index["size"].sum()) < 256 * MIB
    floor = max(2 * MIB if small else 8 * MIB, 2 * int(index["size"].max()))
    return 1 << (floor - 1).bit_length()


def _write(folder: Path, mode: str) -> None:
    """mode: FFCV's name of what the bytes are, jpg or raw."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.writer import DatasetWriter

    def store_as_it_is(destination: np.ndarray, image: Any, malloc: Callable) -> None:
        data, destination["height"], destination["width"] = image
        destination["mode"] = IMAGE_MODES[mode]
        destination["data_ptr"], storage = malloc(data.nbytes)
        storage[:] = data

    # The type must stay RGBImageField: FFCV writes its number into the header, and picks the decoder by it.
    field = RGBImageField(write_mode=mode)
    field.encode = store_as_it_is
    pictures = _Pictures(folder)
    multiprocessing.set_start_method("fork", force=True)  # the field is handed over as it is, not pickled
    fields = {"image": field, "label": IntField()}
    # One worker: more would take pages in the order in which they happen to ask.
    writer = DatasetWriter(str(folder / BETON), fields, page_size=page_bytes(pictures.index), num_workers=1)
    parent = os.getppid()
    threading.Thread(target=_watch, args=(writer, parent), daemon=True).start()
    here = os.getpid()
    os.register_at_fork(after_in_child=lambda: threading.Thread(target=_follow, args=(here,), daemon=True).start())
    signal.signal(signal.SIGTERM, lambda *_: _give_up(writer, 128 + signal.SIGTERM))
    writer.from_indexed_dataset(pictures)


def _watch(writer: Any, parent: int) -> None:
    """End the process when FFCV's worker has died, which the writer itself never notices, or when nobody waits."""
    while True:
        time.sleep(POLL_SECONDS)
        # A look that does not reap: multiprocessing wants to collect its child itself.
        with contextlib.suppress(ChildProcessError):
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is not None and dead.si_status != 0:
                if dead.si_code != os.CLD_EXITED:  # else its own traceback says why
                    name = signal.Signals(dead.si_status).name
                    print(f"ChildProcessError: its worker was killed by {name}", file=sys.stderr, flush=True)
                _give_up(writer, 1)
        if os.getppid() != parent:
            _give_up(writer, 1)


def _follow(parent: int) -> None:
    """In FFCV's worker: end when the writer is gone. It holds both ends of its queue and would wait for ever."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _give_up(writer: Any, code: int) -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
    with contextlib.suppress(Exception):  # it may not have come so far as to ask for shared memory
        writer.metadata_sm.unlink()
    os._exit(code)


def _check(folder: Path) -> None:
    """Read the finished file's table back: every picture's place, size and bytes of a sample of them."""
    from ffcv.reader import Reader

    pictures = _Pictures(folder)
    reader = Reader(str(folder / BETON))
    table = reader.metadata["f0"]
    if len(table) != len(pictures):
        raise RuntimeError(f"FFCV's file has {len(table)} samples, not {len(pictures)}")
    pointers = table["data_ptr"].astype(np.int64)
    if (pointers + pictures.index["size"]).max() > (folder / BETON).stat().st_size:
        raise RuntimeError("FFCV's file ends before its last picture")
    with open(folder / BETON, "rb") as file:
        for i in np.unique(np.linspace(0, len(pictures) - 1, 64).astype(int)):
            (data, _, _), _ = pictures[i]
            file.seek(int(pointers[i]))
            if file.read(data.nbytes) != data.tobytes():
                raise RuntimeError(f"FFCV's file has other bytes for sample {i}")


def main(argv: list[str]) -> int:
    folder, mode = Path(argv[0]), argv[1]
    _write(folder, mode)
    _check(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
