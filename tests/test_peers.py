"""What `daae profile --peers` counts, on a peer whose cost is known. As a program this file is that peer."""

from __future__ import annotations

import contextlib
import queue
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tools.profiling import peer_process
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


class Answering:
    """A peer that has done its round at once, and remembers how long it would have been waited for."""

    def __init__(self) -> None:
        self.patience: list[float] = []

    def ask(self, what: str | None, patience: float) -> dict:
        self.patience.append(patience)
        return {"images": 1, "seconds": 1.0, "cpu_seconds": 1.0}

    def close(self) -> None: ...


def test_a_long_round_is_waited_for(monkeypatch):
    """--seconds may be a day."""
    one = Answering()
    monkeypatch.setattr(peer_process, "start", lambda name, words: one)
    peer_process.measure({"one": []}, 5000.0, lambda _: None)
    ready = peer_process.READY_SECONDS
    assert one.patience == [ready, *[ready + 5000.0 / peer_process.ROUNDS] * peer_process.ROUNDS]


def test_a_store_without_tar_shards_leaves_dali_out(monkeypatch):
    from tools.profiling import peers  # here: this file is a peer too, which need not wait for torch

    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    beton, shard = Path("images.beton"), Path("shard-00000.tar")
    assert peers.missing(SimpleNamespace(beton=beton, shards=[beton], raw=False)) == {
        "DALI": "the store has no tar shards"
    }
    assert peers.missing(SimpleNamespace(beton=beton, shards=[shard], raw=False)) == {}


def test_what_a_reader_of_the_table_has_to_know_stands_under_it(monkeypatch, capsys):
    from tools.profiling import peers

    monkeypatch.setattr(peers.native, "why_not", lambda: None)
    assert peers.notes(SimpleNamespace(count=peers.MOST_IMAGES)) == []
    monkeypatch.setattr(peers.native, "why_not", lambda: "no C compiler")
    notes = peers.notes(SimpleNamespace(count=5000))
    assert notes == [
        "torchvision reads the first 4,096 of the 5,000 images, as files; the others read all.",
        "Ours: Pillow decodes, several times slower than our decoder: no C compiler.",
    ]
    one = rates([{"images": 100, "seconds": 1.0, "cpu_seconds": 2.0}] * 3)
    peers.show_peers({"224": {"DAAE, shards": one, "DALI": one}}, {"224": one}, {1: one}, notes)
    shown = capsys.readouterr().out
    assert all(note in shown for note in notes)


def test_raw_pixels_are_pixmaps_for_torchvision(tmp_path):
    from PIL import Image

    from pipeline.store import Store
    from tests.images import make_folder
    from tools import convert
    from tools.profiling import peers

    make_folder(tmp_path / "in", 3, 40, kind="PNG")
    words = [str(tmp_path / "in"), str(tmp_path / "s"), "--pixels", "raw", "--backends", "dali", "--quiet"]
    assert convert.main(words) == 0
    store = Store.open(tmp_path / "s")
    peers.write_files(store, tmp_path, lambda: None)
    names = (tmp_path / "s/names.txt").read_text().splitlines()
    for name, path in zip(names, sorted((tmp_path / "all").glob("*.ppm")), strict=True):
        with Image.open(path) as found, Image.open(tmp_path / "in" / name) as source:
            assert (found.size, found.tobytes()) == (source.size, source.tobytes())
    assert "portable pixmaps" in peers.missing(store)["torchvision, v2"]


def test_the_files_for_torchvision_are_the_stores_pictures(store, tmp_path):
    from pipeline.stored import StoredPictures
    from tools.profiling import peers

    steps: list[int] = []
    peers.write_files(store, tmp_path, lambda: steps.append(1))
    stored = StoredPictures.in_shards(store)
    files = sorted((tmp_path / "all").iterdir())
    assert [path.read_bytes() for path in files] == [stored.read(sample).tobytes() for sample in range(store.count)]
    assert len(steps) == store.count
    stored.close()


if __name__ == "__main__":
    time.perf_counter = time.process_time  # rounds of as many batches on a busy machine as on an idle one
    serve(ahead_of_its_reader)
