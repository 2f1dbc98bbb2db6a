"""`daae convert`: what the store holds, where its labels come from, and how wrong input is answered."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import ffcv_writer, pictures
from pipeline.decoder import checksum
from pipeline.names import printable, unprintable
from pipeline.pictures import Encoding, Rejected
from pipeline.sources.folder import scan
from pipeline.store import Store
from tests.images import encoded, make_folder, picture, pixels, psnr, read_picture
from tests.test_pictures import png_file, scan_bytes, write
from tools import convert, verify
from tools.converting import conversion, decoding
from train.command import run

ROOT = Path(__file__).parents[1]


def daae_convert(*words: object) -> int:
    workers = [] if "--workers" in words else ["--workers", "1"]
    return run(convert.main, [*map(str, words), *workers, "--quiet"])


def stored(store: Store, i: int) -> bytes:
    row = store.index[i]
    with open(store.shards[row["shard"]], "rb") as file:
        file.seek(int(row["offset"]))
        return file.read(int(row["size"]))


def names(store: Store) -> list[bytes]:
    return [unprintable(line) for line in (store.root / "names.txt").read_text().split("\n")[:-1]]


def content(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def left_beside(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_searched_at_any_depth_and_what_is_no_picture_is_counted(tmp_path):
    make_folder(tmp_path / "a/b/c", 2)
    make_folder(tmp_path, 1, first=7)
    make_folder(tmp_path / ".thumbnails", 1)
    make_folder(tmp_path / "__MACOSX", 1)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "no-extension").write_bytes(encoded(picture(9)))
    (tmp_path / "broken.PNG").write_text("hello")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "00007.jpg")
    listing = scan(tmp_path)
    assert {one.path for one in listing.files} == {
        b"a/b/c/00000.jpg", b"a/b/c/00001.jpg", b"00007.jpg", b"no-extension", b"broken.PNG", b"link.jpg"
    }  # fmt: skip
    assert listing.skipped == {
        "hidden": 2, "not images": 1, "not regular files": 1, "links to folders seen already": 1, "broken links": 1
    }  # fmt: skip


def test_the_order_is_shuffled_and_hangs_on_the_paths_alone(tmp_path):
    make_folder(tmp_path / "x", 40, classes=4)
    make_folder(tmp_path / "y", 40, classes=4, first=500)
    order = [one.path for one in scan(tmp_path / "x").files]
    assert order != sorted(order)
    classes = [path.split(b"/")[0] for path in order]
    assert len(set(classes[:12])) == 4
    (tmp_path / "x/class-0/00000.jpg").unlink()
    assert [one.path for one in scan(tmp_path / "x").files] == [p for p in order if p != b"class-0/00000.jpg"]


def test_the_digest_of_a_listing_follows_names_sizes_and_times(tmp_path):
    paths = make_folder(tmp_path, 3)
    before = scan(tmp_path).digest()
    assert scan(tmp_path).digest() == before
    os.utime(paths[0], ns=(1, 1))
    touched = scan(tmp_path).digest()
    paths[1].rename(tmp_path / "other.jpg")
    assert len({before, touched, scan(tmp_path).digest()}) == 3


@pytest.mark.parametrize(
    "name", [b"a b", b"new\nline", b"back\\slash\\n", b"caf\xc3\xa9", b"\xff\xfe", b"\\x41", b"tab\t\x7f"]
)
def test_any_name_is_printable_and_comes_back(name):
    assert printable(name).isprintable()
    assert unprintable(printable(name)) == name
    printable(name).encode("utf-8")


# -------------------------------------------------------------------------------------------------------- the store


needs_ffcv = pytest.mark.skipif(ffcv_writer.ffcv_missing() is not None, reason="FFCV is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """40 pictures of one size in 3 classes, PNG and JPEG, and what does not belong."""
    root = tmp_path_factory.mktemp("source") / "photographs"
    for i in range(40):
        folder = root / f"class {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if i % 2 else "JPEG"
        (folder / f"{i}.{kind.lower()}").write_bytes(encoded(picture(i, 80, 56), kind))
    (root / "notes.txt").write_text("not a picture")
    (root / "class 1" / "cut.jpg").write_bytes(encoded(picture(50))[:400])
    (root / "class 2" / "text.jpg").write_text("no picture either")
    return root


@pytest.fixture(scope="module")
def stores(source, tmp_path_factory) -> dict[str, Store]:
    """The same folder converted once for each choice of backends."""
    folder = tmp_path_factory.mktemp("stores")
    chosen = ("both", "dali") if ffcv_writer.ffcv_missing() else ("both", "dali", "ffcv")
    for name in chosen:
        assert daae_convert(source, folder / name, "--backends", name) == 0
    return {name: Store.open(folder / name) for name in chosen}


def test_the_manifest_tells_what_is_there(stores, source):
    store = stores["both"]
    manifest = store.manifest
    assert (store.count, manifest["bad"], manifest["skipped"]) == (40, 2, {"not images": 1})
    assert (store.max_height, store.max_width) == (56, 80)
    assert store.columns == {"class": ["class 0", "class 1", "class 2"]}
    assert manifest["source"]["files"] == 42
    assert manifest["source"]["listing"] == scan(source).digest()
    assert manifest["encode"]["quality"] == 90
    assert set(manifest["files"]) | {"manifest.json", "stats.json"} == left_beside(store.root)
    for name, facts in manifest["files"].items():
        data = (store.root / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"])


def test_every_stored_picture_is_its_source(stores, source):
    store = stores["both"]
    labels, classes = store.label("class")
    for i, name in enumerate(names(store)):
        original = (source / os.fsdecode(name)).read_bytes()
        jpeg = stored(store, i)
        assert psnr(pixels(jpeg), pixels(original)) > 33
        assert classes[labels[i]] == name.split(b"/")[0].decode()
        if name.endswith(b".jpeg"):
            assert scan_bytes(jpeg) == scan_bytes(original)


def test_bad_files_are_listed_with_their_reasons(stores):
    rows = [json.loads(line) for line in (stores["both"].root / "bad_files.jsonl").read_text().splitlines()]
    assert [(row["path"], row["bytes"]) for row in rows] == [("class 1/cut.jpg", 400), ("class 2/text.jpg", 17)]
    assert rows[0]["reason"].startswith("cannot be decoded: ")
    assert rows[1]["reason"] == "is no picture"


def test_converting_twice_gives_the_same_bytes(stores):
    one, two = stores["both"], stores["dali"]
    assert left_beside(one.root) - {"images.beton"} == left_beside(two.root)
    for name in left_beside(two.root) - {"stats.json", "manifest.json"}:
        assert (one.root / name).read_bytes() == (two.root / name).read_bytes(), name
    assert one.fingerprint == two.fingerprint
    differ = {key for key in one.manifest if one.manifest[key] != two.manifest[key]}
    assert differ <= {"files", "encode"}  # one of them names the FFCV file
    if "ffcv" in stores:
        assert (one.root / "images.beton").read_bytes() == (stores["ffcv"].root / "images.beton").read_bytes()


def test_shards_are_ustar_archives_and_the_index_points_into_them(stores):
    store = stores["both"]
    labels = store.labels[:, 0]
    with tarfile.open(store.shards[0]) as archive:
        members = archive.getmembers()
        assert [member.name for member in members[:4]] == [
            "000000000.jpg",
            "000000000.cls",
            "000000001.jpg",
            "000000001.cls",
        ]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
        lines = (store.root / "shard-00000.idx").read_text().splitlines()
        assert lines[0] == "v1.2 40"
        for i, line in enumerate(lines[1:]):
            jpg, cls = members[2 * i], members[2 * i + 1]
            words = ["jpg", jpg.offset_data, jpg.size, jpg.name, "cls", cls.offset_data, cls.size, cls.name]
            assert line == " ".join(map(str, words))
            assert store.index[i]["offset"] == jpg.offset_data
            data = content(archive, jpg)
            assert data == stored(store, i)
            assert data[:2] + data[-2:] == b"\xff\xd8\xff\xd9"
            assert content(archive, cls) == b"%06d" % labels[i]
    with open(store.shards[0], "rb") as file:
        assert file.read(512)[257:265] == b"ustar\x0000"
    assert store.shards[0].stat().st_size % 10240 == 0


def test_dalis_own_reader_takes_the_shards_and_indexes(stores):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    fn = pytest.importorskip("nvidia.dali.fn")
    store = stores["both"]

    @dali.pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def pipe():
        jpg, cls = fn.readers.webdataset(
            paths=[str(path) for path in store.shards],
            index_paths=[str(path.with_suffix(".idx")) for path in store.shards],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        return jpg, cls, fn.decoders.image(jpg, device="cpu")

    reader = pipe()
    reader.build()
    seen = 0
    for _ in range(3):
        jpgs, labels, decoded = reader.run()
        for jpg, label, image in zip(jpgs, labels, decoded, strict=True):
            if seen < store.count:
                assert np.asarray(jpg).tobytes() == stored(store, seen)
                assert int(np.asarray(label).tobytes()) == store.labels[seen, 0]
                assert np.abs(np.asarray(image).astype(int) - pixels(stored(store, seen))).mean() < 1
            seen += 1
    assert seen >= store.count


STOCK_FFCV = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.fields.basics import IntDecoder
loader = Loader(sys.argv[1], batch_size=8, num_workers=1, order=OrderOption.SEQUENTIAL,
                pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
images, labels = zip(*[(image.copy(), label.copy()) for image, label in loader])
np.savez(sys.argv[2], images=np.concatenate(images), labels=np.concatenate(labels))
"""


