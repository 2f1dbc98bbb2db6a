"""Contenders that are timed against one another, each in a process of its own, set up as its documentation does it.

Rounds are interleaved: one works while the others wait, so that whatever disturbs the machine disturbs all of them.
Batches that a contender has made in advance are not part of its round, and it makes none on another one's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ResourceError, StalledError
from pipeline.interpreter import python

if TYPE_CHECKING:
    import psutil

ROUNDS = 5
READY_SECONDS = 300.0  # of patience, beside what a round takes by itself
DRAIN_SECONDS = 0.5  # of a round, not counted: full queues are emptied, and from then on what is taken is made
SETTLED_SECONDS = 0.25  # of rest, after which a contender's queues are full
SETTLED_CORES = 0.05  # that rest uses at most: a clock tick of one worker
SETTLE_LIMIT_SECONDS = 20.0  # then the next one begins beside whatever never rests

# --- a peer's own process ---


def serve(open_peer: Callable[[], Iterator[int]]) -> None:
    """For each number of seconds that comes in, work for so long and answer with what that took.

    open_peer: makes what yields the number of images of one batch after another.
    """
    tell, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    batches = open_peer()
    for _ in range(3):  # compiles, starts workers, fills queues
        next(batches)
    told: dict[str, Any] = {"ready": True}
    while True:
        settle()
        print(json.dumps(told), file=tell, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        take(batches, DRAIN_SECONDS)
        told = take(batches, float(line))
    os._exit(0)  # none of the libraries ends its threads in time by itself


def take(batches: Iterator[int], limit: float) -> dict[str, float]:
    """Batches for so many seconds, and at least one; what was taken, and what that took."""
    images, cpu, start = 0, cpu_seconds(workers()), time.perf_counter()
    while True:
        images += next(batches)
        seconds = time.perf_counter() - start
        if seconds >= limit:
            return {"images": images, "seconds": seconds, "cpu_seconds": cpu_seconds(workers()) - cpu}


def settle() -> None:
    """Wait until queues are full and nothing is made any more."""
    there, end = workers(), time.perf_counter() + SETTLE_LIMIT_SECONDS
    while time.perf_counter() < end:
        before = cpu_seconds(there)
        time.sleep(SETTLED_SECONDS)
        if cpu_seconds(there) - before <= SETTLED_CORES * SETTLED_SECONDS:
            return


def workers() -> list[psutil.Process]:
    """The processes that this one has started. Looking for them takes milliseconds of its own."""
    import psutil

    return psutil.Process().children(recursive=True)


def cpu_seconds(workers: list[psutil.Process]) -> float:
    """User and system seconds of this process, exactly, and of its workers, in ticks of a hundredth."""
    import psutil

    total = time.process_time()
    for process in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


# --- the process that times them ---


@dataclass
class Peer:
    name: str
    process: subprocess.Popen
    said: Any  # a file with what it printed to stderr

    def ask(self, what: str | None, patience: float) -> dict:
        """Send a line, wait for the answer. Raises ResourceError: the process died; StalledError: it hangs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            if what is not None:
                self.process.stdin.write(what + "\n")
                self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(patience):
                raise StalledError(f"{self.name} did not answer for {patience:.0f} s.")
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            lines = [each for each in self.said.read().splitlines() if each.strip()]
            why = lines[-1].removeprefix("error: ").rstrip(".") if lines else "no reason"
            raise ResourceError(f"{self.name} failed: {why}.")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()


def start(name: str, words: list[str]) -> Peer:
    """`python -m WORDS`, which ends in `serve`."""
    said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in Peer.close)
    process = subprocess.Popen(
        python("-m", *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
    )
    return Peer(name, process, said)


def measure(commands: dict[str, list[str]], seconds: float, say: Callable[[str], None]) -> dict[str, dict]:
    """Rates of each command over rounds in which one works after the other. seconds: of each, in all rounds."""
    with contextlib.ExitStack() as opened:
        peers = {}
        for name, words in commands.items():
            say(f"{name} starts")
            peers[name] = start(name, words)
            opened.callback(peers[name].close)
            peers[name].ask(None, READY_SECONDS)
        rounds: dict[str, list[dict]] = {name: [] for name in commands}
        for turn in range(ROUNDS):
            say(f"round {turn + 1} of {ROUNDS}")
            for name, peer in peers.items():
                rounds[name].append(peer.ask(f"{seconds / ROUNDS}", READY_SECONDS + seconds / ROUNDS))
    return {name: rates(each) for name, each in rounds.items()}


def rates(rounds: list[dict]) -> dict:
    """Medians and extremes over the rounds, and the figures of each round for `ratio`."""
    per_cpu = [each["images"] / each["cpu_seconds"] for each in rounds]
    per_second = [each["images"] / each["seconds"] for each in rounds]
    return {
        "images_per_cpu_second": statistics.median(per_cpu), "least": min(per_cpu), "most": max(per_cpu),
        "images_per_second": statistics.median(per_second), "slowest": min(per_second), "fastest": max(per_second),
        "rounds": {"images_per_cpu_second": per_cpu, "images_per_second": per_second},
    }  # fmt: skip


def ratios(one: dict, other: dict, figure: str) -> list[float]:
    """How many times the other's figure is one's, round by round, since a round meets one machine."""
    return [mine / theirs for mine, theirs in zip(one["rounds"][figure], other["rounds"][figure], strict=True)]


def ratio(one: dict, other: dict, figure: str) -> float:
    """The median over the rounds."""
    return statistics.median(ratios(one, other, figure))
