"""`daae convert` that is killed, stopped, or meets a disk that is full or hangs: nothing lost, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import ffcv_writer
from pipeline.errors import DataError, StalledError
from pipeline.shards import ShardWriter
from pipeline.sources import folder as folder_module
from pipeline.sources.entries import Entry
from pipeline.sources.folder import FolderReader, scan
from pipeline.store import Store
from pipeline.unfinished import Unfinished, fits, worth_keeping
from tests.images import encoded, make_folder, picture
from tests.test_convert import ROOT, daae_convert, fails, left_beside, needs_ffcv
from tools import convert
from tools.converting import conversion, decoding, watchdog
from train.command import run


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A folder that takes many seconds to convert: one large picture under many names."""
    root = tmp_path_factory.mktemp("slow") / "in"
    root.mkdir()
    (root / "0.png").write_bytes(encoded(picture(0, 1100, 1100), "PNG", compress_level=1))
    for i in range(1, 500):
        (root / f"{i}.png").symlink_to(root / "0.png")
    return root


def begin(*words: object, file_limit: int | None = None) -> subprocess.Popen:
    def limit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs tests in the background has it ignored
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, "-m", "tools.convert", *map(str, words), "--workers", "1"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )


def until_writing(folder: Path, process: subprocess.Popen) -> psutil.Process:
    """Wait until a shard has been begun in a partial folder; returns the worker process."""
    deadline = time.monotonic() + 60
    while not list(folder.glob(".s.partial-*/shard-*.tar")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 1
    return workers[0]


def test_sigterm_leaves_nothing_and_until_then_the_store_is_taken(slow, tmp_path, capsys):
    process = begin(slow, tmp_path / "s", "--backends", "dali")
    worker = until_writing(tmp_path, process)
    assert "is being written by another process" in fails(capsys, 2, slow, tmp_path / "s", "--backends", "dali")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (75, "")
    assert err == f"error: stopped by SIGTERM while converting {slow}; nothing half-written is left. Run it again.\n"
    assert left_beside(tmp_path) == set()
    assert not worker.is_running()


def test_ctrl_c_leaves_nothing(slow, tmp_path):
    process = begin(slow, tmp_path / "s", "--backends", "dali")
    until_writing(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: stopped by Ctrl-C.\n")
    assert left_beside(tmp_path) == set()


def test_a_killed_conversion_cannot_be_opened_and_the_next_removes_it(slow, tmp_path):
    process = begin(slow, tmp_path / "s", "--backends", "dali")
    worker = until_writing(tmp_path, process)
    process.kill()
    process.communicate(timeout=30)
    worker.wait(10)  # an orphan ends by itself
    (left,) = tmp_path.iterdir()
    for folder in (left, tmp_path / "s"):
        with pytest.raises(DataError, match="no finished store"):
            Store.open(folder)
    make_folder(tmp_path / "in", 2)
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    assert left_beside(tmp_path) == {"in", "s"}


def test_a_worker_that_is_killed_once_is_replaced_and_its_files_are_read_again(slow, tmp_path):
    (tmp_path / "in").mkdir()
    for path in sorted(slow.iterdir())[:60]:
        (tmp_path / "in" / path.name).symlink_to(path.resolve())
    process = begin(tmp_path / "in", tmp_path / "s", "--backends", "dali")
    until_writing(tmp_path, process).kill()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    store = Store.open(tmp_path / "s")
    assert (store.count, store.manifest["bad"]) == (60, 0)


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Pictures that take about a second for each of several shards of 1 MiB, two bad files between them."""
    root = tmp_path_factory.mktemp("noise") / "in"
    for i in range(44):
        (root / f"class {i % 4}").mkdir(parents=True, exist_ok=True)
        dots = np.random.default_rng(i).integers(0, 256, (700, 700, 3), dtype=np.uint8)
        (root / f"class {i % 4}/{i}.png").write_bytes(encoded(Image.fromarray(dots), "PNG", compress_level=0))
    (root / "class 0/empty.jpg").touch()
    (root / "class 1/text.jpg").write_text("no picture")
    return root


def everything(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "stats.json"}


def until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def vouched(folder: Path) -> int:
    """Shards that a conversion has entered in its record."""
    records = [path.read_text().count("\n") for path in folder.glob(".s.partial-*/unfinished/finished.jsonl")]
    return sum(records)


def test_a_killed_conversion_goes_on_and_its_store_is_the_same_to_the_byte(noise, tmp_path):
    words = ("--backends", "dali", "--shard-mb", 1)
    assert daae_convert(noise, tmp_path / "whole", *words) == 0
    expected = everything(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".tar")]) >= 4
    (tmp_path / "x").mkdir()
    for shards in (1, 2):
        process = begin(noise, tmp_path / "x/s", *words)
        until(lambda shards=shards: vouched(tmp_path / "x") >= shards, process)
        process.kill()
        process.communicate(timeout=30)
    (left,) = (tmp_path / "x").iterdir()
    with open(max(left.glob("shard-*.tar")), "ab") as file:  # the one that was being written
        file.write(b"torn")
    rows = left / "unfinished/rows.bin"
    with open(left / "unfinished/finished.jsonl", "ab") as file, open(rows, "ab") as table:
        file.write(b'{"shards": [')
        table.write(b"torn")
    held = json.loads((left / "unfinished/finished.jsonl").read_text().splitlines()[-2])
    process = begin(noise, tmp_path / "x/s", *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == f"note: going on behind {held['next']} of 46 images that an earlier run had finished.\n"
    assert "Converted 44 images" in out
    assert everything(tmp_path / "x/s") == expected
    assert left_beside(tmp_path / "x") == {"s"}


def test_sigterm_keeps_full_shards_and_a_damaged_one_is_written_again(noise, tmp_path):
    words = ("--backends", "dali", "--shard-mb", 1)
    process = begin(noise, tmp_path / "s", *words)
    until(lambda: vouched(tmp_path) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    (left,) = tmp_path.iterdir()
    assert err.splitlines()[0] == (
        f"note: the shards finished so far are kept in {left}; the same command goes on there."
    )
    with open(left / "shard-00001.tar", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    process = begin(noise, tmp_path / "s", *words)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.startswith("note: going on behind ")
    assert daae_convert(noise, tmp_path / "whole", *words) == 0
    assert everything(tmp_path / "s") == everything(tmp_path / "whole")
    # Other settings must not go on from it.
    process = begin(noise, tmp_path / "t", *words)
    until(lambda: list(tmp_path.glob(".t.partial-*/unfinished/finished.jsonl")), process)
    process.kill()
    process.communicate(timeout=30)
    make_folder(tmp_path / "in", 2)
    assert daae_convert(tmp_path / "in", tmp_path / "t", *words) == 0
    assert Store.open(tmp_path / "t").count == 2
    assert left_beside(tmp_path) == {"in", "s", "t", "whole"}


@pytest.mark.slow
@needs_ffcv
def test_killed_while_the_ffcv_file_is_written_nothing_is_decoded_again(noise, tmp_path):
    words = ("--backends", "both", "--shard-mb", 2)
    process = begin(noise, tmp_path / "s", *words)
    until(lambda: list(tmp_path.glob(".s.partial-*/images.beton")), process)
    process.kill()
    process.communicate(timeout=30)
    process = begin(noise, tmp_path / "s", *words)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (
        0, "note: going on behind 46 of 46 images that an earlier run had finished.\n"
    )  # fmt: skip
    assert daae_convert(noise, tmp_path / "whole", *words) == 0
    assert everything(tmp_path / "s") == everything(tmp_path / "whole")


class Poisoned(FolderReader):
    """Dies over some files, as a decoder with a fault does."""

    def read(self, entry: Entry, largest: int) -> bytes:
        if b"poison" in entry.path:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().read(entry, largest)


def test_a_file_that_kills_its_readers_is_listed_and_the_conversion_goes_on(tmp_path, monkeypatch):
    paths = make_folder(tmp_path / "in", 12, classes=2)
    paths[3].rename(paths[3].parent / "poison.jpg")
    paths[8].rename(paths[8].parent / "poison too.jpg")
    genuine = conversion.source_of

    def poisoned(*given):
        source = genuine(*given)
        monkeypatch.setattr(source, "reader", lambda spool: Poisoned(os.fsencode(tmp_path / "in")))
        return source

    monkeypatch.setattr(conversion, "source_of", poisoned)
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    rows = [json.loads(line) for line in (tmp_path / "s/bad_files.jsonl").read_text().splitlines()]
    assert [(row["path"], row["reason"]) for row in rows] == [
        (path, "the process that decoded it was killed by SIGSEGV, and so did a second one")
        for path in ("class-0/poison too.jpg", "class-1/poison.jpg")
    ]
    monkeypatch.undo()
    for path in (tmp_path / "in").rglob("poison*"):
        path.write_bytes(b"not one")
    assert daae_convert(tmp_path / "in", tmp_path / "t", "--backends", "dali") == 0
    for name in ("shard-00000.tar", "index.npy", "labels.npy", "names.txt"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()


def test_a_file_that_killed_its_readers_is_not_tried_by_the_next_run(tmp_path):
    make_folder(tmp_path / "in", 20)
    folder = tmp_path / "work"
    folder.mkdir()
    job = {"source": "x"}
    Unfinished(folder, job).lose(b"00007.jpg", "it was killed")
    assert fits(folder, job)
    assert not fits(folder, {"source": "y"})
    listing = scan(tmp_path / "in")
    done = Unfinished(folder, job).done
    tasks = decoding.Remaining(listing, 0, done.lost)
    entries = [entry for task in range(len(tasks)) for entry in tasks[task]]
    assert len(entries) == 19
    assert sorted(place for task in range(len(tasks)) for place in tasks.places(task)) == list(range(20))
    assert b"00007.jpg" not in {entry.path for entry in entries}
    assert worth_keeping(folder, StalledError("many in a row")) is False
    assert Unfinished(folder, job).done.lost == {}


def test_a_line_that_a_kill_has_torn_costs_none_of_those_that_follow(tmp_path):
    job = {"source": "x"}
    Unfinished(tmp_path, job).lose(b"0.jpg", "it was killed")
    with open(tmp_path / "unfinished/lost.jsonl", "a") as file:
        file.write('{"path": "1.j')
    Unfinished(tmp_path, job).lose(b"2.jpg", "it was killed")
    assert list(Unfinished(tmp_path, job).done.lost) == [b"0.jpg", b"2.jpg"]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        *((OSError(number, os.strerror(number)), False) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        *((OSError(number, os.strerror(number)), True) for number in (errno.EIO, errno.EROFS, errno.ESTALE)),
        (DataError("too many are bad"), False),
        (KeyboardInterrupt(), True),
    ],
    ids=repr,
)
def test_finished_shards_are_given_back_for_a_full_disk_alone(tmp_path, error, kept):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/finished.jsonl").write_text('{"last": false}\n')
    assert worth_keeping(tmp_path, error) is kept


def test_the_record_is_removed_when_all_else_is_written(tmp_path, monkeypatch):
    make_folder(tmp_path / "in", 3)
    genuine, there = Unfinished.remove, []

    def remove(record: Unfinished) -> None:
        there.extend(path.name for path in record.folder.iterdir())
        genuine(record)

    monkeypatch.setattr(Unfinished, "remove", remove)
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    assert set(there) == left_beside(tmp_path / "s") | {"unfinished"}


def test_a_kill_while_the_record_is_removed_leaves_one_to_go_on_from(tmp_path, monkeypatch):
    record = Unfinished(tmp_path, {"source": "x"})
    for name in ("finished.jsonl", "rows.bin", "spool", "lost.jsonl", "listing.npz"):
        (record.place / name).touch()
    genuine, order = Path.unlink, []

    def unlink(path: Path, **more) -> None:
        order.append(path.name)
        genuine(path, **more)

    monkeypatch.setattr(Path, "unlink", unlink)
    record.remove()
    assert order[:2] == ["listing.npz", "spool"]  # a listing of what is gone would make every picture a bad one
    assert order[-1] == "job.json"
    assert left_beside(tmp_path) == set()


def half_done(folder: Path, job: dict) -> None:
    """What a run that was killed leaves: a shard of one picture, and its record."""
    folder.mkdir()
    record, writer = Unfinished(folder, job), ShardWriter(folder, shard_bytes=1 << 20)
    writer.add(encoded(picture(0, 40, 30)), label=-1, height=30, width=40)
    writer.close()
    record.finished(writer, [0], 1, [], 1, last=False)


def test_finished_shards_are_read_again_within_a_limit(tmp_path, monkeypatch):
    job, told = {"source": "x"}, []
    half_done(tmp_path / "a", job)
    done = Unfinished(tmp_path / "a", job, lambda place, images: told.append(place)).done
    assert done.shards == ["shard-00000.tar"]
    assert set(told) == {str(tmp_path / "a/shard-00000.tar"), str(tmp_path / "a/shard-00000.idx")}
    assert told.count(told[0]) >= 2  # before it is opened, and for every MiB
    free, watch = threading.Event(), watchdog.Watchdog(1, quiet=True)
    monkeypatch.setattr("pipeline.unfinished.describe_file", lambda path, heard: free.wait(60))
    with pytest.raises(StalledError, match=r"while reading what is finished, at .*/a/shard-00000\.tar\."):
        watch.do("reading what is finished", lambda: Unfinished(tmp_path / "a", job, watch.tell))
    free.set()


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(tmp_path):
    make_folder(tmp_path / "in", 40, 200)
    process = begin(tmp_path / "in", tmp_path / "s", "--backends", "dali", file_limit=100_000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert err.startswith(f"error: no space left while writing {tmp_path} (File too large; ")
    assert left_beside(tmp_path) == {"in"}


@needs_ffcv
def test_a_full_disk_under_ffcvs_writer_does_not_hang(tmp_path):
    make_folder(tmp_path / "in", 30)
    # Room for the shard, not for one page of FFCV's file.
    process = begin(tmp_path / "in", tmp_path / "s", file_limit=1 << 20)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 5, err
    assert err.startswith("error: FFCV's writer failed: OSError: [Errno 27] File too large. Its disk has ")
    assert left_beside(tmp_path) == {"in"}


@pytest.mark.parametrize("plan", [False, True])
def test_a_listing_that_hangs_is_given_up_with_the_place_and_code_6(tmp_path, capsys, monkeypatch, plan):
    make_folder(tmp_path / "in", 3)
    genuine, free = folder_module.sniff, threading.Event()
    (tmp_path / "in/stuck").write_bytes(b"looked into, since its name does not tell")

    def stuck(head: bytes) -> str | None:
        free.wait(60)
        return genuine(head)

    monkeypatch.setattr(folder_module, "sniff", stuck)
    monkeypatch.setattr(watchdog, "LINE_SECONDS", 0.1)
    words = [tmp_path / "in", tmp_path / "s", "--backends", "dali", "--stall-timeout", "1", *["--plan"] * plan]
    assert run(convert.main, [*map(str, words)]) == StalledError.code
    free.set()
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("listing: nothing has moved for ")
    assert told[0].endswith(f" s, at {tmp_path}/in/stuck; giving up after 1 s")
    assert told[-1] == (
        f"error: nothing has moved for 1 s while listing, at {tmp_path}/in/stuck. Look at the disk or network that "
        "holds it, or allow more with --stall-timeout."
    )
    assert left_beside(tmp_path) == {"in"}


def test_work_that_goes_on_is_never_given_up_and_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(watchdog, "LINE_SECONDS", 0.3)
    watch = watchdog.Watchdog(0.5, quiet=False)

    def work() -> str:
        for step in range(12):
            watch.tell(b"new\nline", step)
            time.sleep(0.1)
        return "done"

    assert watch.do("listing", work) == "done"
    told = capsys.readouterr().err.splitlines()
    assert told
    assert all(line.startswith("listing: ") and line.endswith(" images so far") for line in told)
    with pytest.raises(DataError, match="it is wrong"):
        watch.do("listing", lambda: (_ for _ in ()).throw(DataError("it is wrong")).__next__())


def test_who_stops_waiting_stops_the_work(monkeypatch):
    watch, ended = watchdog.Watchdog(60, quiet=True), threading.Event()

    def work() -> None:
        try:
            while True:
                watch.tell("", 0)
                time.sleep(0.01)
        finally:
            ended.set()

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watchdog, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch.do("listing", work)
    assert ended.is_set()


def test_a_disk_that_hangs_while_the_store_is_written_ends_with_code_6_and_is_left_alone(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "in", 6)
    free, began = threading.Event(), time.monotonic()

    def stuck(*_, **__) -> int:
        free.wait(60)
        raise OSError("too late")

    def closed(*_) -> None:
        raise AssertionError("closing the file would wait for the disk")

    monkeypatch.setattr(ShardWriter, "add", stuck)
    monkeypatch.setattr(ShardWriter, "abandon", closed)
    words = [tmp_path / "in", tmp_path / "s", "--backends", "dali", "--workers", "1", "--stall-timeout", "3"]
    assert run(convert.main, [*map(str, words)]) == StalledError.code
    assert time.monotonic() - began < 50
    free.set()
    (left,) = tmp_path.glob(".s.partial-*")
    assert capsys.readouterr().err.splitlines() == [
        f"note: the shards finished so far are kept in {left}; the same command goes on there.",
        f"error: nothing has moved for 3 s while writing the store, at {left}. Look at the disk or network that holds "
        "it, or allow more with --stall-timeout.",
    ]
    monkeypatch.undo()
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    assert left_beside(tmp_path) == {"in", "s"}


def test_whoever_interrupts_a_write_that_hangs_leaves_it_behind(monkeypatch):
    free, said = threading.Event(), []

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watchdog, "END_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "wait", interrupt)
    monkeypatch.setattr(watchdog.Watchdog, "_end_soon", lambda watch, sentence: said.append(sentence))
    watch = watchdog.Watchdog(60, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        watch.do("listing", lambda: free.wait(60))
    assert (watch.hung, said) == (False, [])
    watch = watchdog.Watchdog(60, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        watch.do("writing the store", lambda: free.wait(60), writes=True)
    assert (watch.hung, said) == (True, ["stopped while writing the store, which hangs at ."])
    free.set()
    watch = watchdog.Watchdog(60, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        watch.do("writing the store", lambda: None, writes=True)
    assert (watch.hung, len(said)) == (False, 1)


HANGS = """
import time
from tools.converting import watchdog

watchdog.END_SECONDS = 0.5
with watchdog.Watchdog(1, quiet=True) as watch:
    try:
        watch.do("writing the store", lambda: (watch.tell("/disk/s", 0), time.sleep(60)), writes=True)
    finally:
        time.sleep(60)  # cleaning up waits for the same disk
"""


def test_a_process_whose_cleaning_up_hangs_as_well_ends_all_the_same():
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == StalledError.code
    assert done.stderr.startswith("error: nothing has moved for 1 s while writing the store, at /disk/s. Look at the ")
    assert done.stderr.count("\n") == 1


def test_a_writer_that_no_kill_ends_is_not_waited_for():
    process = subprocess.Popen(["sleep", "60"])

    class Stubborn:
        def __init__(self) -> None:
            self.pid, self.waited = process.pid, []

        def poll(self) -> None:
            return None

        def terminate(self) -> None:
            pass

        def wait(self, timeout: float | None = None) -> int:
            self.waited.append(timeout)
            raise subprocess.TimeoutExpired("sleep", timeout or 0)

    child = Stubborn()
    ffcv_writer._kill(child)
    assert child.waited == [ffcv_writer.END_SECONDS] * 2
    assert process.wait(10) == -signal.SIGKILL