@needs_ffcv
def test_stock_ffcv_opens_the_file_and_sees_the_same_pictures(stores, tmp_path):
    store = stores["both"]
    words = [sys.executable, "-W", "ignore", "-c", STOCK_FFCV, str(store.beton), str(tmp_path / "seen.npz")]
    # Uncompiled, FFCV runs the same Python and the same C; compiling it takes ten seconds.
    subprocess.run(words, check=True, timeout=120, capture_output=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1"})
    seen = np.load(tmp_path / "seen.npz")
    assert np.array_equal(seen["labels"].ravel(), store.labels[:, 0])
    for i in range(store.count):
        # FFCV decodes with libjpeg's fast DCT, Pillow with the accurate one.
        assert psnr(seen["images"][i].astype(np.int16), pixels(stored(store, i))) > 35


@needs_ffcv
def test_the_ffcv_file_holds_the_very_bytes_of_the_shards(stores):
    store = stores["both"]
    assert store.beton is not None
    data = store.beton.read_bytes()
    for i, row in enumerate(ffcv_writer.move_index(store.beton, store.index)):
        assert data[row["offset"] : row["offset"] + row["size"]] == stored(store, i)


@needs_ffcv
def test_an_ffcv_only_store_is_read_like_any_other(stores):
    store = stores["ffcv"]
    assert not list(store.root.glob("shard-*"))
    assert store.shards == [store.beton]
    assert [stored(store, i) for i in range(40)] == [stored(stores["both"], i) for i in range(40)]


# ---------------------------------------------------------------------------------------------------- raw pixels


@pytest.fixture(scope="module")
def raw(source, tmp_path_factory) -> dict[str, Store]:
    """The same folder once more, for each choice of backends, without JPEG."""
    folder = tmp_path_factory.mktemp("raw")
    chosen = ("dali",) if ffcv_writer.ffcv_missing() else ("both", "dali", "ffcv")
    for name in chosen:
        assert daae_convert(source, folder / name, "--backends", name, "--pixels", "raw") == 0
    return {name: Store.open(folder / name) for name in chosen}


def test_raw_pixels_are_those_of_the_source_whatever_holds_them(raw, stores, source):
    for store in raw.values():
        assert store.raw
        assert names(store) == names(stores["dali"])
        assert np.array_equal(store.labels, stores["dali"].labels)
        for i, name in enumerate(names(store)):
            with Image.open(source / os.fsdecode(name)) as image:
                assert stored(store, i) == image.convert("RGB").tobytes()
            assert store.index["sum"][i] == checksum(stored(store, i))
        assert verify.main([str(store.root), "--workers", "1", "--quiet"]) == 0
    assert not stores["dali"].raw


def test_a_shard_of_raw_pixels_holds_files_that_everything_reads(raw):
    store = raw["dali"]
    with tarfile.open(store.shards[0]) as archive:
        members = archive.getmembers()
        assert [member.name for member in members[:3]] == ["000000000.ppm", "000000000.cls", "000000001.ppm"]
        lines = (store.root / "shard-00000.idx").read_text().splitlines()
        for i in range(store.count):
            file, cls = members[2 * i], members[2 * i + 1]
            with Image.open(io.BytesIO(content(archive, file))) as image:
                assert (image.format, image.mode, image.tobytes()) == ("PPM", "RGB", stored(store, i))
            words = ["ppm", file.offset_data, file.size, file.name, "cls", cls.offset_data, cls.size, cls.name]
            assert lines[1 + i] == " ".join(map(str, words))


@needs_ffcv
def test_stock_ffcv_sees_raw_pixels_to_the_bit(raw, tmp_path):
    store = raw["both"]
    words = [sys.executable, "-W", "ignore", "-c", STOCK_FFCV, str(store.beton), str(tmp_path / "seen.npz")]
    subprocess.run(words, check=True, timeout=120, capture_output=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1"})
    seen = np.load(tmp_path / "seen.npz")["images"]
    assert [picture.tobytes() for picture in seen] == [stored(store, i) for i in range(store.count)]


def test_large_raw_pictures_are_shrunk_and_larger_ones_refused(tmp_path, monkeypatch):
    upright = picture(3, 640, 480)
    path = write(tmp_path, encoded(upright, "PNG"))
    shrunk = read_picture(path, Encoding(pixels="raw"))
    assert (shrunk.height, shrunk.width, shrunk.kept) == (375, 500, False)
    assert shrunk.data == upright.resize((500, 375), Image.Resampling.LANCZOS).tobytes()
    monkeypatch.setattr(pictures, "MOST_RAW", 3 * 500 * 375 - 1)
    with pytest.raises(Rejected, match="is 500 x 375 pixels: too many to be stored raw, lower --max-side"):
        read_picture(path, Encoding(pixels="raw"))


def test_the_room_that_raw_pixels_want_is_told_from_their_sizes(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for i in range(12):
        write(tmp_path, encoded(picture(i, 1000, 500))).rename(tmp_path / f"in/{i}.jpg")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    words = (tmp_path / "in", tmp_path / "s", "--pixels", "raw", "--max-side", "500", "--backends")
    # 12 pictures of 500 x 250 pixels, 32 MiB to spare, and in shards 2 kB of each.
    said = fails(capsys, 5, *words, "dali")
    assert "the store needs about 38.1 MB. Free some, choose another disk, or lower --max-side.\n" in said
    if ffcv_writer.ffcv_missing() is None:
        said = fails(capsys, 5, *words, "both")
        assert "about 42.6 MB." in said
        assert "--backends dali, which keeps each picture once.\n" in said


def test_raw_pixels_have_no_quality_and_are_another_store(raw, source, tmp_path, capsys):
    for words in (("--quality", "80"), ("--chroma", "4:4:4")):
        assert "--pixels raw makes none" in fails(capsys, 2, source, tmp_path / "s", "--pixels", "raw", *words)
    said = fails(capsys, 2, source, raw["dali"].root, "--backends", "dali")
    assert "made with other settings (pixels raw -> jpeg)" in said


def test_a_plan_sets_raw_pixels_beside_jpegs(tmp_path, capsys):
    make_folder(tmp_path / "in", 12, 240)
    words = [str(tmp_path / "in"), "--plan", "--quiet", "--pixels", "raw", "--backends", "dali"]
    assert run(convert.main, [*words, "--json"]) == 0
    choices = json.loads(capsys.readouterr().out)["choices"]
    assert [one["pixels"] for one in choices] == ["jpeg", "jpeg", "jpeg", "raw"]
    assert choices[3]["bytes"] > 5 * choices[1]["bytes"]
    assert choices[3]["psnr"] == {"0.2": None, "1": None}  # nothing is lost
    assert run(convert.main, words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].startswith("--max-side 500 *    raw ")
    assert not any("*" in line for line in lines[2:5])
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali", "--pixels", "raw") == 0
    shards = sum(path.stat().st_size for path in (tmp_path / "s").glob("shard-*.tar"))
    assert choices[3]["bytes"] == pytest.approx(shards, rel=0.05, abs=20_000)


def test_shards_are_split_by_size(tmp_path):
    source = tmp_path / "noise"
    source.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (500, 500, 3), dtype=np.uint8)
        (source / f"{i}.jpg").write_bytes(encoded(Image.fromarray(noise), quality=100))
    assert daae_convert(source, tmp_path / "store", "--backends", "dali", "--shard-mb", 1) == 0
    store = Store.open(tmp_path / "store")
    assert len(store.shards) == 3
    assert all(path.stat().st_size <= 1 << 20 for path in store.shards)
    for i, name in enumerate(names(store)):
        assert scan_bytes(stored(store, i)) == scan_bytes((source / os.fsdecode(name)).read_bytes())


def test_pictures_without_folders_have_no_labels(tmp_path):
    make_folder(tmp_path / "flat", 3)
    assert daae_convert(tmp_path / "flat", tmp_path / "store", "--backends", "dali") == 0
    store = Store.open(tmp_path / "store")
    assert (store.columns, store.labels.shape) == ({}, (3, 0))
    with tarfile.open(store.shards[0]) as archive:
        assert content(archive, "000000000.cls") == b"-00001"


def test_labels_come_from_a_table_where_there_is_one(tmp_path):
    make_folder(tmp_path / "in", 4, classes=2)
    odd = tmp_path / "in" / os.fsdecode(b"od\xffd\n,name.jpg")
    odd.write_bytes(encoded(picture(8)))
    with open(tmp_path / "in/labels.csv", "w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([
            ["path", "animal", "size"],
            ["class-0/00000.jpg", "dog", "large"],
            ["./class-1/00001.jpg", "cat", ""],
            [os.path.basename(odd), "ant", "tiny"],
            ["missing.jpg", "emu", "huge"],
        ])  # fmt: skip
    assert daae_convert(tmp_path / "in", tmp_path / "store", "--backends", "dali") == 0
    store = Store.open(tmp_path / "store")
    assert store.columns == {"animal": ["ant", "cat", "dog"], "size": ["large", "tiny"]}
    assert store.manifest["skipped"] == {"not images": 1}
    assert dict(zip(names(store), store.labels.tolist(), strict=True)) == {
        b"class-0/00000.jpg": [2, 0],
        b"class-1/00001.jpg": [1, -1],
        b"class-0/00002.jpg": [-1, -1],
        b"class-1/00003.jpg": [-1, -1],
        b"od\xffd\n,name.jpg": [0, 1],
    }


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("name,class\na.jpg,x\n", "must begin with the line"),
        ("path,class\n00000.jpg,x,y\n", "line 2: 3 cells, but the first line has 2"),
        ("path,class\n00000.jpg,x\n./00000.jpg,y\n", "line 3: ./00000.jpg has had other labels before"),
    ],
)
def test_a_label_table_that_cannot_be_understood_is_refused(tmp_path, capsys, table, complaint):
    make_folder(tmp_path / "in", 2)
    (tmp_path / "in/labels.csv").write_text(table)
    assert daae_convert(tmp_path / "in", tmp_path / "store", "--backends", "dali") == 3
    assert complaint in capsys.readouterr().err
    assert left_beside(tmp_path) == {"in"}


