"""`daae verify`: every kind of damage is named, and `--fix` leaves a store of exactly the rest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import ffcv_writer
from pipeline.decoder import checksum
from pipeline.errors import ResourceError
from pipeline.shards import ShardWriter, write_manifest, write_tables
from pipeline.store import Store
from tests.images import encoded, make_folder, picture, pixels
from tools import convert, verify
from tools.converting import verification
from train.command import run

needs_ffcv = pytest.mark.skipif(ffcv_writer.ffcv_missing() is not None, reason="FFCV is not installed")


def daae_verify(*words: object) -> int:
    return run(verify.main, [*map(str, words), "--workers", "1", "--quiet"])


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """12 pictures of 3 classes in two shards, and a bad file."""
    root = tmp_path_factory.mktemp("verify")
    make_folder(root / "in", 12, 40, classes=3)
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    for i in range(4):
        (root / f"in/class-0/noise{i}.jpg").write_bytes(encoded(Image.fromarray(np.roll(noise, i)), quality=100))
    (root / "in/class-1/text.jpg").write_text("no picture")
    words = [str(root / "in"), str(root / "s"), "--backends", "dali", "--shard-mb", "1", "--workers", "1", "--quiet"]
    assert run(convert.main, words) == 0
    assert len(Store.open(root / "s").shards) == 2
    return root / "s"


@pytest.fixture
def store(converted, tmp_path) -> Path:
    shutil.copytree(converted, tmp_path / "s")
    return tmp_path / "s"


def jpegs(store: Store) -> list[bytes]:
    found = []
    for row in store.index:
        with open(store.shards[row["shard"]], "rb") as file:
            file.seek(int(row["offset"]))
            found.append(file.read(int(row["size"])))
    return found


def lines(store: Path, name: str) -> list[str]:
    return (store / name).read_text().splitlines()


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_file_whose_reading_hangs_is_named_with_code_6(store, capsys, monkeypatch):
    free = threading.Event()

    def stuck(path: Path, facts: dict, tell) -> None:
        tell(path.name, 0)
        if path.name == "shard-00001.tar":
            free.wait(60)

    monkeypatch.setattr(verification, "_file", stuck)
    assert daae_verify(store, "--stall-timeout", "1") == 6
    free.set()
    assert capsys.readouterr().err == (
        f"error: nothing has moved for 1 s while reading {store}, at shard-00001.tar. Look at the disk or network that "
        "holds it, or allow more with --stall-timeout.\n"
    )


def test_a_sound_store_is_said_to_be_sound(store, capsys):
    assert daae_verify(store) == 0
    assert capsys.readouterr().out == f"{store} is sound: its files and all 16 pictures are what was converted.\n"
    assert daae_verify(store, "--quick") == 0
    assert capsys.readouterr().out == f"{store} is sound: its files are what was converted.\n"
    before = (store / "manifest.json").stat().st_ino
    assert daae_verify(store, "--fix", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["sound"], result["fixed"], result["files"], result["samples"]) == (True, False, [], [])
    assert (store / "manifest.json").stat().st_ino == before


def test_flipped_bits_are_named_and_fix_leaves_the_others_as_they_were(store, tmp_path, capsys):
    before = Store.open(store)
    pictures, names, labels = jpegs(before), lines(store, "names.txt"), np.array(before.labels)
    for sample in (3, 11):
        row = before.index[sample]
        flip(before.shards[row["shard"]], int(row["offset"]) + int(row["size"]) // 2)
    assert daae_verify(store, "--quick") == 3
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {store} is damaged: ")
    assert "shard-00000.tar: is not what was written: its sha256 differs\n" in said.out
    assert daae_verify(store) == 3
    said = capsys.readouterr()
    for sample in (3, 11):
        assert f"sample {sample} ({names[sample]}): its bytes are not those that were converted\n" in said.out
    assert said.err.endswith(
        f"2 bad pictures of 16. `daae verify {store} --fix` drops what is bad; "
        "converting the images again brings it back.\n"
    )
    assert daae_verify(store, "--fix") == 0
    assert capsys.readouterr().out.endswith("2 bad pictures of 16; 14 pictures are left.\n")
    good = [sample for sample in range(16) if sample not in (3, 11)]
    fixed = Store.open(store)
    assert jpegs(fixed) == [pictures[sample] for sample in good]
    assert lines(store, "names.txt") == [names[sample] for sample in good]
    assert np.array_equal(fixed.labels, labels[good])
    assert fixed.columns == before.columns
    assert fixed.index["sum"].tolist() == [checksum(pictures[sample]) for sample in good]
    assert fixed.manifest["bad"] == 3
    rows = [json.loads(line) for line in lines(store, "bad_files.jsonl")]
    assert {row["path"] for row in rows} == {"class-1/text.jpg", names[3], names[11]}
    assert daae_verify(store) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_picture_that_is_another_one_by_the_time_it_is_copied_stops_the_mending(store, tmp_path, capsys, monkeypatch):
    """The workers have read it well: a disk or a memory that fails now must not get a checksum of its own."""
    opened = Store.open(store)
    row = opened.index[3]
    flip(opened.shards[row["shard"]], int(row["offset"]) + int(row["size"]) // 2)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    genuine = verification.SampleReader.read

    def failing(reader: verification.SampleReader, sample: int) -> bytes:
        data = bytearray(genuine(reader, sample))
        data[len(data) // 2] ^= sample == 7
        return bytes(data)

    monkeypatch.setattr(verification.SampleReader, "read", failing)
    assert daae_verify(store, "--fix") == 3
    assert capsys.readouterr().err == (
        f"error: sample 7 of {store} was good a moment ago and is not any more. Nothing was changed; look at the disk "
        "and the memory of this machine.\n"
    )
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_the_manifest_does_not_name_is_carried_over(store):
    (store / "generator.safetensors").write_bytes(b"weights")
    (store / "notes").mkdir()
    (store / "notes/why.txt").write_text("because")
    (store / "link").symlink_to("nowhere")
    statistics = (store / "stats.json").read_bytes()
    opened = Store.open(store)
    row = opened.index[3]
    flip(opened.shards[row["shard"]], int(row["offset"]) + int(row["size"]) // 2)
    assert daae_verify(store, "--fix") == 0
    assert Store.open(store).count == 15
    assert (store / "generator.safetensors").read_bytes() == b"weights"
    assert (store / "notes/why.txt").read_text() == "because"
    assert os.readlink(store / "link") == "nowhere"
    assert (store / "stats.json").read_bytes() == statistics


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_an_error_of_the_machine_is_no_verdict_on_a_picture(store, monkeypatch, number):
    """`--fix` would drop it."""
    checker = verification.Checker(store, Store.open(store).manifest)
    assert checker.problem(0) is None

    def fails(*_) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(ResourceError, match=r"shard-0000\d\.tar"):
        checker.problem(1)


@pytest.mark.parametrize("times", [1, 2])
def test_a_disk_that_fails_once_is_read_again_and_twice_is_no_verdict_on_a_file(store, capsys, monkeypatch, times):
    problem, failures = verification._problem, []

    def fails(path: Path, facts: dict, tell) -> str | None:
        if path.name == "names.txt" and len(failures) < times:
            failures.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return problem(path, facts, tell)

    monkeypatch.setattr(verification, "_problem", fails)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert daae_verify(store, "--fix") == (0 if times == 1 else 5)
    assert len(failures) == times
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    if times == 2:
        assert "names.txt cannot be read: Input/output error. Look at the disk" in capsys.readouterr().err


@needs_ffcv
@pytest.mark.parametrize("backends", ["both", "ffcv"])
def test_without_ffcv_a_store_is_mended_as_far_as_its_shards_reach(tmp_path, capsys, monkeypatch, backends):
    make_folder(tmp_path / "in", 4, 40)
    words = [str(tmp_path / "in"), str(tmp_path / "s"), "--backends", backends, "--quiet"]
    assert run(convert.main, words) == 0
    store = Store.open(tmp_path / "s")
    flip(store.shards[0], int(store.index["offset"][1]) + 100)
    before = {path.name: path.read_bytes() for path in store.root.iterdir()}
    monkeypatch.setattr(verification, "ffcv_missing", lambda: "cv2 is not installed")
    if backends == "ffcv":
        assert daae_verify(store.root, "--fix") == 5
        assert "is an FFCV file alone, and FFCV is not there: cv2 is not installed." in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in store.root.iterdir()} == before
        return
    assert run(verify.main, [str(store.root), "--workers", "1", "--fix"]) == 0
    assert "FFCV is not there (cv2 is not installed); the store is left without" in capsys.readouterr().err
    fixed = Store.open(store.root)
    assert (fixed.count, fixed.beton, fixed.manifest["encode"]["backends"]) == (3, None, ["dali"])
    assert daae_verify(store.root) == 0


def test_a_store_whose_path_says_format_is_looked_at_as_any_other(converted, tmp_path, capsys):
    store = tmp_path / "format 1"
    shutil.copytree(converted, store)
    (store / "bad_files.jsonl").unlink()
    assert daae_verify(store, "--quick", "--json") == 3
    assert json.loads(capsys.readouterr().out)["files"] == [{"file": "bad_files.jsonl", "problem": "is missing"}]


def test_what_lies_beside_the_pictures_is_written_again_to_the_byte(store, converted, capsys):
    flip(store / "shard-00001.idx", 20)
    (store / "bad_files.jsonl").unlink()
    os.truncate(store / "shard-00000.tar", (store / "shard-00000.tar").stat().st_size - 600)  # of the padding
    assert daae_verify(store, "--json") == 3
    result = json.loads(capsys.readouterr().out)
    assert [one["file"] for one in result["files"]] == ["bad_files.jsonl", "shard-00000.tar", "shard-00001.idx"]
    assert result["files"][0]["problem"] == "is missing"
    assert result["files"][1]["problem"].startswith("has ")
    assert result["samples"] == []
    assert daae_verify(store, "--fix") == 0
    for name in ("shard-00000.tar", "shard-00001.idx", "index.npy", "labels.npy", "names.txt"):
        assert (store / name).read_bytes() == (converted / name).read_bytes()
    assert Store.open(store).fingerprint == Store.open(converted).fingerprint


def test_a_missing_shard_costs_its_pictures_alone(store, capsys):
    before = Store.open(store)
    lost = np.flatnonzero(before.index["shard"] == 1).tolist()
    kept = jpegs(before)[: lost[0]]
    (store / "shard-00001.tar").unlink()
    assert daae_verify(store, "--fix", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["sample"] for one in result["samples"]] == lost
    assert {one["reason"] for one in result["samples"]} == {"its shard cannot be read: No such file or directory"}
    assert jpegs(Store.open(store)) == kept
    os.truncate(store / "shard-00000.tar", 0)
    assert daae_verify(store, "--fix") == 3
    assert "has no good picture left" in capsys.readouterr().err
    assert (store / "manifest.json").exists()


@pytest.mark.parametrize("name", ["index.npy", "labels.npy", "names.txt"])
def test_damaged_tables_cannot_be_fixed_and_are_left_alone(store, capsys, name):
    flip(store / name, (store / name).stat().st_size - 3)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert daae_verify(store, "--fix") == 3
    said = capsys.readouterr()
    assert said.out == f"{name}: is not what was written: its sha256 differs\n"
    assert said.err.endswith("Its tables cannot be told from its pictures: convert the images again.\n")
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


def test_a_picture_with_the_right_sum_must_also_decode_to_its_size(tmp_path, capsys):
    good = encoded(picture(0, 40, 30))
    writer = ShardWriter(tmp_path, shard_bytes=1 << 20)
    for jpeg, width in ((good, 40), (good[: len(good) // 2], 40), (good, 39), (b"nothing", 40)):
        writer.add(jpeg, label=0, height=30, width=width)
    writer.close()
    files = writer.files | write_tables(tmp_path, writer.index, np.zeros((4, 1)), [b"a", b"b", b"c", b"d\n"])
    facts = {"columns": {"class": ["x"]}, "encode": {"shard_mb": 1, "backends": ["dali"]}, "source": {}, "skipped": {}}
    write_manifest(tmp_path, files=files, index=writer.index, shards=writer.shards, bad=0, **facts)
    assert daae_verify(tmp_path, "--fix", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [(one["sample"], one["name"]) for one in result["samples"]] == [(1, "b"), (2, "c"), (3, "d\\n")]
    reasons = [one["reason"] for one in result["samples"]]
    assert reasons[0].startswith("it cannot be decoded: ")
    assert reasons[1] == "it is 40 x 30 pixels, the index says 39 x 30"
    assert reasons[2].startswith("it cannot be decoded: ")
    fixed = Store.open(tmp_path)
    assert jpegs(fixed) == [good]
    assert pixels(jpegs(fixed)[0]).shape == (30, 40, 3)


@pytest.mark.slow
@needs_ffcv
def test_a_store_of_ffcvs_kind_alone_is_fixed_too(tmp_path, capsys):
    make_folder(tmp_path / "in", 8, 40, classes=2)
    words = [str(tmp_path / "in"), str(tmp_path / "s"), "--backends", "ffcv", "--workers", "1", "--quiet"]
    assert run(convert.main, words) == 0
    before = Store.open(tmp_path / "s")
    pictures = jpegs(before)
    assert before.beton is not None
    flip(before.beton, int(before.index[5]["offset"]) + 300)
    capsys.readouterr()
    assert daae_verify(tmp_path / "s", "--fix", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["sample"] for one in result["samples"]] == [5]
    assert [one["file"] for one in result["files"]] == ["images.beton"]
    fixed = Store.open(tmp_path / "s")
    assert fixed.shards == [fixed.beton]
    assert jpegs(fixed) == pictures[:5] + pictures[6:]
    assert daae_verify(tmp_path / "s") == 0


def test_wrong_words_end_in_a_sentence(tmp_path, capsys):
    for words, code, part in (
        ((tmp_path / "none",), 3, "is no finished store"),
        ((tmp_path, "--quick", "--fix"), 2, "Leave one out"),
        ((tmp_path, "--stall-timeout", 0), 2, "--stall-timeout is from"),
    ):
        assert daae_verify(*words) == code
        assert part in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    assert daae_verify(tmp_path) == 3
    assert "has format 1, this program reads" in capsys.readouterr().err


def test_a_raw_store_is_checked_and_mended_like_any_other(tmp_path, capsys):
    make_folder(tmp_path / "in", 6, 40)
    words = [str(tmp_path / "in"), str(tmp_path / "s"), "--backends", "dali", "--pixels", "raw", "--quiet"]
    assert run(convert.main, words) == 0
    before = Store.open(tmp_path / "s")
    pictures, row, names = jpegs(before), before.index[2], lines(tmp_path / "s", "names.txt")
    assert daae_verify(tmp_path / "s") == 0
    flip(before.shards[0], int(row["offset"]) + 100)
    assert daae_verify(tmp_path / "s") == 3
    assert f"sample 2 ({names[2]}): its bytes are not those that were converted" in capsys.readouterr().out
    assert daae_verify(tmp_path / "s", "--fix") == 0
    fixed = Store.open(tmp_path / "s")
    assert fixed.raw
    assert jpegs(fixed) == pictures[:2] + pictures[3:]
    assert b"000000004.ppm" in fixed.shards[0].read_bytes()
    assert daae_verify(tmp_path / "s") == 0


def test_an_index_that_does_not_fit_raw_pixels_is_named(tmp_path, capsys):
    writer = ShardWriter(tmp_path, shard_bytes=1 << 20, raw=True)
    good, bad = picture(0, 40, 30).tobytes(), picture(1, 40, 30).tobytes()
    writer.add(good, label=-1, height=30, width=40)
    writer.add(bad, label=-1, height=30, width=41)
    writer.close()
    tables = write_tables(tmp_path, writer.index, np.empty((2, 0), int), [b"good", b"bad"])
    facts = {"columns": {}, "encode": {"shard_mb": 1, "backends": ["dali"], "pixels": "raw"}, "source": {}}
    write_manifest(
        tmp_path, files=writer.files | tables, index=writer.index, shards=writer.shards, bad=0, skipped={}, **facts
    )
    assert daae_verify(tmp_path) == 3
    assert "sample 1 (bad): it has 3,600 bytes for 1,230 pixels\n" in capsys.readouterr().out
