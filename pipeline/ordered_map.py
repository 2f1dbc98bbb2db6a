"""A function over many tasks in worker processes: results in order, memory bounded, and an end in every case.

`concurrent.futures` is not used because a pool of it can neither say which task killed a worker nor give up a worker
that hangs.
"""

from __future__ import annotations

import contextlib
import functools
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
DEATHS_IN_A_ROW = 5  # items in a row that each killed two processes: then the items are not to blame
START_SECONDS = 120.0  # a fresh process imports first, on a busy machine or a cold disk for long
MAYBE_MEMORY = " (out of memory?)"  # after what a process was killed by
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
    team = _Team(function, tasks, common, workers, stall_seconds, describe, lost)
    try:
        for place in range(len(tasks)):
            while place not in team.answers:
                team.hand_out(place + 4 * len(team.workers))
                team.collect()
            yield team.answers.pop(place)
            team.moved = time.monotonic()  # the caller's own time does not count
    finally:
        team.end()


class _Team:
    """The workers of one ordered_map, the tasks handed over to them, and the answers that wait for their turn."""

    def __init__(
        self,
        function: Callable,
        tasks: Tasks,
        common: Any,
        workers: int,
        stall_seconds: float,
        describe: Callable[[Any], str],
        lost: Callable[[Any, str], Any] | None,
    ) -> None:
        self.tasks, self.stall_seconds, self.describe, self.lost = tasks, stall_seconds, describe, lost
        self.start = functools.partial(_Worker, multiprocessing.get_context("spawn"), function, common)
        self.workers = [self.start() for _ in range(max(1, min(workers, len(tasks))))]
        self.answers: dict[int, list] = {}
        self.given = 0
        self.places: list[tuple[int, int]] = []  # where each worker was when last looked at: a task, an item of it
        self.moved, self.limit = time.monotonic(), START_SECONDS
        self.suspects: set[tuple[int, int]] = set()  # items at which one process has died
        self.verdicts: dict[int, dict[int, Any]] = {}  # task -> items at which a second one has
        self.in_a_row = 0

    def hand_out(self, end: int) -> None:
        """Give every worker QUEUED tasks, the idlest first, of those before `end`."""
        for number in sorted(range(len(self.workers)), key=lambda number: len(self.workers[number].tasks)):
            while len(self.workers[number].tasks) < QUEUED and self.given < min(len(self.tasks), end):
                self.given += 1
                self._give(self.workers[number], self.given - 1, dict(enumerate(self.tasks[self.given - 1])))

    def collect(self) -> None:
        """Wait for answers, a second at most. Raises what a worker raised, and StalledError as ordered_map does."""
        busy = [worker for worker in self.workers if worker.tasks]
        ready = wait([worker.pipe for worker in busy], timeout=min(1.0, self.stall_seconds))
        for worker in busy:
            if worker.pipe in ready:
                try:
                    place, results, error = worker.pipe.recv()
                except (EOFError, OSError):
                    self._replace(worker)
                    continue
                worker.tasks.pop(0)
                if error is not None:
                    raise error
                self.in_a_row = 0 if results else self.in_a_row
                self.answers[place] = self._settled(place, results)
        # A task is answered as a whole, and each of its items may take long.
        places = [(worker.tasks[0][0], worker.item.value) for worker in self.workers if worker.tasks]
        if places != self.places:
            self.places, self.moved = places, time.monotonic()
        if any(worker.item.value == STARTING for worker in self.workers if worker.tasks):
            self.limit = max(self.stall_seconds, START_SECONDS)
        elif self.limit != self.stall_seconds:
            self.limit, self.moved = self.stall_seconds, time.monotonic()
        if not ready and time.monotonic() - self.moved > self.limit:
            stuck = ", ".join(self.describe(worker.at()[2]) for worker in self.workers if worker.tasks)
            raise StalledError(f"nothing has moved for {self.limit:.0f} s while reading {stuck}.")

    def end(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        ends = time.monotonic() + END_SECONDS
        for worker in self.workers:
            worker.end(ends - time.monotonic())

    def _give(self, worker: _Worker, place: int, items: dict[int, Any]) -> None:
        if items:
            try:
                worker.send(place, items)
            except OSError:
                self._replace(worker)
        else:
            self.answers[place] = self._settled(place, [])

    def _replace(self, dead: _Worker) -> None:
        """A fresh process for one that died, with its tasks, less an item that has killed two."""
        how = _how_it_ended(dead)
        place, within, item = dead.at()
        if self.lost is None or dead.item.value == STARTING:
            raise StalledError(f"a worker process {how} while reading {self.describe(item)}.")
        dead.end()
        if (place, within) not in self.suspects:
            self.suspects.add((place, within))
        else:
            self.in_a_row += 1
            if self.in_a_row >= DEATHS_IN_A_ROW:
                raise StalledError(
                    f"worker processes died over {self.in_a_row} items in a row; one {how} while reading "
                    f"{self.describe(item)}."
                )
            self.verdicts.setdefault(place, {})[within] = self.lost(item, how.removesuffix(MAYBE_MEMORY))
            del dead.tasks[0][1][within]
        fresh = self.workers[self.workers.index(dead)] = self.start()
        for task in dead.tasks:
            self._give(fresh, *task)
        self.moved = time.monotonic()

    def _settled(self, place: int, results: list) -> list:
        """A task's results with the verdicts between them."""
        for within, verdict in sorted(self.verdicts.pop(place, {}).items()):
            results.insert(within, verdict)
        return results


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