# ------------------------------------------------------------------------------------------------------ wrong input


def fails(capsys, code: int, *words: object) -> str:
    """Run, expect an exit code and one sentence on stderr and nothing on stdout; returns the sentence."""
    assert daae_convert(*words) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_folders_without_pictures_end_in_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert (
        fails(capsys, 3, tmp_path / "empty", tmp_path / "s")
        == f"error: {tmp_path}/empty has no images (looked at 0 files).\n"
    )
    for i in range(12):
        (tmp_path / "empty" / f"notes{i:02}.txt").write_text("hello")
    assert fails(capsys, 3, tmp_path / "empty", tmp_path / "s") == (
        f"error: {tmp_path}/empty has no images (looked at 12 files: 12 not images, e.g. notes00.txt).\n"
    )
    assert "does not exist" in fails(capsys, 3, tmp_path / "nowhere", tmp_path / "s")
    assert "is not a folder" in fails(capsys, 3, tmp_path / "empty/notes00.txt", tmp_path / "s")
    assert left_beside(tmp_path) == {"empty"}


def test_a_folder_of_bad_files_only_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"")
    said = fails(capsys, 3, tmp_path / "in", tmp_path / "s", "--backends", "dali")
    assert "has no readable images (looked at 1 files: 1 bad, e.g. a.jpg is empty (0 bytes)). See " in said
    assert left_beside(tmp_path) == {"in", "s.bad_files.jsonl"}


