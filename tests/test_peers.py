"""What `daae profile --peers` counts, on a peer whose cost is known. As a program this file is that peer."""

from __future__ import annotations

import contextlib
import queue
import statistics
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from tools.profiling.peer_process import rates, ratio, serve, start

COST = 0.04  # CPU-seconds of a batch of one image
AHEAD = 3  # batches that wait, and one more is held by the thread that made it


def ahead_of_its_reader() -> Iterator[int]:
    """As loaders work: a thread makes batches until its queue is full."""
    ready: queue.Queue[int] = queue.Queue(AHEAD)

    def make() -> None:
        while True:
            end = time.thread_time() + COST
            while time.thread_time() < end:
                pass
            ready.put(1)

    threading.Thread(target=make, daemon=True).start()
    while True:
        yield ready.get()


def test_a_peer_is_charged_for_what_it_makes_and_rests_while_others_work():
    """Counted from full queues on, four of the nineteen batches of a round would be free."""
    found, made_meanwhile = [], []
    with contextlib.closing(start("a peer", ["tests.test_peers"])) as peer:
        assert peer.ask(None, 100) == {"ready": True}
        process = psutil.Process(peer.process.pid)
        for _ in range(3):
            before = sum(process.cpu_times()[:2])
            time.sleep(2 * (AHEAD + 1) * COST)  # others work
            made_meanwhile.append(sum(process.cpu_times()[:2]) - before)
            found.append(peer.ask(f"{15 * COST}", 100))
    assert statistics.median(each["cpu_seconds"] / each["images"] for each in found) == pytest.approx(COST, rel=0.16)
    assert statistics.median(made_meanwhile) < COST


def test_ratios_are_taken_within_a_round():
    """The machine is three times as fast in the first round as in the last."""
    one = rates([{"images": count, "seconds": 1.0, "cpu_seconds": 2.0} for count in (300, 240, 100)])
    other = rates([{"images": count, "seconds": 1.0, "cpu_seconds": 1.0} for count in (150, 80, 50)])
    assert ratio(one, other, "images_per_second") == 2
    assert ratio(one, other, "images_per_cpu_second") == 1
    assert (one["images_per_second"], one["slowest"], one["fastest"]) == (240, 100, 300)


if __name__ == "__main__":
    time.perf_counter = time.process_time  # rounds of as many batches on a busy machine as on an idle one
    serve(ahead_of_its_reader)
