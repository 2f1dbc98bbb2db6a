"""Work in other processes that comes back in order, whatever becomes of the processes."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import time

import psutil
import pytest

from pipeline.errors import DataError, StalledError
from pipeline.ordered_map import ordered_map


def sleepy(item: int, common: str) -> str:
    if common == "hang" and item == 5:
        time.sleep(60)
    if common == "crash" and item == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if common == "raise" and item == 5:
        raise DataError("item 5 is wrong")
    return f"{common} {item}"


def is_tracker(process: psutil.Process) -> bool:
    """multiprocessing's own, which comes with the first process and stays."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.ZombieProcess:  # a worker that saw its pipe close
        return False


TASKS = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_an_item_that_kills_two_workers_is_lost_and_the_rest_is_answered_in_order():
    began = time.monotonic()
    mapped = ordered_map(
        sleepy,
        TASKS,
        "crash",
        workers=2,
        stall_seconds=60,
        describe=str,
        lost=lambda item, how: f"lost {item}: it {how}",
    )
    assert next(mapped) == [f"crash {i}" for i in (0, 1, 2)]
    started = time.monotonic() - began
    assert next(mapped) == ["crash 3", "crash 4", "lost 5: it was killed by SIGSEGV"]
    assert time.monotonic() - began - started < 5 + 2 * started  # two processes were started meanwhile
    assert list(mapped) == [[f"crash {i}" for i in (6, 7, 8)]]


def deadly(item: int, common: int) -> int:
    if item >= common:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_many_deaths_in_a_row_are_an_error(monkeypatch):
    monkeypatch.setattr("pipeline.ordered_map.DEATHS_IN_A_ROW", 2)
    mapped = ordered_map(
        deadly, [[0], [1], [2, 3], [4]], 2, workers=1, stall_seconds=60, describe=str, lost=lambda item, how: -item
    )
    assert [next(mapped), next(mapped)] == [[0], [1]]
    with pytest.raises(StalledError, match=r"died over 2 items in a row; one was killed by SIGKILL .* while reading 3"):
        next(mapped)


def test_ordered_map_keeps_the_order_with_several_workers():
    mapped = ordered_map(sleepy, [[i] for i in range(30)], "fine", workers=2, stall_seconds=60, describe=str)
    assert list(mapped) == [[f"fine {i}"] for i in range(30)]


def slow(item: int, seconds: float) -> int:
    time.sleep(seconds)
    return item


def test_a_task_whose_items_take_long_is_not_given_up_while_they_come_to_an_end():
    """Its four items take longer together than nothing may move, and are answered together."""
    mapped = ordered_map(slow, [[0, 1, 2, 3]], 1.0, workers=1, stall_seconds=2, describe=str)
    assert list(mapped) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("crash", StalledError, "a worker process was killed by SIGSEGV while reading 5."),
        ("hang", StalledError, "nothing has moved for 2 s while reading 5."),
        ("raise", DataError, "item 5 is wrong"),
    ],
)
def test_ordered_map_names_the_item_that_stopped_it(how, error, words):
    before = set(psutil.Process().children())
    mapped = ordered_map(sleepy, TASKS, how, workers=1, stall_seconds=2, describe=str)
    assert next(mapped) == [f"{how} {i}" for i in (0, 1, 2)]
    with pytest.raises(error) as caught:
        next(mapped)
    assert str(caught.value) == words
    assert all(is_tracker(one) for one in set(psutil.Process().children()) - before)


def test_a_worker_that_no_kill_ends_is_left_behind(monkeypatch):
    """As one is that hangs in the kernel."""
    monkeypatch.setattr("pipeline.ordered_map.END_SECONDS", 0.5)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "kill", lambda process: None)
    before = set(psutil.Process().children())
    mapped = ordered_map(sleepy, TASKS, "hang", workers=1, stall_seconds=2, describe=str)
    assert next(mapped) == [f"hang {i}" for i in (0, 1, 2)]
    began = time.monotonic()
    with pytest.raises(StalledError, match="nothing has moved for 2 s while reading 5"):
        next(mapped)
    assert time.monotonic() - began < 30
    new = set(psutil.Process().children()) - before
    (left,) = [one for one in new if not is_tracker(one)]
    # Nor is it waited for at the end of this process.
    assert left.pid not in {child.pid for child in multiprocessing.active_children()}
    left.kill()
    left.wait(10)