def test_bad_files_beyond_the_tolerance_refuse_the_folder_and_are_all_listed(tmp_path, capsys):
    make_folder(tmp_path / "in", 20)
    for i in range(11):
        (tmp_path / f"in/bad{i}.jpg").write_bytes(b"x")
    said = fails(capsys, 3, tmp_path / "in", tmp_path / "s", "--backends", "dali")
    assert "has 11 bad files of 31, e.g. bad0.jpg is no picture; --max-bad 0.001 tolerates 10" in said
    assert left_beside(tmp_path) == {"in", "s.bad_files.jsonl"}
    assert len((tmp_path / "s.bad_files.jsonl").read_text().splitlines()) == 11
    (tmp_path / "in/bad10.jpg").unlink()
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    assert left_beside(tmp_path) == {"in", "s"}  # the complaint of before is gone
    assert Store.open(tmp_path / "s").manifest["bad"] == 10
    assert "has 10 bad files" in fails(
        capsys_reset(capsys), 3, tmp_path / "in", tmp_path / "t", "--max-bad", 0, "--backends", "dali"
    )


def capsys_reset(capsys):
    capsys.readouterr()
    return capsys


def test_none_bad_is_tolerated_with_max_bad_0(tmp_path, capsys):
    make_folder(tmp_path / "in", 3)
    (tmp_path / "in/bad.jpg").write_bytes(b"x")
    assert "--max-bad 0 tolerates 0" in fails(
        capsys, 3, tmp_path / "in", tmp_path / "s", "--max-bad", 0, "--backends", "dali"
    )


