"""A function over many tasks in worker processes: results in order, memory bounded, and an end in every case.

`concurrent.futures` is not used because a pool of it can neither say which task killed a worker nor give up a worker
that hangs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from pipeline.errors import StalledError

T = TypeVar("T")
R = TypeVar("R")

# Enough to keep a worker busy while the parent writes; few enough that the tasks fit into the pipe's buffer.
QUEUED = 2
STARTING = -1
START_SECONDS = 120.0  # a fresh process imports first, on a busy machine or a cold disk for long


class _Worker:
    def __init__(self, context: Any, function: Callable, common: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.item: Synchronized = context.Value("q", STARTING, lock=False)  # place in its task
        self.process = context.Process(target=_work, args=(theirs, function, common, self.item), daemon=True)
        self.process.start()
        theirs.close()
        self.tasks: list[tuple[int, Sequence]] = []  # handed over and unanswered, oldest first


def ordered_map(
    function: Callable[[T, Any], R],
    tasks: Sequence[Sequence[T]],
    common: Any,
    *,
    workers: int,
    stall_seconds: float,
    describe: Callable[[T], str],
) -> Generator[list[R]]:
    """Yield `[function(item, common) for item in task]` for each task, in order, computed by `workers` processes.

    At most 4 tasks per worker are under way or waiting to be yielded: that bounds the memory, whatever the number of
    tasks. function: at module level, importable by a fresh process (workers are spawned, so that no thread or lock of
    the caller is copied). describe: an item in words, for messages.
    Raises StalledError (exit code 6) naming the item at which a worker died, or at which nothing moved for
    `stall_seconds`. Workers end with the generator, and also if this process is killed.
    """
    context = multiprocessing.get_context("spawn")
    team = [_Worker(context, function, common) for _ in range(max(1, min(workers, len(tasks))))]
    answers: dict[int, list[R]] = {}
    given = yielded = 0
    moved, limit = time.monotonic(), START_SECONDS
    try:
        while yielded < len(tasks):
            for worker in sorted(team, key=lambda one: len(one.tasks)):
                while len(worker.tasks) < QUEUED and given < min(len(tasks), yielded + 4 * len(team)):
                    _send(worker, (given, tasks[given]), describe)
                    given += 1
            busy = [worker for worker in team if worker.tasks]
            ready = wait([worker.pipe for worker in busy], timeout=min(1.0, stall_seconds))
            for worker in busy:
                if worker.pipe in ready:
                    place, result, error = _receive(worker, describe)
                    worker.tasks.pop(0)
                    if error is not None:
                        raise error
                    answers[place] = result
                    moved = time.monotonic()
            if any(worker.item.value == STARTING for worker in busy):
                limit = max(stall_seconds, START_SECONDS)
            elif limit != stall_seconds:
                limit, moved = stall_seconds, time.monotonic()
            if not ready and time.monotonic() - moved > limit:
                stuck = ", ".join(_at(worker, describe) for worker in busy)
                raise StalledError(f"nothing has moved for {limit:.0f} s while reading {stuck}.")
            while yielded in answers:
                yield answers.pop(yielded)
                yielded += 1
                moved = time.monotonic()  # the caller's own time does not count
    finally:
        for worker in team:
            worker.process.kill()
        for worker in team:
            worker.process.join()
            worker.pipe.close()


def _send(worker: _Worker, task: tuple[int, Sequence], describe: Callable) -> None:
    worker.tasks.append(task)
    try:
        worker.pipe.send(task)
    except OSError:
        raise _died(worker, describe) from None


def _receive(worker: _Worker, describe: Callable) -> tuple:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        raise _died(worker, describe) from None


def _died(worker: _Worker, describe: Callable) -> StalledError:
    worker.process.join(5)
    code = worker.process.exitcode
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        how += " (out of memory?)" if -code == signal.SIGKILL else ""
    else:
        how = f"ended with code {code}"
    return StalledError(f"a worker process {how} while reading {_at(worker, describe)}.")


def _at(worker: _Worker, describe: Callable) -> str:
    items = worker.tasks[0][1]
    return describe(items[max(0, min(worker.item.value, len(items) - 1))])


def _work(pipe: Connection, function: Callable, common: Any, item: Synchronized) -> None:
    # Ctrl-C reaches the whole foreground group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # C libraries comment on damaged files here; what matters comes back as a result or an error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_follow_parent, daemon=True).start()
    item.value = 0
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            place, items = pipe.recv()
            results, error = [], None
            try:
                for item.value, one in enumerate(items):
                    results.append(function(one, common))
            except Exception as failure:  # crosses the pipe; raised again by the parent
                error = failure
            pipe.send((place, results, error))


def _follow_parent() -> None:
    """A parent killed with SIGKILL cannot stop its workers: they watch it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
