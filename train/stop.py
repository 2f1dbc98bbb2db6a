"""Signals that ask a run to end: it finishes the step, saves, and says how to go on."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


class CutShort(Exception):
    """A signal came during work that need not be finished."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def caught(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and the signals by which schedulers and terminals end a process go to `handler`."""
    # Who ignores SIGHUP (nohup) wants the work to go on.
    heard = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stop:
    """SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C ask the loop to save and end; a second one ends it at once."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.asked, self.name, self.quiet = False, "", quiet
        self._handlers, self._at_once = contextlib.ExitStack(), False

    def __enter__(self) -> Stop:
        self._handlers.enter_context(caught(self._ask))
        return self

    def _ask(self, number: int, _frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.name = True, signal.Signals(number).name
        if not self.quiet:
            say = f"{self.name}: finishing this step, then saving. Once more to stop without."
            print(say, file=sys.stderr, flush=True)
        if self._at_once:
            raise CutShort

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises CutShort where it strikes: for work that may be lost, between two steps. One that
        came before raises it at once."""
        if self.asked:
            raise CutShort
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __exit__(self, *_) -> None:
        self._handlers.close()