def test_what_c_libraries_say_about_damaged_files_stays_off_the_screen(tmp_path, capfd):
    make_folder(tmp_path / "in", 2)
    tiff = bytearray(encoded(picture(0), "TIFF", compression="tiff_lzw"))
    tiff[200:400] = np.random.default_rng(0).bytes(200)
    (tmp_path / "in/damaged.tif").write_bytes(tiff)
    with contextlib.suppress(Rejected):
        read_picture(tmp_path / "in/damaged.tif", Encoding())
    assert "tempfile.tif" in capfd.readouterr().err  # libtiff, here and now
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    assert capfd.readouterr().err == ""


def test_an_unreadable_folder_inside_is_a_bad_file(tmp_path, monkeypatch):
    make_folder(tmp_path / "in/open", 2)
    make_folder(tmp_path / "in/shut", 2)
    genuine = os.scandir

    def scandir(path):
        if os.fsencode(path).endswith(b"shut"):
            raise PermissionError(13, "Permission denied", path)
        return genuine(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    assert (tmp_path / "s/bad_files.jsonl").read_text() == (
        '{"path": "shut/", "reason": "cannot be read: Permission denied", "bytes": 0}\n'
    )


def test_the_same_conversion_again_has_nothing_to_do_and_another_is_refused(tmp_path, capsys):
    paths = make_folder(tmp_path / "in", 3)
    words = (tmp_path / "in", tmp_path / "s", "--backends", "dali")
    assert daae_convert(*words) == 0
    before = (tmp_path / "s/manifest.json").stat()
    capsys.readouterr()
    assert daae_convert(*words) == 0
    assert capsys.readouterr().out == f"{tmp_path}/s already holds these 3 images: nothing to do.\n"
    assert (tmp_path / "s/manifest.json").stat().st_mtime_ns == before.st_mtime_ns
    assert "other settings (quality 90 -> 80)" in fails(capsys, 2, *words, "--quality", 80)
    paths[0].unlink()
    assert "store of other files" in fails(capsys, 2, *words)
    assert daae_convert(*words, "--overwrite") == 0
    assert Store.open(tmp_path / "s").count == 2
    assert left_beside(tmp_path) == {"in", "s"}
    os.truncate(tmp_path / "s/shard-00000.tar", 1000)
    capsys.readouterr()
    assert "damaged store" in fails(capsys, 2, *words)


def test_nothing_but_a_store_is_ever_replaced(tmp_path, capsys):
    make_folder(tmp_path / "in", 2)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    assert "is not a store" in fails(capsys, 2, tmp_path / "in", tmp_path / "home", "--overwrite")
    assert "inside each other" in fails(capsys, 2, tmp_path / "in", tmp_path / "in/store")
    assert "inside each other" in fails(capsys, 2, tmp_path / "in", tmp_path, "--overwrite")
    assert left_beside(tmp_path / "home") == {"thesis.tex"}
    assert len(left_beside(tmp_path / "in")) == 2


def test_a_store_is_not_written_to_a_url(tmp_path, capsys):
    make_folder(tmp_path / "in", 2)
    for source in (tmp_path / "in", "s3://bucket/in.tar"):
        assert fails(capsys, 2, source, "s3://bucket/store") == (
            "error: DST s3://bucket/store is a URL, and a store is written to a disk. Give a folder, and copy it "
            "afterwards.\n"
        )


@pytest.mark.parametrize(
    "words", [("--quality", 0), ("--max-side", 4), ("--max-bad", 2), ("--workers", -1), ("--shard-mb", 0)]
)
def test_values_out_of_range_are_refused(tmp_path, capsys, words):
    said = fails(capsys, 2, tmp_path / "in", tmp_path / "s", *words)
    assert f"{words[0]} is from " in said


def test_json_is_one_object(tmp_path, capsys):
    make_folder(tmp_path / "in", 4, classes=2)
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["bad"], result["columns"], result["backends"]) == (4, 0, {"class": 2}, ["dali"])
    assert result["bytes"] == sum(facts["bytes"] for facts in Store.open(tmp_path / "s").manifest["files"].values())


