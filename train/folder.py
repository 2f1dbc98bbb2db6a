"""The run folder: who may write in it, what it belongs to, and where a stopped run goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from pipeline.errors import DataError, ResourceError, UsageError
from train.checkpoint import Checkpoint, newest, verify, write_atomically
from train.command import read_yaml
from train.config import Run, as_values, differences

CONFIG = "config.yaml"


@contextlib.contextmanager
def claimed(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Make `out` and hold its lock: two runs in one folder would destroy each other.

    The lock is the kernel's (flock), so it ends with the process however that ends.
    Raises UsageError: in use, or holds something that is no run; ResourceError: cannot be written.
    """
    lock = out / ".lock"
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file, not a folder.")
        foreign = out.is_dir() and any(out.iterdir()) and not (out / CONFIG).exists() and not lock.exists()
        if foreign and not overwrite:
            raise UsageError(f"--out {out} holds files that are no run. Choose another folder, or --overwrite.")
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
            for path in out.iterdir():
                if path != lock:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield out
    finally:
        os.close(handle)


def checkpoints(out: Path) -> Path:
    return out / "checkpoints"


def saved_settings(out: Path) -> dict | None:
    """The resolved settings of the run in this folder, or None if there is none yet."""
    return read_yaml(out / CONFIG) if (out / CONFIG).exists() else None


def check_same_run(out: Path, asked: Run, allow_resume: bool) -> None:
    """Raises UsageError, naming each difference, where `out` holds a run with other settings."""
    saved = saved_settings(out)
    if saved is None:
        return
    if not allow_resume:
        raise UsageError(
            f"--out {out} holds a run already. Choose another folder, leave out --no-resume, or --overwrite."
        )
    different = differences(saved, as_values(asked))
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise UsageError(
            f"--out {out} belongs to another configuration ({'; '.join(different[:4])}{more}). "
            "Choose another folder, or --overwrite."
        )


def write_settings(out: Path, run: Run) -> None:
    write_atomically(out / CONFIG, yaml.safe_dump(as_values(run), sort_keys=False))


def resume_point(out: Path, path: str | None, fingerprint: str, images: int, warn) -> Checkpoint | None:
    """The checkpoint to go on from: the named one, or the newest that verifies.

    Raises DataError: the named one is damaged, all are damaged, or the data set is not the one of the checkpoint.
    """
    found = verify(Path(path)) if path else newest(checkpoints(out), warn)
    if found is None:
        return None
    state = found.state
    if state["data"] != fingerprint:
        raise DataError(
            f"the data set changed since step {state['step']:,} ({state['images_in_store']:,} -> {images:,} images; "
            f"fingerprint {state['data']} -> {fingerprint}). Use the old one, or another --out."
        )
    return found


def read_json(path: Path) -> dict:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}
