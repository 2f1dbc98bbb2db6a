"""Sources: every kind lists the same pictures and labels, and nothing hostile in an archive is followed."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from pipeline.errors import DataError, ResourceError, UsageError
from pipeline.names import printable
from pipeline.pictures import Encoding, Rejected, Stored
from pipeline.sources.archives import ArchiveReader, ArchiveSource, looks_like_webdataset, plain_label
from pipeline.sources.entries import Entries, Listing
from pipeline.sources.imagenet import DEVKIT
from pipeline.sources.source import Choice, Source, open_source, try_entry
from pipeline.sources.spool import Spool
from pipeline.sources.tables import Columns, ParquetSource, Row
from pipeline.sources.volumes import Volume, find_volumes
from pipeline.store import Store
from pipeline.unfinished import Unfinished
from tests.images import encoded, make_folder, picture
from tests.test_handles import open_below
from tools import convert
from train.command import run

LARGEST = 1 << 20
TarMode = Literal["w", "w:gz", "w:xz"]
TAR_MODES: dict[str, TarMode] = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz", "memory": "w"}


def opened(name: object, **choice) -> Source:
    return open_source(str(name), Choice(**choice), largest=LARGEST)


@contextlib.contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """The block allocates less at any time, as far as Python knows."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def content(source: Source, spool: Path) -> tuple[dict[bytes, tuple[bytes | str, list[str]]], Listing]:
    """Path -> bytes, or why there are none, and the names of its labels; and the listing."""
    listing = source.listing(spool)
    reader, found = source.reader(spool), {}
    for place, entry in enumerate(listing.files):
        try:
            data: bytes | str = reader.read(entry, LARGEST)
        except Rejected as reason:
            data = str(reason)
        row = listing.labels.table[place]
        names = [
            classes[at] if at >= 0 else "" for at, classes in zip(row, listing.labels.columns.values(), strict=True)
        ]
        found[entry.path] = data, names
    return found, listing