def test_folders_that_are_splits_and_no_classes_are_said(tmp_path, capsys):
    make_folder(tmp_path / "in", 4, classes=2)
    for split, folder in zip(
        ("train", "val"), sorted(each for each in (tmp_path / "in").iterdir() if each.is_dir()), strict=True
    ):
        folder.rename(tmp_path / "in" / split)
    assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].strip() == (
        "The classes train and val look like splits: convert each of these folders into a store of its own."
    )


def test_without_ffcv_shards_are_written_unless_ffcv_was_asked_for(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "in", 2)
    genuine = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "ffcv" else genuine(name, *rest)
    )
    assert "ffcv is not installed. Run `make setup`" in fails(
        capsys, 5, tmp_path / "in", tmp_path / "s", "--backends", "ffcv"
    )
    assert daae_convert(tmp_path / "in", tmp_path / "s") == 0
    assert capsys.readouterr().err == "note: FFCV is not there (ffcv is not installed); writing tar shards only.\n"
    assert Store.open(tmp_path / "s").beton is None


def test_a_disk_that_is_too_small_is_seen_before_any_work(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "in", 2)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "0.0 MB free, the store needs about" in fails(capsys, 5, tmp_path / "in", tmp_path / "s")
    assert left_beside(tmp_path) == {"in"}


