"""A function over many tasks in worker processes: results in order, memory bounded, and an end in every case.

`concurrent.futures` is not used because a pool of it can neither say which task killed a worker nor give up a worker
that hangs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Protocol, TypeVar

from pipeline.errors import StalledError

T = TypeVar("T")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)

# Enough to keep a worker busy while the parent writes; few enough that the tasks fit into the pipe's buffer.
QUEUED = 2
STARTING = -1
DEATHS_IN_A_ROW = 5  # items that each killed two processes with none between that did not: it is not the items
START_SECONDS = 120.0  # a fresh process imports first, on a busy machine or a cold disk for long
END_SECONDS = 5.0  # that killed processes are waited for, all of them together


class Tasks(Protocol[T_co]):
    """A list of lists, or what makes each of them when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Sequence[T_co]: ...


class _Worker:
    def __init__(self, context: Any, function: Callable, common: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.item: Synchronized = context.Value("q", STARTING, lock=False)  # place in its task
        self.process = context.Process(target=_work, args=(theirs, function, common, self.item), daemon=True)
        self.process.start()
        theirs.close()
        # Handed over and unanswered, oldest first: the task's place, and its items by their places in it.
        self.tasks: list[tuple[int, dict[int, Any]]] = []

    def send(self, place: int, items: dict[int, Any]) -> None:
        """Raises OSError where the process has died."""
        self.tasks.append((place, items))
        self.pipe.send((place, list(items.values())))

    def at(self) -> tuple[int, int, Any]:
        """Where it is: a task's place, an item's place in that task, and the item."""
        place, items = self.tasks[0]
        within = list(items)[max(0, min(self.item.value, len(items) - 1))]
        return place, within, items[within]

    def end(self, seconds: float = END_SECONDS) -> None:
        """One that hangs in the kernel does not die of a kill: it is left behind after so many seconds."""
        self.process.kill()
        self.process.join(max(0.0, seconds))
        if self.process.exitcode is None:
            # At its own end this process would wait for it, without a limit.
            vars(multiprocessing.process)["_children"].discard(self.process)
        self.pipe.close()


def ordered_map(
    function: Callable[[T, Any], R],
    tasks: Tasks[T],
    common: Any,
    *,
    workers: int,
    stall_seconds: float,
    describe: Callable[[T], str],
    lost: Callable[[T, str], R] | None = None,
) -> Generator[list[R]]:
    """Yield `[function(item, common) for item in task]` for each task, in order, computed by `workers` processes.

    At most 4 tasks per worker are under way or waiting to be yielded: that bounds the memory, whatever the number of
    tasks. function: at module level, importable by a fresh process (workers are spawned, so that no thread or lock of
    the caller is copied). describe: an item in words, for messages.
    lost: what to answer for an item at which a process died, and a second one that tried it again; it is given the
    item and how they died ("was killed by SIGSEGV"), and the work goes on.
    Raises StalledError (exit code 6) naming the item at which a worker died, where `lost` is not given or
    DEATHS_IN_A_ROW items are lost, or at which nothing moved for `stall_seconds`. Workers end with the generator, and
    also if this process is killed.
    """
    context = multiprocessing.get_context("spawn")
    team = [_Worker(context, function, common) for _ in range(max(1, min(workers, len(tasks))))]
    answers: dict[int, list[R]] = {}
    given = yielded = 0
    moved, limit = time.monotonic(), START_SECONDS
    suspects: set[tuple[int, int]] = set()  # items at which one process has died
    verdicts: dict[int, dict[int, R]] = {}  # task -> items at which a second one has
    in_a_row = 0

    def replace(dead: _Worker) -> None:
        """A fresh process for one that died, with its tasks, less an item that has killed two."""
        nonlocal moved, in_a_row
        how = _how_it_ended(dead)
        place, within, item = dead.at()
        if lost is None or dead.item.value == STARTING:
            raise StalledError(f"a worker process {how} while reading {describe(item)}.")
        dead.end()
        if (place, within) not in suspects:
            suspects.add((place, within))
        else:
            in_a_row += 1
            if in_a_row >= DEATHS_IN_A_ROW:
                raise StalledError(f"worker processes died over {in_a_row} items in a row; one {how} while reading "
                                   f"{describe(item)}.")  # fmt: skip
            verdicts.setdefault(place, {})[within] = lost(item, how.removesuffix(MAYBE_MEMORY))
            del dead.tasks[0][1][within]
        fresh = team[team.index(dead)] = _Worker(context, function, common)
        for task in dead.tasks:
            give(fresh, *task)
        moved = time.monotonic()

    def give(worker: _Worker, place: int, items: dict[int, T]) -> None:
        if items:
            try:
                worker.send(place, items)
            except OSError:
                replace(worker)
        else:
            answers[place] = settled(place, [])

    def settled(place: int, results: list[R]) -> list[R]:
        """A task's results with the verdicts between them."""
        for within, verdict in sorted(verdicts.pop(place, {}).items()):
            results.insert(within, verdict)
        return results

    try:
        while yielded < len(tasks):
            for number in sorted(range(len(team)), key=lambda number: len(team[number].tasks)):
                while len(team[number].tasks) < QUEUED and given < min(len(tasks), yielded + 4 * len(team)):
                    given += 1
                    give(team[number], given - 1, dict(enumerate(tasks[given - 1])))
            busy = [worker for worker in team if worker.tasks]
            ready = wait([worker.pipe for worker in busy], timeout=min(1.0, stall_seconds))
            for worker in busy:
                if worker.pipe in ready:
                    try:
                        place, results, error = worker.pipe.recv()
                    except (EOFError, OSError):
                        replace(worker)
                        continue
                    worker.tasks.pop(0)
                    if error is not None:
                        raise error
                    in_a_row = 0 if results else in_a_row
                    answers[place] = settled(place, results)
                    moved = time.monotonic()
            if any(worker.item.value == STARTING for worker in team if worker.tasks):
                limit = max(stall_seconds, START_SECONDS)
            elif limit != stall_seconds:
                limit, moved = stall_seconds, time.monotonic()
            if not ready and time.monotonic() - moved > limit:
                stuck = ", ".join(describe(worker.at()[2]) for worker in team if worker.tasks)
                raise StalledError(f"nothing has moved for {limit:.0f} s while reading {stuck}.")
            while yielded in answers:
                yield answers.pop(yielded)
                yielded += 1
                moved = time.monotonic()  # the caller's own time does not count
    finally:
        for worker in team:
            worker.process.kill()
        ends = time.monotonic() + END_SECONDS
        for worker in team:
            worker.end(ends - time.monotonic())


MAYBE_MEMORY = " (out of memory?)"


def _how_it_ended(worker: _Worker) -> str:
    worker.process.join(5)
    code = worker.process.exitcode
    if code is None or code >= 0:
        return f"ended with code {code}"
    return f"was killed by {signal.Signals(-code).name}" + (MAYBE_MEMORY if -code == signal.SIGKILL else "")


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
