"""Commands of ours that run as processes, one after another, and how a signal reaches them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import DaaeError, Preempted
from pipeline.interpreter import python
from train.command import PARENT
from train.json_files import read_object
from train.stop import caught

SAVE_SECONDS = 120.0  # that a run has for its checkpoint after a signal; then it is killed


def start(words: Sequence[str], what: str, stop: PassOn, stdout: int | None) -> int:
    """Run a command of ours as a process, which ends when this one does. Returns its exit code; raises Preempted.

    stdout: where its result goes; None: where ours does.
    """
    stop.check(what)
    # Its own process group, so that Ctrl-C reaches it once, and through us.
    child = subprocess.Popen(
        python("-m", *words), stdin=subprocess.DEVNULL, stdout=stdout, process_group=0,
        env={**os.environ, PARENT: str(os.getpid())},
    )  # fmt: skip
    code = stop.watch(child)
    stop.check(what)
    return code


def call(words: Sequence[str], what: str, folder: Path, stop: PassOn, stdout: int | None = None) -> None:
    """Run a command on a folder of its own. Raises what it died of, with its exit code.

    stdout: where its result goes; by default to our progress on stderr.
    """
    code = start(words, what, stop, sys.stderr.fileno() if stdout is None else stdout)
    if code == 0:
        return
    if code == Preempted.code or code == -signal.SIGTERM:
        raise Preempted(f"{what} was stopped. Run the same command again to go on.")
    if code < 0:
        name = signal.Signals(-code).name
        raise failure(6, f"{what} was killed by {name} (out of memory?). Run the same command again to go on.")
    status = read_object(folder / "status.json")
    told = status.get("state") == "failed" and status.get("code") == code  # of this end, and no earlier one
    reason = f" ({status['reason']})" if told and status.get("reason") else ""
    raise failure(
        code, f"{what} failed with exit code {code}{reason}; it says more above. Finished runs are kept: "
        "mend it and run the same command again."
    )  # fmt: skip


def failure(code: int, sentence: str) -> DaaeError:
    error = DaaeError(sentence)
    error.code = code
    return error


class PassOn:
    """Signals that end a chain of commands: they are passed to the one under way, which saves and ends."""

    def __init__(self, patience: float = SAVE_SECONDS) -> None:
        self.name, self._patience = "", patience
        self._child: subprocess.Popen | None = None
        self._since = 0.0
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> PassOn:
        self._handlers.enter_context(caught(self._ask))
        return self

    def _ask(self, number: int, _frame) -> None:
        self.name = self.name or signal.Signals(number).name
        self._since = self._since or time.monotonic()
        self._pass_on()

    def _pass_on(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def watch(self, child: subprocess.Popen) -> int:
        """Wait for the child; after a signal not longer than it needs for a checkpoint. Returns its exit code."""
        self._child = child
        if self.name:  # between the start and here
            self._pass_on()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=0.5)
                if self._since and time.monotonic() - self._since > self._patience:
                    os.killpg(child.pid, signal.SIGKILL)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            self._child = None

    def check(self, what: str) -> None:
        """Raises Preempted once a signal has come."""
        if self.name:
            raise Preempted(f"{what} was stopped by {self.name}; what is done is kept. Run the same command again.")

    def __exit__(self, *_) -> None:
        self._handlers.close()