ODD_NAMES = [b"new\nline.jpg", b"not-utf8-\xff\xfe.jpg", b"caf\xc3\xa9, 1.jpg", b"x" * 251 + b".jpg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """12 pictures in 3 classes, odd names, a picture without an extension and what is no picture."""
    root = tmp_path_factory.mktemp("sources") / "photographs"
    make_folder(root, 12, 48, classes=3)
    for i, name in enumerate(ODD_NAMES):
        (root / "class-0" / os.fsdecode(name)).write_bytes(encoded(picture(20 + i, 40, 40)))
    (root / "class-1/no-extension").write_bytes(encoded(picture(30, 40, 40), "PNG"))
    (root / "class-1/.hidden.jpg").write_bytes(b"hidden")
    (root / "notes.txt").write_text("not a picture")
    return root


def tarred(folder: Path, path: Path, mode: TarMode = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        archive.add(folder, "")
    return path


def zipped(folder: Path, path: Path) -> Path:
    """zipfile writes no names that are not UTF-8."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and b"\xff" not in os.fsencode(file):
                archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz", "memory", "zip", "memory zip"])
def test_an_archive_of_a_folder_lists_what_the_folder_lists(folder, tmp_path, kind):
    expected, reference = content(opened(folder), tmp_path / "unused")
    if kind.endswith("zip"):
        path = zipped(folder, tmp_path / "a.zip")
        expected = {name: value for name, value in expected.items() if b"\xff" not in name}
    else:
        path = tarred(folder, tmp_path / f"a.{kind}", TAR_MODES[kind])
    name = str(path)
    if kind.startswith("memory"):
        fsspec = pytest.importorskip("fsspec")
        name = f"memory://{tmp_path.name}/{path.name}"
        fsspec.filesystem("memory").pipe(name, path.read_bytes())
    found, listing = content(opened(name), tmp_path / "spool")
    assert found == expected
    assert list(listing.files.paths()) == [one for one in reference.files.paths() if one in expected]
    assert listing.skipped == reference.skipped
    assert listing.labels.columns == {"class": ["class-0", "class-1", "class-2"]}
    # What can be read where it lies is not copied.
    assert (tmp_path / "spool").exists() == (kind not in ("tar", "zip"))


def test_the_store_of_an_archive_is_the_store_of_the_folder(folder, tmp_path):
    archive = tarred(folder, tmp_path / "a.tar.gz", "w:gz")
    for source, store in ((folder, "x"), (archive, "y")):
        words = [str(source), str(tmp_path / store), "--backends", "dali", "--workers", "1", "--quiet"]
        assert run(convert.main, words) == 0
    for name in ("shard-00000.tar", "shard-00000.idx", "index.npy", "labels.npy", "names.txt", "bad_files.jsonl"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    assert {printable(b"class-0/" + name) for name in ODD_NAMES} <= set(
        (tmp_path / "y/names.txt").read_text().split("\n")
    )
    assert {path.name for path in (tmp_path / "x").iterdir()} == {path.name for path in (tmp_path / "y").iterdir()}
    assert Store.open(tmp_path / "x").fingerprint == Store.open(tmp_path / "y").fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "x", "y"]


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: TarMode = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("when", ["inf", "nan", "1.7e12", "-5"])
def test_a_time_that_is_none_is_no_reason_to_refuse_an_archive(tmp_path, when):
    jpeg = encoded(picture(1, 32, 32))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, at in (("a/1.jpg", when), ("a/2.jpg", "1e9")):
            info, content = member(name, jpeg, pax_headers={"mtime": at})
            archive.addfile(info, io.BytesIO(content))
    listing = opened(tmp_path / "a.tar").listing(tmp_path / "spool")
    assert {entry.path for entry in listing.files} == {b"a/1.jpg", b"a/2.jpg"}
    assert listing.unreadable == []


def test_a_size_that_no_file_can_have_is_a_damaged_archive(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 64
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match="it has a file of 18,446,744,073,709,551,616 bytes"):
        opened(tmp_path / "a.tar").listing(tmp_path / "spool")


def test_a_protocol_that_fails_on_reading_is_a_sentence(monkeypatch):
    class Refused(io.BytesIO):
        def read(self, size=-1):
            raise RuntimeError("403, message='Forbidden'")  # as aiohttp's errors are

    volume = Volume("https://example.org/a.tar", 10, "")
    monkeypatch.setattr(Volume, "_open", lambda self: Refused())
    with pytest.raises(DataError, match=r"https://example\.org/a\.tar cannot be read: 403, message='Forbidden'\."):
        volume.head()
    with pytest.raises(DataError, match="403"):
        looks_like_webdataset(volume)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_nothing_that_leads_out_of_a_tar_archive_is_followed(tmp_path, mode):
    jpeg = encoded(picture(1, 32, 32))
    (tmp_path / "secret.jpg").write_bytes(jpeg)
    path = write_tar(
        tmp_path / ("a.tar" if mode == "w" else "a.tar.gz"),
        [
            member("good/1.jpg", jpeg),
            member("../x.jpg", jpeg),
            member("good/../../y.jpg", jpeg),
            member(str(tmp_path / "z.jpg"), jpeg),
            member("good/link.jpg", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.jpg")),
            member("good/hard.jpg", type=tarfile.LNKTYPE, linkname="good/1.jpg"),
            member("good/pipe.jpg", type=tarfile.FIFOTYPE),
            member("good/disk.jpg", type=tarfile.BLKTYPE, devmajor=8),
            member("good/empty.jpg"),
            member("good/huge.jpg", bytes(LARGEST + 1)),
            member("good/1.jpg", jpeg + b"later"),
        ],
        mode,
    )
    before = sorted(tmp_path.iterdir())
    found, listing = content(opened(path), tmp_path / "spool")
    assert found == {
        b"good/1.jpg": (jpeg + b"later", ["good"]),
        b"good/empty.jpg": ("is empty (0 bytes)", ["good"]),
        b"good/huge.jpg": ("is too large a file (1,048,577 bytes)", ["good"]),
    }
    assert listing.skipped == {
        "names that lead out of the archive": 3, "links": 2, "not regular files": 2,
        "replaced by a later file of the same name": 1,
    }  # fmt: skip
    (tmp_path / "spool").unlink(missing_ok=True)
    assert sorted(tmp_path.iterdir()) == before


def test_hostile_zip_members_are_counted_and_a_bomb_is_not_inflated(tmp_path):
    jpeg = encoded(picture(1, 32, 32))
    link = zipfile.ZipInfo("a/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.jpg", jpeg)
        archive.writestr("../x.jpg", jpeg)
        archive.writestr("/y.jpg", jpeg)
        archive.writestr(link, "/etc/passwd")
        archive.writestr("a/bomb.jpg", bytes(200 << 20))
        archive.writestr("a/flipped.jpg", jpeg, compress_type=zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.rindex(jpeg) + 200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with memory_below(4 << 20):
        found, listing = content(opened(tmp_path / "a.zip"), tmp_path / "spool")
    assert found[b"a/1.jpg"] == (jpeg, ["a"])
    assert found[b"a/bomb.jpg"][0] == "is too large a file (209,715,200 bytes)"
    assert str(found[b"a/flipped.jpg"][0]).startswith("cannot be read: Bad CRC-32")
    assert listing.skipped == {"names that lead out of the archive": 2, "links": 1}


def test_a_zip_whose_directory_lies_about_the_size_gives_no_more_than_it_claims(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/bomb.jpg", bytes(64 << 20))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 1000)  # the size it says it inflates to
    (tmp_path / "a.zip").write_bytes(data)
    source = opened(tmp_path / "a.zip")
    (entry,) = source.listing(tmp_path / "spool").files
    reader = source.reader(tmp_path / "spool")
    with memory_below(4 << 20):
        assert isinstance(try_entry(entry, (reader, Encoding())), str)


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.comment = b"a comment"
        for name, data in members.items():
            archive.writestr(name, data)
    return path


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wide", [False, True])
def test_zip_archives_of_every_make_are_read(tmp_path, monkeypatch, method, wide):
    """With a comment behind it, and with sizes and offsets of 64 bits."""
    if wide:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    jpegs = [encoded(picture(i, 32, 32)) for i in range(3)]
    members = {f"a/caf\xe9 {i}.jpg": data for i, data in enumerate(jpegs)}
    path = write_zip(tmp_path / "a.zip", members, method)
    assert (b"PK\6\6" in path.read_bytes()) == wide
    found, listing = content(opened(path), tmp_path / "spool")
    assert found == {name.encode(): (data, ["a"]) for name, data in members.items()}
    assert listing.unreadable == []


def test_a_member_that_is_no_utf8_or_lies_elsewhere_or_is_packed_oddly_costs_itself_alone(tmp_path):
    jpeg = encoded(picture(1, 32, 32))
    path = write_zip(tmp_path / "a.zip", dict.fromkeys(("a/1.jpg", "a/\xff\xfe.jpg", "a/3.jpg", "a/4.jpg"), jpeg))
    data = bytearray(path.read_bytes())
    data[:] = data.replace("\xff\xfe".encode(), b"\xff\xfe\xfd\xfc")  # still said to be UTF-8
    third, fourth = data.rindex(b"a/3.jpg") - 46, data.rindex(b"a/4.jpg") - 46
    data[third + 42 : third + 46] = struct.pack("<I", 1 << 31)
    data[fourth + 10 : fourth + 12] = struct.pack("<H", 9)
    path.write_bytes(data)
    found, _ = content(opened(path), tmp_path / "spool")
    assert found == {
        b"a/1.jpg": (jpeg, ["a"]), b"a/\xff\xfe\xfd\xfc.jpg": (jpeg, ["a"]),
        b"a/3.jpg": ("cannot be read: it does not lie where the directory says", ["a"]),
        b"a/4.jpg": ("cannot be read: That compression method is not supported", ["a"]),
    }  # fmt: skip


def test_a_member_of_a_zip_costs_what_an_entry_costs(tmp_path):
    """Neither the listing nor a worker holds the directory: `zipfile` takes 500 bytes a member, in each of them."""
    names = [f"class-{i % 10}/picture-{i:08d}-{'x' * 200}.jpeg" for i in range(6000)]
    path = write_zip(tmp_path / "a.zip", dict.fromkeys(names, b"1"))
    source = opened(path)
    with memory_below(len(names) * (len(names[0]) + 200) + (2 << 20)):  # and a block of the directory
        files = source.listing(tmp_path / "spool").files
    assert len(files) == len(names)
    reader = source.reader(tmp_path / "spool")
    with memory_below(1 << 20):
        assert all(reader.read(files[place], LARGEST) == b"1" for place in (0, 2999, 5999))


def test_damaged_zip_archives_end_as_pictures_or_reasons_and_never_otherwise(tmp_path):
    jpeg = encoded(picture(1, 16, 16), quality=50)
    members = {f"a/{i}.jpg": jpeg for i in range(3)}
    wholes = [write_zip(tmp_path / "a.zip", members, method).read_bytes() for method in METHODS]
    random, ends = np.random.default_rng(0), set()
    for turn in range(400):
        data = bytearray(wholes[turn % 4])
        for at in random.integers(0 if turn % 3 else data.index(b"PK\1\2"), len(data), 3):
            data[at] = random.integers(256)
        if turn % 10 == 0:
            del data[random.integers(1, len(data)) :]
        (tmp_path / "a.zip").write_bytes(data)
        (tmp_path / "spool").unlink(missing_ok=True)
        try:
            found, listing = content(opened(tmp_path / "a.zip", kind="archive"), tmp_path / "spool")
            ends |= {"whole" if value == jpeg else "a reason" for value, _ in found.values()}
            ends |= {"unreadable" for _ in listing.unreadable}
        except DataError:
            ends.add("refused")
    assert ends == {"whole", "a reason", "unreadable", "refused"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_a_cut_archive_still_holds_is_used_and_the_cut_is_listed(tmp_path, mode):
    noise = [np.random.default_rng(i).bytes(20_000) for i in range(4)]
    path = write_tar(tmp_path / "a.tar", [member(f"a/{i}.jpg", data) for i, data in enumerate(noise)], mode)
    os.truncate(path, path.stat().st_size * 2 // 3)
    found, listing = content(opened(path), tmp_path / "spool")
    assert {found[b"a/%d.jpg" % i][0] for i in (0, 1)} == set(noise[:2])
    assert len(found) == 2 or str(found[b"a/2.jpg"][0]).startswith("is cut off: the archive ends ")
    assert [path for path, _ in listing.unreadable] == [b"a.tar"]


MEMBER = 512 + 5120  # bytes in an archive of the 5,000 that each of these holds


def four_members(tmp_path: Path) -> tuple[bytearray, dict[bytes, tuple[bytes, list[str]]]]:
    """An archive, and what is in it."""
    noise = [np.random.default_rng(i).bytes(5000) for i in range(4)]
    path = write_tar(tmp_path / "whole.tar", [member(f"a/{i}.jpg", data) for i, data in enumerate(noise)])
    return bytearray(path.read_bytes()), {b"a/%d.jpg" % i: (data, ["a"]) for i, data in enumerate(noise)}


def write_as(path: Path, data: bytes, mode: str) -> Path:
    path.write_bytes(data if mode == "w" else gzip.compress(data, 1))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    ("damage", "words"), [("a flipped bit", "bad checksum"), ("a cut", "truncated header"), ("text", "bad checksum")]
)
def test_a_damaged_header_lists_the_archive_and_what_comes_before_it_is_used(tmp_path, mode, damage, words):
    """`tarfile` itself takes such a header for the end, without a word."""
    data, expected = four_members(tmp_path)
    if damage == "a cut":
        del data[2 * MEMBER + 100 :]
    elif damage == "text":
        data[2 * MEMBER : 2 * MEMBER + 512] = b"-" * 148 + b"0000000\0" + b"-" * 356
    else:
        data[2 * MEMBER] ^= 1
    found, listing = content(opened(write_as(tmp_path / "a.tar", data, mode)), tmp_path / "spool")
    assert found == {name: expected[name] for name in (b"a/0.jpg", b"a/1.jpg")}
    assert listing.unreadable == [(b"a.tar", f"cannot be read: {words} at byte 11,264, and what follows is lost")]
    assert listing.skipped == {}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_size_below_nothing_does_not_lead_back(tmp_path, mode):
    data, expected = four_members(tmp_path)
    back = tarfile.TarInfo("a/back.jpg")
    back.size = -1024
    data[MEMBER : MEMBER + 512] = back.tobuf(tarfile.GNU_FORMAT)
    found, listing = content(opened(write_as(tmp_path / "a.tar", data, mode)), tmp_path / "spool")
    assert found == {b"a/0.jpg": expected[b"a/0.jpg"]}
    ((_, why),) = listing.unreadable
    assert "it has a file of -1,024 bytes" in why or "invalid offset" in why  # what a newer tarfile says


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_without_an_end_mark_is_read_and_counted(tmp_path, mode):
    """As streamed ones often are; a cut between two files cannot be told from it."""
    data, expected = four_members(tmp_path)
    found, listing = content(opened(write_as(tmp_path / "a.tar", data[: 4 * MEMBER], mode)), tmp_path / "spool")
    assert found == expected
    assert listing.unreadable == []
    assert listing.skipped == {"archives without an end mark (cut off?)": 1}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_claims_a_gigabyte_is_not_read(tmp_path, mode, kind):
    jpeg = encoded(picture(1, 32, 32))
    bomb = tarfile.TarInfo("long")
    bomb.type, bomb.size = kind, 300 << 20
    path = write_tar(tmp_path / "a.tar", [member("a/1.jpg", jpeg)])
    data = path.read_bytes()[: -(-len(jpeg) // 512) * 512 + 512] + bomb.tobuf(tarfile.USTAR_FORMAT) + bytes(300 << 20)
    path.write_bytes(data if mode == "w" else gzip.compress(data, 1))
    del data
    with memory_below(32 << 20):
        found, listing = content(opened(path), tmp_path / "spool")
    assert found == {b"a/1.jpg": (jpeg, ["a"])}
    assert listing.unreadable == [(b"a.tar", "cannot be read: it has a header of 314,572,800 bytes")]


def test_an_archive_that_is_none_ends_in_a_sentence(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"hello" * 400)
    with pytest.raises(DataError, match="is not a folder, nor a tar, zip or Parquet file"):
        opened(tmp_path / "a.tar")
    with pytest.raises(DataError, match="is neither a tar nor a zip archive"):
        opened(tmp_path / "a.tar", kind="archive").listing(tmp_path / "spool")
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"b\.tar\.gz cannot be read: "):
        opened(tmp_path / "b.tar.gz").listing(tmp_path / "spool")
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "nothing.tar")
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match="cannot be read"):
        opened("memory://nothing/here.tar")
    with pytest.raises(DataError, match="cannot be opened"):
        opened("gopher://nothing/here.tar")


def test_a_full_disk_while_copying_a_stream_is_an_error_of_the_disk_not_of_the_archive(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar.gz", [member("a/1.jpg", bytes(50_000))], "w:gz")
    source = ArchiveSource(str(path), find_volumes(str(path)), webdataset=False, largest=LARGEST)
    with pytest.raises(ResourceError, match="no space left"):
        source.listing(Path("/dev/full"))
    leave(monkeypatch, 10)
    with pytest.raises(ResourceError, match=r"has 0\.0 MB free, the pictures of .* need about"):
        source.listing(tmp_path / "spool")


def leave(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every disk have so many bytes free."""
    spool = sys.modules["pipeline.sources.spool"]
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free})())


def test_an_archive_behind_a_url_is_whole_or_an_error(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = write_tar(tmp_path / "a.tar", [member(f"a/{i}.jpg", np.random.default_rng(i).bytes(9000)) for i in range(4)])
    fsspec.filesystem("memory").pipe("memory://cut/a.tar", path.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"memory://.*a\.tar cannot be read: "):
        opened("memory://cut/a.tar").listing(tmp_path / "spool")


def test_a_zip_behind_a_url_that_is_lost_on_the_way_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    noise = {f"a/{i}.jpg": np.random.default_rng(i).bytes(9000) for i in range(4)}
    data = write_zip(tmp_path / "a.zip", noise).read_bytes()

    class Lost(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if 9000 < self.tell() < 18_000:
                raise ConnectionResetError("the other side is gone")
            return super().read(size)

    fsspec.filesystem("memory").pipe("memory://lost/a.zip", data)
    assert len(opened("memory://lost/a.zip").listing(tmp_path / "spool").files) == 4
    monkeypatch.setattr(Volume, "open", lambda volume: Lost(data))
    with pytest.raises(DataError, match=r"a\.zip cannot be read: the other side is gone"):
        opened("memory://lost/a.zip").listing(tmp_path / "spool")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="is not a regular file"):
        opened(tmp_path / "a.tar")


class Counted:
    """A source that counts how often it is listed."""

    def __init__(self, source: Source) -> None:
        self.source, self.kind, self.listed = source, source.kind, 0

    def digest(self) -> str:
        return self.source.digest()

    def listing(self, spool: Path) -> Listing:
        self.listed += 1
        return self.source.listing(spool)

    def reader(self, spool: Path):
        return self.source.reader(spool)


def test_a_stream_is_not_read_again_by_the_next_run_and_a_folder_is(folder, tmp_path):
    for name, times in ((folder, 2), (tarred(folder, tmp_path / "a.tar.gz", "w:gz"), 1)):
        place = tmp_path / f"work{times}"
        place.mkdir()
        source = Counted(opened(name))
        first = Unfinished(place, {}).listing(source)
        second = Unfinished(place, {}).listing(source)
        assert source.listed == times
        assert list(first.files) == list(second.files)
        assert (first.skipped, first.unreadable, first.example) == (second.skipped, second.unreadable, second.example)
        assert first.labels.columns == second.labels.columns
        assert np.array_equal(first.labels.table, second.labels.table)
        assert second.files.find(first.files.path(3)) == 3
        reader = source.reader(Unfinished(place, {}).spool)
        assert [reader.read(one, LARGEST) for one in second.files] == [reader.read(one, LARGEST) for one in first.files]
    (place / "unfinished/listing.npz").write_bytes(b"torn")
    assert len(Unfinished(place, {}).listing(source).files) == len(first.files)
    assert source.listed == 2


# --------------------------------------------------------------------------------------------------- several archives


def test_several_archives_are_one_data_set_and_their_names_are_classes_where_they_mean_something(tmp_path):
    jpegs = [encoded(picture(i, 24, 24)) for i in range(4)]
    for names, classes in (
        (("cats", "dogs"), ["cats", "dogs"]),
        (("n01440764", "n01443537"), ["n01440764", "n01443537"]),
    ):
        root = tmp_path / names[0]
        root.mkdir()
        for at, name in enumerate(names):
            write_tar(root / f"{name}.tar", [member(f"{i}.jpg", jpegs[2 * at + i]) for i in range(2)])
        found, listing = content(opened(root), tmp_path / "spool")
        assert listing.labels.columns == {"class": classes}
        assert found[names[1].encode() + b"/0.jpg"] == (jpegs[2], [classes[1]])
    for deep in (False, True):
        root = tmp_path / f"parts-{deep}"
        root.mkdir()
        for at in range(2):
            write_tar(root / f"part-{at:03d}.tar", [member("dog/" * deep + f"{at}.jpg", jpegs[at])])
        found, listing = content(opened(root / "part-*.tar"), tmp_path / "spool")
        assert len(found) == 2
        assert listing.labels.columns == ({"class": ["dog"]} if deep else {})


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_reader_holds_few_of_many_archives_open(tmp_path, kind):
    root = tmp_path / "many"
    root.mkdir()
    jpegs = [encoded(picture(i, 24, 24)) for i in range(6)]
    for i, jpeg in enumerate(jpegs):
        if kind == "tar":
            write_tar(root / f"part-{i}.tar", [member("dog/1.jpg", jpeg)])
        else:
            write_zip(root / f"part-{i}.zip", {"dog/1.jpg": jpeg})
    source = opened(root)
    listing, reader = source.listing(tmp_path / "spool"), source.reader(tmp_path / "spool")
    assert isinstance(reader, ArchiveReader)
    reader._files.limit = 3
    for _ in range(2):
        assert {reader.read(entry, LARGEST) for entry in listing.files} == set(jpegs)
        assert len(open_below(root)) == 3
    reader._files.close()


def test_class_names_are_escaped_once(tmp_path):
    for i, name in enumerate((b"a\\b", b"\xff")):
        folder = tmp_path / "in" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(encoded(picture(i, 24, 24)))
    for source in (tmp_path / "in", tarred(tmp_path / "in", tmp_path / "a.tar")):
        assert opened(source).listing(tmp_path / "spool").labels.columns == {"class": ["a\\\\b", "\\xff"]}


def test_webdataset_shards_have_their_labels_from_cls_or_json(tmp_path):
    jpegs = [encoded(picture(i, 24, 24)) for i in range(6)]
    write_tar(
        tmp_path / "s-0.tar",
        [
            member("000.jpg", jpegs[0]), member("000.cls", b"10\n"),
            member("001.cls", b"-00001"), member("001.jpg", jpegs[1]),
            member("002.json", b'{"label": 2}'), member("002.left.jpg", jpegs[2]), member("002.right.png", jpegs[3]),
        ],
    )  # fmt: skip
    write_tar(
        tmp_path / "s-1.tar", [member("000.jpg", jpegs[4]), member("000.json", b"{"), member("001.jpg", jpegs[5])]
    )
    source = opened(tmp_path)
    assert source.kind == "webdataset"
    found, listing = content(source, tmp_path / "spool")
    assert found == {
        b"s-0/000.jpg": (jpegs[0], ["10"]),
        b"s-0/001.jpg": (jpegs[1], [""]),
        b"s-0/002.left.jpg": (jpegs[2], ["2"]),
        b"s-0/002.right.png": (jpegs[3], ["2"]),
        b"s-1/000.jpg": (jpegs[4], [""]),
        b"s-1/001.jpg": (jpegs[5], [""]),
    }
    assert listing.labels.columns == {"class": ["2", "10"]}  # by value, not as text
    assert opened(tmp_path / "s-0.tar").kind == "webdataset"
    assert opened(tmp_path / "s-1.tar", kind="webdataset").kind == "webdataset"


def test_our_own_shards_can_be_converted_again(tmp_path):
    make_folder(tmp_path / "in", 6, 32, classes=2)
    for source, store in ((tmp_path / "in", "x"), (tmp_path / "x/shard-00000.tar", "y")):
        words = [str(source), str(tmp_path / store), "--backends", "dali", "--workers", "1", "--quiet"]
        assert run(convert.main, words) == 0
    one, two = Store.open(tmp_path / "x"), Store.open(tmp_path / "y")
    assert sorted(one.index["sum"].tolist()) == sorted(two.index["sum"].tolist())
    assert two.columns == {"class": ["0", "1"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("7", "7"),
        (" 007\n", "7"),
        ("-1", ""),
        (3, "3"),
        (-1, ""),
        (None, ""),
        (True, ""),
        (b"cat", "cat"),
        ("a b", "a b"),
    ],
)
def test_labels_in_plain_form(value, text):
    assert plain_label(value) == text


# ----------------------------------------------------------------------------------------------------------- ImageNet


def test_imagenets_training_archive_is_read_through_its_class_archives(tmp_path):
    jpegs = {f"n0{c}": [encoded(picture(10 * c + i, 24, 24)) for i in range(2)] for c in (3, 1, 2)}
    outer = []
    for wnid, pictures in jpegs.items():
        inner = write_tar(tmp_path / "inner.tar", [member(f"{wnid}_{i}.JPEG", data) for i, data in enumerate(pictures)])
        outer.append(member(f"{wnid}.tar", inner.read_bytes()))
    expected = {
        f"{wnid}/{wnid}_{i}.JPEG".encode(): (data, [wnid]) for wnid, two in jpegs.items() for i, data in enumerate(two)
    }
    for mode in ("w", "w:gz"):
        path = write_tar(tmp_path / "ILSVRC2012_img_train.tar", outer, mode)
        found, listing = content(opened(path), tmp_path / "spool")
        assert found == expected
        assert listing.labels.columns == {"class": ["n01", "n02", "n03"]}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("damage", ["header", "cut", "nothing of a tar archive"])
def test_a_damaged_class_archive_is_a_bad_file_and_the_others_are_read(tmp_path, mode, damage):
    jpegs = {f"n0{c}": [encoded(picture(10 * c + i, 24, 24)) for i in range(2)] for c in (1, 2, 3)}
    outer, second = [], 512 + -(-len(jpegs["n02"][0]) // 512) * 512
    for wnid, pictures in jpegs.items():
        path = write_tar(tmp_path / "inner.tar", [member(f"{wnid}_{i}.JPEG", one) for i, one in enumerate(pictures)])
        inner = bytearray(path.read_bytes())
        if wnid == "n02" and damage == "header":
            inner[second] ^= 1
        elif wnid == "n02" and damage == "cut":
            del inner[second + 512 + 100 :]
        elif wnid == "n02":
            inner = bytearray(b"hello" * 400)
        outer.append(member(f"{wnid}.tar", bytes(inner)))
    path = write_tar(tmp_path / "train.tar", outer, mode)
    words = [str(path), str(tmp_path / "s"), "--backends", "dali", "--workers", "1", "--quiet"]
    assert run(convert.main, words) == 0
    kept = {"n01": 2, "n02": 0 if damage == "nothing of a tar archive" else 1, "n03": 2}
    assert set((tmp_path / "s/names.txt").read_text().split()) == {
        f"{wnid}/{wnid}_{i}.JPEG" for wnid, count in kept.items() for i in range(count)
    }
    (row,) = map(json.loads, (tmp_path / "s/bad_files.jsonl").read_text().splitlines())
    assert row["path"] == "n02.tar"
    reasons = {"header": f"bad checksum at byte {second:,}", "cut": "unexpected end of data"}
    assert row["reason"].startswith("cannot be read: " + reasons.get(damage, ""))


def write_devkit(path: Path, leaves: dict[int, str], truth: list[int]) -> Path:
    """meta.mat as it is: a struct array of leaves in order of id, then inner nodes with numbers above."""
    savemat = pytest.importorskip("scipy.io").savemat
    rows = [(number, wnid, 0) for number, wnid in sorted(leaves.items())] + [(len(leaves) + 1, "n00001740", 2)]
    synsets = np.array(
        [(number, wnid, "words", "gloss", children) for number, wnid, children in rows],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")],
    )
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets.reshape(-1, 1)})
    lines = "".join(f"{number}\n" for number in truth).encode()
    return write_tar(
        path,
        [
            member("ILSVRC2012_devkit_t12/data/meta.mat", buffer.getvalue()),
            member("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines),
        ],
        "w:gz",
    )


def test_imagenets_validation_labels_go_by_the_ids_of_the_development_kit(tmp_path):
    leaves = {1: "n02119789", 2: "n02100735", 3: "n01440764"}  # not in the order of their names
    jpegs = [encoded(picture(i, 24, 24)) for i in range(4)]
    path = write_tar(
        tmp_path / "ILSVRC2012_img_val.tar",
        [member(f"ILSVRC2012_val_{i + 1:08d}.JPEG", data) for i, data in enumerate(jpegs)],
    )
    _, listing = content(opened(path), tmp_path / "spool")
    assert listing.labels.columns == {}
    devkit = write_devkit(tmp_path / DEVKIT, leaves, [3, 1, 1, 2])
    found, listing = content(opened(path), tmp_path / "spool")
    assert listing.labels.columns == {"class": ["n01440764", "n02100735", "n02119789"]}
    assert [found[b"ILSVRC2012_val_%08d.JPEG" % i][1] for i in (1, 2, 3, 4)] == [
        ["n01440764"], ["n02119789"], ["n02119789"], ["n02100735"]
    ]  # fmt: skip
    write_devkit(tmp_path / DEVKIT, leaves, [3, 1])
    with pytest.raises(DataError, match="tells the labels of 2 pictures, none for ILSVRC2012_val_0000000"):
        opened(path).listing(tmp_path / "spool")
    write_devkit(tmp_path / DEVKIT, leaves, [3, 1, 4, 2])  # 4 is an inner node
    with pytest.raises(DataError, match=r"classes that meta\.mat lacks"):
        opened(path).listing(tmp_path / "spool")
    devkit.write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not ImageNet's development kit"):
        opened(path).listing(tmp_path / "spool")
    with pytest.raises(DataError, match="is not ImageNet's validation set"):
        opened(make_folder(tmp_path / "other", 1)[0].parent, devkit=devkit).listing(tmp_path / "spool")


def test_without_scipy_the_development_kit_asks_for_it(tmp_path, monkeypatch):
    devkit = write_devkit(tmp_path / DEVKIT, {1: "n01"}, [1])
    path = write_tar(tmp_path / "ILSVRC2012_img_val.tar", [member("ILSVRC2012_val_00000001.JPEG", b"x")])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        ResourceError, match=f"reading {devkit} needs SciPy, which is not installed. Run `pip install scipy`"
    ):
        opened(path).listing(tmp_path / "spool")


# -------------------------------------------------------------------------------------------------------------- lists


def test_a_list_names_a_part_and_may_bring_labels(folder, tmp_path):
    lines = tmp_path / "list.txt"
    lines.write_bytes(b"class-2/00002.jpg\n\nclass-0/caf\xc3\xa9, 1.jpg\r\n./class-2/00005.jpg\nclass-9/none.jpg\n")
    for source in (folder, tarred(folder, tmp_path / "a.tar")):
        found, listing = content(opened(source, subset=lines), tmp_path / "spool")
        assert {name: labels for name, (_, labels) in found.items()} == {
            b"class-2/00002.jpg": ["class-2"], b"class-2/00005.jpg": ["class-2"],
            b"class-0/caf\xc3\xa9, 1.jpg": ["class-0"],
        }  # fmt: skip
        assert listing.labels.columns == {"class": ["class-0", "class-2"]}
        assert listing.unreadable == [(b"class-9/none.jpg", "is in the list, but not in the source")]
        assert listing.skipped["not in the list"] == 14
    lines.write_bytes(b"class-2/00002.jpg 11\nclass-0/caf\xc3\xa9, 1.jpg,9\nclass-0/00000.jpg\t11\nclass-0/00003.jpg\n")
    found, listing = content(opened(folder, subset=lines), tmp_path / "spool")
    assert listing.labels.columns == {"class": ["9", "11"]}
    assert [found[name][1] for name in (b"class-2/00002.jpg", b"class-0/caf\xc3\xa9, 1.jpg", b"class-0/00003.jpg")] == [
        ["11"], ["9"], [""]
    ]  # fmt: skip


def test_lists_that_contradict_themselves_or_name_nothing_are_refused(folder, tmp_path):
    lines = tmp_path / "list.txt"
    lines.write_text("class-0/00000.jpg 1\nclass-0/00000.jpg 2\n")
    with pytest.raises(DataError, match=r"list.txt, line 2: class-0/00000.jpg 2 has had another label before"):
        opened(folder, subset=lines).listing(tmp_path / "spool")
    lines.write_text("../etc/passwd\n")
    with pytest.raises(DataError, match="names nothing in the source"):
        opened(folder, subset=lines).listing(tmp_path / "spool")
    before = opened(folder, subset=lines).digest()
    lines.write_text("class-0/00000.jpg\n")
    assert opened(folder, subset=lines).digest() != before != opened(folder).digest()
    with pytest.raises(DataError, match=r"gone.txt cannot be read"):
        opened(folder, subset=tmp_path / "gone.txt").digest()


# ------------------------------------------------------------------------------------------------------------- tables


def write_parquet(path: Path, columns: dict, metadata: dict[str, str] | None = None) -> Path:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(columns).replace_schema_metadata(metadata)
    arrow.parquet = pytest.importorskip("pyarrow.parquet")
    arrow.parquet.write_table(table, path)
    return path


def test_parquet_with_a_struct_of_bytes_and_path(tmp_path):
    jpegs = [encoded(picture(i, 24, 24)) for i in range(3)]
    features = {"label": {"_type": "ClassLabel", "names": ["bee", "ant", "cat"]}}
    cells = [{"bytes": data, "path": f"x/{i}.jpg"} for i, data in enumerate(jpegs)]
    for at in range(2):
        write_parquet(
            tmp_path / f"train-{at}.parquet",
            {
                "image": [*cells, {"bytes": None, "path": "y.jpg"}],
                "label": [2, -1, 0, 0],
                "caption": ["a", "b", "c", "d"],
            },
            {"huggingface": json.dumps({"info": {"features": features}})},
        )
    source = opened(tmp_path)
    assert source.kind == "parquet"
    found, listing = content(source, tmp_path / "spool")
    assert len(found) == 6
    assert found[b"train-1.parquet/000000002/2.jpg"] == (jpegs[2], ["bee"])
    assert found[b"train-0.parquet/000000001/1.jpg"] == (jpegs[1], [""])
    assert listing.labels.columns == {"class": ["bee", "ant", "cat"]}
    assert listing.unreadable[0] == (b"train-0.parquet/000000003/y.jpg", "holds no bytes")


def test_parquet_columns_are_found_or_asked_for(tmp_path):
    jpegs = [encoded(picture(i, 24, 24)) for i in range(12)]
    kinds = [f"kind {i % 2}" for i in range(12)]
    path = write_parquet(tmp_path / "a.parquet", {"scan": jpegs, "thumb": jpegs, "kind": kinds, "number": range(12)})
    with pytest.raises(DataError, match=r"which column is the picture\? --columns names it \(scan, thumb\)"):
        opened(path).listing(tmp_path / "spool")
    found, listing = content(opened(path, columns=Columns("scan", "kind")), tmp_path / "spool")
    assert found[b"a.parquet/000000003"] == (jpegs[3], ["kind 1"])
    _, listing = content(opened(path, columns=Columns("scan", "number")), tmp_path / "spool")
    assert listing.labels.columns == {"class": [str(i) for i in range(12)]}
    _, listing = content(opened(path, columns=Columns("scan")), tmp_path / "spool")
    assert listing.labels.columns == {}
    with pytest.raises(DataError, match="has no picture column 'kind'"):
        opened(path, columns=Columns("kind")).listing(tmp_path / "spool")
    with pytest.raises(UsageError, match="--columns is for Parquet"):
        opened(tmp_path, kind="folder", columns=Columns("scan"))
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        opened(path).listing(tmp_path / "spool")


def test_parquet_files_of_one_name_are_told_apart(tmp_path):
    jpegs = [encoded(picture(i, 24, 24)) for i in range(4)]
    for at, folder in enumerate(("cats", "dogs")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        write_parquet(tmp_path / "in" / folder / "0000.parquet", {"image": jpegs[2 * at : 2 * at + 2]})
    found, _ = content(opened(tmp_path / "in", kind="parquet"), tmp_path / "spool")
    assert {name: data for name, (data, _) in found.items()} == {
        b"00000-0000.parquet/000000000": jpegs[0], b"00000-0000.parquet/000000001": jpegs[1],
        b"00001-0000.parquet/000000000": jpegs[2], b"00001-0000.parquet/000000001": jpegs[3],
    }  # fmt: skip


class Repeated(ParquetSource):
    def rows(self) -> Iterator[Row]:
        return iter([Row(b"a", b"one", None), Row(b"b", b"two", None), Row(b"a", b"three", None)])

    def class_names(self) -> None:
        return None


def test_rows_that_would_replace_one_another_are_an_error(tmp_path):
    source = Repeated("in", [Volume("in.parquet", 11, "")], Columns(), largest=LARGEST)
    with pytest.raises(DataError, match="in has 1 rows that go by the name of another one"):
        source.listing(tmp_path / "spool")


@pytest.mark.parametrize(
    ("names", "splits", "pattern", "files"),
    [
        (
            ("data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"),
            "test, train",
            "data/test*.parquet",
            1,
        ),
        (("train/0.parquet", "train/1.parquet", "validation/0.parquet"), "train, validation", "train/*.parquet", 2),
        (("Train.parquet", "dev_0.parquet"), "train, validation", "Train*.parquet", 1),
    ],
)
def test_parquet_files_of_several_splits_are_refused_with_a_pattern_for_one(tmp_path, names, splits, pattern, files):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError) as caught:
        opened(tmp_path, kind="parquet")
    assert str(caught.value) == f"{tmp_path} holds several splits ({splits}). Name one, e.g. {tmp_path / pattern}."
    source = opened(tmp_path / pattern, kind="parquet")
    assert isinstance(source, ParquetSource)
    assert len(source.volumes) == files


@pytest.mark.parametrize("names", [("train-0", "training-1"), ("trains", "test"), ("a", "train")])
def test_names_that_are_not_of_two_splits_are_one_data_set(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    assert opened(tmp_path).kind == "parquet"


@pytest.mark.parametrize("package", ["pyarrow", "datasets", "fsspec"])
def test_a_missing_package_is_named_with_code_5(tmp_path, monkeypatch, capsys, package):
    (tmp_path / "in.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/dataset_info.json").write_text("{}")
    source = {"pyarrow": tmp_path / "in.parquet", "datasets": tmp_path / "in", "fsspec": "s3://bucket/in.tar"}[package]
    monkeypatch.setitem(sys.modules, package, None)
    assert run(convert.main, [str(source), str(tmp_path / "s"), "--backends", "dali", "--quiet"]) == 5
    assert capsys.readouterr().err == (
        f"error: {source} needs {package}, which is not installed. Run `pip install {package}`.\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in.parquet"]


def test_a_hugging_face_data_set_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    jpegs = [encoded(picture(i, 24, 24)) for i in range(5)]
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["b", "a"]), "text": datasets.Value("string")}
    )
    rows = {"img": [{"bytes": data, "path": None} for data in jpegs], "fine": [0, 1, 1, 0, 1], "text": list("vwxyz")}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "one")
    source = opened(tmp_path / "one")
    assert source.kind == "hf"
    found, listing = content(source, tmp_path / "spool")
    assert [found[b"%09d" % i] for i in range(5)] == [(data, [name]) for data, name in zip(jpegs, "baaba", strict=True)]
    assert listing.labels.columns == {"class": ["b", "a"]}
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"holds several splits \(train, test\). Name one, e.g. .*/two/train"):
        opened(tmp_path / "two").listing(tmp_path / "spool")
    assert len(content(opened(tmp_path / "two/test"), tmp_path / "spool")[0]) == 5


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_table_whose_pictures_have_no_room_is_refused_before_any_is_copied(tmp_path, monkeypatch, kind):
    jpegs = [np.random.default_rng(i).bytes(9000) for i in range(4)]
    if kind == "parquet":
        write_parquet(tmp_path / "a.parquet", {"image": jpegs})
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"image": jpegs}).save_to_disk(tmp_path / "a")
    source = opened(next(tmp_path.iterdir()))
    assert source.kind == kind
    leave(monkeypatch, 36_000)
    with pytest.raises(ResourceError, match=r"has 0\.0 MB free, the pictures of .* need about 0\.0 MB there"):
        source.listing(tmp_path / "spool")
    assert not (tmp_path / "spool").exists()
    leave(monkeypatch, 50_000)
    assert len(source.listing(tmp_path / "spool").files) == 4


# --------------------------------------------------------------------------------------- what is no fault of the source


MACHINE = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE]


def fail_to_open(monkeypatch: pytest.MonkeyPatch, below: Path, number: int, times: int) -> list[bytes]:
    """Let os.open fail so often for files in a folder, or for one file. Returns what was asked for."""
    genuine, asked = os.open, []

    def fails(path, *rest, **more):
        if os.fsencode(path).startswith(os.fsencode(below)):
            asked.append(os.fsencode(path))
            if len(asked) <= times:
                raise OSError(number, os.strerror(number))
        return genuine(path, *rest, **more)

    monkeypatch.setattr(os, "open", fails)
    return asked


@pytest.mark.parametrize("number", MACHINE)
@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_an_error_of_the_machine_is_no_verdict_on_a_picture(folder, tmp_path, monkeypatch, kind, number):
    path = folder
    if kind != "folder":
        path = zipped(folder, tmp_path / "a.zip") if kind == "zip" else tarred(folder, tmp_path / "a.tar")
    source = opened(path)
    entry, reader = source.listing(tmp_path / "spool").files[0], source.reader(tmp_path / "spool")
    with monkeypatch.context() as patched:
        asked = fail_to_open(patched, path, number, 2)
        with pytest.raises(ResourceError, match=str(path)):
            try_entry(entry, (reader, Encoding()))
        again = number in (errno.EIO, errno.ESTALE)
        assert len(asked) == 1 + again
    with monkeypatch.context() as patched:
        fail_to_open(patched, path, number, 1)
        if again:
            assert isinstance(try_entry(entry, (reader, Encoding())), Stored)


@pytest.mark.parametrize("number", MACHINE)
def test_an_error_of_the_machine_is_no_verdict_on_a_folder(folder, monkeypatch, number):
    def fails(path):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", fails)
        with pytest.raises(ResourceError):
            opened(folder, kind="folder").digest()
    with monkeypatch.context() as patched:
        fail_to_open(patched, folder / "class-1/no-extension", number, 2)
        with pytest.raises(ResourceError, match="no-extension"):
            opened(folder, kind="folder").digest()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_disk_that_fails_while_an_archive_is_listed_is_asked_again_and_then_an_error(
    folder, tmp_path, monkeypatch, kind
):
    path = tmp_path / f"a.{kind}"
    _ = zipped(folder, path) if kind == "zip" else tarred(folder, path, TAR_MODES[kind])
    expected = list(opened(path).listing(tmp_path / "spool").files)
    data, failures = path.read_bytes(), [1]

    class Shaky(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 5000 and failures[0]:
                failures[0] -= 1
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(Volume, "_open", lambda volume: Shaky(data))
    source = ArchiveSource(str(path), find_volumes(str(path)), webdataset=False, largest=LARGEST)
    assert list(source.listing(tmp_path / "spool").files) == expected
    assert failures == [0]
    failures[0] = 2
    with pytest.raises(ResourceError, match="Input/output error"):
        source.listing(tmp_path / "spool")


# --------------------------------------------------------------------------------------------- where a listing stands


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip", "parquet"])
def test_a_source_tells_where_it_stands_before_it_waits_there(folder, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, {"image": [encoded(picture(i, 24, 24)) for i in range(3)]})
    elif kind == "folder":
        path = folder
    else:
        _ = zipped(folder, path) if kind == "zip" else tarred(folder, path, TAR_MODES[kind])
    told: list[tuple[bytes | str, int]] = []
    source = open_source(str(path), Choice(), largest=LARGEST, tell=lambda place, images: told.append((place, images)))
    assert told[0] == (str(path), 0)
    source.digest()
    listing = source.listing(tmp_path / "spool")
    counts = [images for _, images in told]
    assert counts == sorted(counts)
    # At every picture, but that a block of a compressed stream or of a zip's directory has many.
    assert len(set(counts)) >= {"tar.gz": 2, "zip": 1}.get(kind, len(listing.files))
    if kind == "folder":
        assert os.fsencode(path / "class-0/00000.jpg") in {place for place, _ in told}


# ------------------------------------------------------------------------------------------------------------ entries


def test_entries_are_in_the_order_of_their_hashes_and_cost_few_bytes():
    paths = [b"class-%03d/picture-%08d.jpeg" % (i % 100, i) for i in range(50_000)]
    with memory_below(len(paths) * (len(paths[0]) + 140)):  # while they are put in order
        entries = Entries()
        for i, path in enumerate(paths):
            entries.add(path, i, stamp=2 * i, volume=i % 7, at=1 << 40 | i)
        assert entries.settle_order() == 0
        assert tracemalloc.get_traced_memory()[0] < len(paths) * (len(paths[0]) + 70)
    expected = sorted(paths, key=lambda path: hashlib.blake2b(path, digest_size=16).digest())
    assert list(entries.paths()) == expected
    for place in (0, 1, 49_999):
        number = int(expected[place][-13:-5])
        one = entries[place]
        assert (one.path, one.size, one.stamp, one.volume) == (expected[place], number, 2 * number, number % 7)
        assert one.at == 1 << 40 | number
        assert entries.find(expected[place]) == place
    assert entries.find(b"class-000/picture-99999999.jpeg") is None
    assert entries.sizes[3] == entries[3].size


def test_a_spool_leaves_out_what_a_stream_breaks_off(tmp_path):
    with Spool(tmp_path / "spool", LARGEST) as spool:
        assert spool.add(io.BytesIO(b"abc"), 3) == 0
        with pytest.raises(EOFError):
            spool.add(io.BytesIO(b"defg"), 9)
        assert spool.add(io.BytesIO(b"h"), 1) == 3
    assert (tmp_path / "spool").read_bytes() == b"abch"