def test_a_plan_foretells_the_size_and_writes_nothing(tmp_path, capsys):
    make_folder(tmp_path / "in", 30, 240, classes=3)
    (tmp_path / "in/class-0/bad.jpg").write_text("no picture")
    for source in (tmp_path / "in", archive_of(tmp_path / "in", tmp_path / "a.tar.gz")):
        words = [str(source), "--plan", "--json", "--quiet", "--max-side", "128", "--backends", "dali"]
        assert run(convert.main, words) == 0
        planned = json.loads(capsys.readouterr().out)
        assert (planned["images"], planned["sampled"], planned["bad"]) == (31, 31, 1)
        assert [(one["max_side"], one["quality"]) for one in planned["choices"]] == [
            (None, 90), (500, 90), (400, 85), (128, 90)
        ]  # fmt: skip
    assert left_beside(tmp_path) == {"in", "a.tar.gz"}
    kept, usual, _, asked = planned["choices"]
    assert usual == kept | {key: usual[key] for key in ("max_side", "seconds", "load_images_per_second")}
    assert (kept["kept"], asked["kept"]) == (1.0, 0.0)
    # A crop of a fifth of 128 px is blown up fourfold; of pictures that stay as they are nothing is lost.
    assert kept["psnr"] == usual["psnr"] == {"0.2": None, "1": None}
    assert 15 < asked["psnr"]["0.2"] < asked["psnr"]["1"] < 45
    # A picture of 128 px is cheaper to load than one of 300, and dearer to make than one that is left alone.
    assert asked["load_images_per_second"] > 1.2 * kept["load_images_per_second"]
    assert asked["seconds"] >= kept["seconds"]
    for one, words in ((usual, ()), (asked, ("--max-side", 128))):
        assert daae_convert(tmp_path / "in", tmp_path / "s", "--backends", "dali", "--overwrite", *words) == 0
        shards = sum(path.stat().st_size for path in (tmp_path / "s").glob("shard-*.tar"))
        assert one["bytes"] == pytest.approx(shards, rel=0.05, abs=20_000)
    capsys.readouterr()
    assert run(convert.main, [str(tmp_path / "in"), str(tmp_path / "t"), "--plan"]) == 0
    said = capsys.readouterr()
    assert said.err == "looking at 31 pictures …\n"
    lines = said.out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/in: 31 images, ")
    assert [line[:20].strip() for line in lines[2:5]] == ["sides as they are", "--max-side 500 *", "--max-side 400"]
    assert not (tmp_path / "t").exists()


