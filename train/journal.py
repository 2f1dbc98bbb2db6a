"""What a run tells: metrics.jsonl for programs, status.json for job scripts, one line or bar for a person."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from pipeline.errors import Preempted, ResourceError
from pipeline.limits import affinity
from pipeline.staging import write_whole
from train.allocator import SETTINGS
from train.command import exit_code
from train.json_files import read_rows

LINE_SECONDS = 30.0  # between plain lines where there is no terminal


class Journal:
    """One run's records. They are append-only; `rewind` drops rows newer than the last checkpoint."""

    def __init__(self, out: Path, *, quiet: bool = False, rank: int = 0):
        """rank: above 0 nothing is told, but what goes wrong there is kept in logs/."""
        self.out, self.quiet, self.mute = out, quiet or rank > 0, rank > 0
        self.log = out / "train.log" if rank == 0 else out / "logs" / f"rank{rank:03d}.log"
        self._terminal = sys.stderr.isatty() and not self.quiet
        self._progress = self._task = None
        self._last_line = -LINE_SECONDS
        self._status: dict = {}

    def rewind(self, step: int) -> None:
        """Drop rows beyond `step` and a last line torn by a crash: steps stay unique and monotone."""
        if self.mute:
            return
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            path = self.out / name
            rows = [row for row in read_rows(path) if row["step"] <= step]
            if path.exists():
                write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    def row(self, name: str, values: dict) -> None:
        """Append one JSON object to `name`.jsonl."""
        if self.mute:
            return
        try:
            with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise ResourceError(f"{self.out}/{name}.jsonl cannot be written: {error.strerror}.") from None

    def status(self, **values) -> None:
        """Rewrite status.json: what a job script decides by, since torchrun hides exit codes."""
        if self.mute:
            return
        self._status.update(values)
        stamp = {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}
        with contextlib.suppress(ResourceError):  # a full disk ends the run where a checkpoint needs it, not here
            write_whole(self.out / "status.json", json.dumps({**self._status, **stamp}, indent=1))

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """What ends the run inside is told in status.json, and where it is unexpected kept with its traceback."""
        try:
            yield
        except Preempted as error:
            self.status(state="preempted", code=error.code, reason=str(error))
            raise
        except BaseException as error:
            code = exit_code(error)
            self.status(state="failed", code=code, reason=f"{type(error).__name__}: {error}")
            # What looks like another rank's fault may be a mistake of our own: its traceback is the cause.
            if code == 1 or error.__cause__ is not None:
                self.keep(traceback.format_exc())
            raise
        finally:
            self.close()

    def keep(self, text: str) -> None:
        """A line in the log alone."""
        with contextlib.suppress(OSError):
            self.log.parent.mkdir(exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def say(self, sentence: str) -> None:
        """A line for a person, on stderr and in train.log."""
        if self.mute:
            return
        self.keep(sentence)
        if self.quiet:
            return
        if self._progress is not None:
            self._progress.console.print(sentence, highlight=False)
        else:
            print(sentence, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, line: str) -> None:
        """A bar on a terminal; elsewhere a plain line every half minute."""
        if self.mute:
            return
        if self._terminal:
            if self._progress is None:
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn

                bar = (BarColumn(bar_width=24), TextColumn("{task.description}"))
                self._progress = Progress(*bar, console=Console(stderr=True), transient=True)
                self._progress.start()
                self._task = self._progress.add_task("", total=total)
            assert self._task is not None
            self._progress.update(self._task, completed=done, description=line)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(line)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def duration(seconds: float) -> str:
    """90061 -> "1 d 1 h", 125 -> "2 min 5 s"."""
    seconds = max(0, round(seconds))
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    words = []
    for size, name in units:
        if seconds >= size and len(words) < 2:
            words.append(f"{seconds // size} {name}")
            seconds %= size
    return " ".join(words) or "0 s"


def environment(device_name: str) -> dict:
    """What proves where a result comes from: versions, code, machine, command."""
    versions = {}
    for name in ("torch", "numpy", "timm", "ffcv", "nvidia-dali-cuda130", "safetensors", "transformers", "lightly"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(), "versions": versions, "code": code_revision(), "device": device_name,
        "cores": affinity(), "host": socket.gethostname(), "system": platform.platform(),
        "malloc": os.environ.get(SETTINGS, ""), "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def earlier_environments(path: Path, now: dict) -> list[dict]:
    """The code, machine and torch of earlier parts of a run, where they are others than now: its env.json before this
    start. A run that moved is told by it."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    told = ("code", "device", "cores", "versions")
    parts = [*last.get("before", []), {name: last.get(name) for name in told}]
    return [part for part in parts if any(part[name] != now[name] for name in told)]


def code_revision() -> str:
    """The commit, with "+changes" where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        if commit.returncode == 0:
            dirty = subprocess.run(
                [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10
            )
            return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
    return "unknown"
