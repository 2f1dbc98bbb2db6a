"""Commands of ours that run as processes, one after another, and how a signal reaches them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import DaaeError, Preempted
from pipeline.interpreter import python
from train.command import PARENT
from train.json_files import read_object

SAVE_SECONDS = 120.0  # that a run has for its checkpoint after a signal; then it is killed


def call(words: list[str], what: str, folder: Path, stop: Stop, stdout: int | None = None) -> None:
    """Run a command of ours as a process. Raises what it died of, with its exit code.

    stdout: where its result goes; by default to our progress on stderr.
    """
    stop.check(what)
    # Its own process group, so that Ctrl-C reaches it once, and through us.
    to = sys.stderr.fileno() if stdout is None else stdout
    environment = {**os.environ, PARENT: str(os.getpid())}
    child = subprocess.Popen(
        python("-m", *words), stdin=subprocess.DEVNULL, stdout=to, process_group=0, env=environment
    )
    code = stop.watch(child)
    stop.check(what)
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


class Stop:
    """Signals that end a comparison: they are passed to the run under way, which saves and ends."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, patience: float = SAVE_SECONDS) -> None:
        self.name, self._patience = "", patience
        self._child: subprocess.Popen | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # Who ignores SIGHUP (nohup) wants the work to go on.
        caught = [each for each in self.SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in caught}
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
        for number, handler in self._before.items():
            signal.signal(number, handler)