def test_a_plan_counts_for_each_choice_what_that_one_rejects(tmp_path, capsys):
    paths = make_folder(tmp_path / "in", 3, 64)
    (tmp_path / "in/strip.png").write_bytes(encoded(picture(9, 1000, 9), "PNG"))  # too narrow once it is shrunk
    words = [str(tmp_path / "in"), "--plan", "--quiet"]
    assert run(convert.main, [*words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["sampled"], planned["bad"]) == (4, 0)
    assert [one["bad"] for one in planned["choices"]] == [0, 1, 1]
    assert [one["kept"] for one in planned["choices"]] == [0.75, 1.0, 1.0]
    assert planned["choices"][0]["bytes"] > planned["choices"][1]["bytes"]
    for path in paths:
        path.unlink()
    assert run(convert.main, words) == 0
    lines = capsys.readouterr().out.splitlines()[2:5]
    assert [line.endswith("none left") for line in lines] == [False, True, True]
    (tmp_path / "in/strip.png").write_text("no picture")
    assert run(convert.main, words) == 3
    assert "none of 1 pictures looked at is readable, e.g. is no picture" in capsys.readouterr().err


def archive_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "")
    return path


def test_without_a_destination_only_a_plan_can_be_made(tmp_path, capsys):
    make_folder(tmp_path / "in", 2)
    assert run(convert.main, [str(tmp_path / "in")]) == 2
    assert capsys.readouterr().err == "error: DST is missing: daae convert SRC DST.\n"


def test_names_and_files_of_every_odd_kind_end_in_the_store_or_in_the_list(tmp_path):
    root = tmp_path / "in"
    good = [b"a" * 251 + b".jpg", b"new\nline.jpg", b"\xff\xfe.jpg", b"no picture's name"]
    (root / "x").mkdir(parents=True)
    for i, name in enumerate(good):
        (root / "x" / os.fsdecode(name)).write_bytes(encoded(picture(i, 40, 30)))
    (root / "x/loop").symlink_to(root)
    (root / "x/self.jpg").symlink_to("self.jpg")
    os.mkfifo(root / "x/pipe.jpg")
    bad = {
        "bomb.png": png_file(30000, 30000, zlib.compress(bytes(1000))),
        "empty.jpg": b"",
        "heic.jpg": b"\0\0\0\x18ftypheic" + bytes(40),
        "pdf.jpg": b"%PDF-1.7 ...",
    }
    for name, data in bad.items():
        (root / "x" / name).write_bytes(data)
    assert daae_convert(root, tmp_path / "s", "--backends", "dali") == 0
    store = Store.open(tmp_path / "s")
    assert set(names(store)) == {b"x/" + name for name in good}
    assert store.manifest["skipped"] == {
        "broken links": 1, "links to folders seen already": 1, "not regular files": 1
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "s/bad_files.jsonl").read_text().splitlines()]
    assert [(row["path"], row["reason"]) for row in rows] == [
        ("x/bomb.png", "is 30000 x 30000 pixels, over --max-pixels 100000000: not decoded"),
        ("x/empty.jpg", "is empty (0 bytes)"),
        ("x/heic.jpg", "is HEIC, which cannot be read here: convert it to JPEG first"),
        ("x/pdf.jpg", "is no picture but PDF"),
    ]


def test_more_workers_than_cores_are_noted_and_work(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "in", 2)
    monkeypatch.setattr(decoding, "usable_cores", lambda: 1.5)
    words = [str(tmp_path / "in"), str(tmp_path / "s"), "--backends", "dali", "--workers", "3"]
    assert run(convert.main, words) == 0
    assert capsys.readouterr().err == (
        "note: --workers 3, but this process may use 1 cores: more will not be faster.\n"
    )
