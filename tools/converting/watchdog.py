"""Work that waits for a disk or a network, in a thread of its own: whoever waits for it can give up.

A call into a file system that hangs cannot be interrupted, not even by a signal; a thread inside it can be left behind.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from pipeline.errors import StalledError
from pipeline.names import printable
from tools.progress import LINE_SECONDS

T = TypeVar("T")
WRITING = "writing the store"
END_SECONDS = 10.0  # for a write that somebody interrupts to come back, and for cleaning up where one does not


class _Abandoned(Exception):
    """Ends a thread that nobody waits for any more."""


class Watchdog:
    """`watchdog.do("listing", work)`: `work` calls `watchdog.tell` before whatever it may have to wait for.

    Where the work writes, `with` goes around all that cleans up after it.
    """

    def __init__(self, stall_seconds: float, *, quiet: bool, flag: str = "--stall-timeout") -> None:
        """flag: of the command, which sets stall_seconds; empty where none does."""
        self.stall_seconds, self.quiet = stall_seconds, quiet
        self._advice = f", or allow more with {flag}" if flag else ""
        self.hung = False  # a write has not come back: to close or remove what it is about would wait for it as well
        self._place, self._images, self._moved = "", 0, 0.0
        self._over = False
        self._end: threading.Timer | None = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._end is not None:
            self._end.cancel()

    def tell(self, place: bytes | str, images: int) -> None:
        """Where the work stands, and how many pictures it has found so far (pipeline.sources.entries.Tell)."""
        if self._over:
            raise _Abandoned
        self._place, self._images, self._moved = place, images, time.monotonic()

    def do(self, stage: str, work: Callable[[], T], *, writes: bool = False) -> T:
        """What `work` returns or raises. Raises StalledError where it has told nothing for `stall_seconds`.

        Says every LINE_SECONDS how far it is, or that it stands still and where. It costs a thread, a tenth of a
        millisecond on an idle machine and a few on a busy one, so it is not for every picture.
        writes: what is left may not be closed or removed before the work has come back. Where it does not, `hung` is
        set, and END_SECONDS later the process ends, whatever it waits for then.
        """
        done: Future[T] = Future()
        thread = threading.Thread(target=_settle, args=(done, work), name=stage, daemon=True)
        self._moved = time.monotonic()
        next_line = self._moved + LINE_SECONDS
        try:
            thread.start()
            while not wait([done], min(1.0, self.stall_seconds / 4)).done:
                now = time.monotonic()
                still = now - self._moved
                if still > self.stall_seconds:
                    raise StalledError(
                        f"nothing has moved for {self.stall_seconds:.0f} s while {stage}, at {self._shown()}. Look at "
                        f"the disk or network that holds it{self._advice}."
                    )
                if now > next_line and not self.quiet:
                    next_line = now + LINE_SECONDS
                    self._say(stage, still)
        except BaseException as error:
            self._over, self.hung = True, writes
            stalled = isinstance(error, StalledError)
            with contextlib.suppress(TimeoutError):
                done.exception(END_SECONDS if writes and not stalled else 1.0)
            self.hung = writes and not done.done()
            if self.hung:
                self._end_soon(str(error) if stalled else f"stopped while {stage}, which hangs at {self._shown()}.")
            raise
        return done.result()

    def _end_soon(self, sentence: str) -> None:
        def end() -> None:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            os._exit(StalledError.code)

        self._end = threading.Timer(END_SECONDS, end)
        self._end.daemon = True
        self._end.start()

    def _say(self, stage: str, still: float) -> None:
        if still > LINE_SECONDS:
            told = (
                f"nothing has moved for {still:.0f} s, at {self._shown()}; giving up after {self.stall_seconds:.0f} s"
            )
        elif self._images:
            told = f"{self._images:,} images so far"
        else:
            return
        print(f"{stage}: {told}", file=sys.stderr, flush=True)

    def _shown(self) -> str:
        return self._place if isinstance(self._place, str) else printable(self._place)


def _settle(done: Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # whatever it is, the one that waits must hear of it
        done.set_exception(error)
