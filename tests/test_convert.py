"""`daae convert`: what becomes of each kind of file, what the store holds, and that nothing half-written is left."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing.process
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import ffcv_writer, pictures
from pipeline.decoder import checksum, clean
from pipeline.errors import DataError, StalledError, UsageError
from pipeline.ordered_map import ordered_map
from pipeline.pictures import Encoding, Rejected, plain_jpeg, read_picture
from pipeline.shards import ShardWriter, printable, unprintable
from pipeline.sources import folder as folder_module
from pipeline.sources.entries import Entry
from pipeline.sources.folder import FolderReader, scan
from pipeline.sources.source import try_entry
from pipeline.store import Store
from pipeline.stored import StoredPictures
from pipeline.unfinished import Unfinished, fits, worth_keeping
from tests.conftest import needs_compiler
from tests.images import encoded, make_folder, picture, pixels, psnr
from tools import convert, verify
from tools.converting import conversion, decoding, watchdog
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


# ------------------------------------------------------------------------------------------------- single pictures


def keep(tmp_path: Path, data: bytes, **encoding) -> np.ndarray:
    """The pixels that are stored for a file of these bytes."""
    path = tmp_path / "picture"
    path.write_bytes(data)
    result = read_picture(path, Encoding(**encoding))
    decoded = pixels(result.data)
    assert decoded.shape == (result.height, result.width, 3)
    return decoded


def reason(tmp_path: Path, data: bytes, **encoding) -> str:
    with pytest.raises(Rejected) as caught:
        keep(tmp_path, data, **encoding)
    return str(caught.value)


TURNED = {  # EXIF orientation -> how the file holds a picture that is to be seen upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_baked_in_and_gone(tmp_path, kind, orientation):
    upright = picture(1, 90, 60)
    turned = upright.transpose(TURNED[orientation]) if orientation in TURNED else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "picture"
    path.write_bytes(encoded(turned, kind, exif=exif, **options))
    result = read_picture(path, Encoding())
    assert psnr(pixels(result.data), pixels(upright)) > 35
    assert 0x0112 not in Image.open(io.BytesIO(result.data)).getexif()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_exif_block_is_no_fault_of_the_picture(tmp_path, kind):
    # With a resolution of its own: else Pillow looks for one in the block, and forgets that it could not be read.
    data = encoded(picture(1, 90, 60), kind, exif=b"Exif\0\0this is no TIFF header", dpi=(72, 72))
    result = read_picture(write(tmp_path, data), Encoding())
    assert psnr(pixels(result.data), pixels(data)) > 35
    assert result.kept == (kind == "JPEG")


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        grey = keep(tmp_path, encoded(Image.fromarray(ramp), kind))[..., 0]
        assert np.abs(grey - ramp / 257).max() < 4


def test_16_bit_rgb_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 32 * 32).astype(">u2").reshape(32, 32, 1).repeat(3, axis=2)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    colour = keep(tmp_path, png_file(32, 32, zlib.compress(rows), depth=16, colour=2))
    assert np.abs(colour - values.astype(float) / 257).max() < 5


def test_float_and_wide_pictures_are_stretched_and_infinite_ones_refused(tmp_path):
    ramp = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    for scale, shift in ((1, 0), (500, -100)):
        grey = keep(tmp_path, encoded(Image.fromarray(ramp * scale + shift), "TIFF"))[..., 1]
        assert np.abs(grey - ramp * 255).max() < 4
    ramp[3, 3] = np.inf
    assert "not finite" in reason(tmp_path, encoded(Image.fromarray(ramp), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(tmp_path, mode):
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (16, 12, 48, 36))
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":  # a palette whose entry 0 is transparent, though its colour is black
        image = Image.new("P", (64, 48), 0)
        image.putpalette([0, 0, 0, 200, 200, 200])
        image.paste(1, (16, 12, 48, 36))
    data = encoded(image, "PNG", **({"transparency": 0} if mode == "P" else {}))
    colour = keep(tmp_path, data)
    assert colour[:8].min() > 250
    assert np.abs(colour[20:28, 24:40] - 200).max() < 4


def test_half_transparent_colour_is_mixed_with_white(tmp_path):
    colour = keep(tmp_path, encoded(Image.new("RGBA", (32, 32), (255, 0, 0, 128)), "PNG"))
    assert np.abs(colour - np.array([255, 127, 127])).max() < 5


def test_cmyk_is_converted(tmp_path):
    upright = picture(2)
    colour = keep(tmp_path, encoded(upright.convert("CMYK"), "JPEG", quality=95))
    assert psnr(colour, pixels(upright)) > 30


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        colour = keep(tmp_path, encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(colour - np.array([255, 0, 0])).max() < 12


def test_a_large_picture_is_shrunk_with_antialiasing(tmp_path):
    stripes = np.zeros((300, 900, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing: a moiré of black and white
    colour = keep(tmp_path, encoded(Image.fromarray(stripes), "PNG"), max_side=100)
    assert colour.shape == (33, 100, 3)
    assert np.abs(colour - 127.5).max() < 12
    upright = picture(3, 640, 480)
    expected = pixels(upright.resize((500, 375), Image.Resampling.LANCZOS))
    assert psnr(keep(tmp_path, encoded(upright, "PNG")), expected) > 33


def test_small_pictures_keep_their_chroma(tmp_path):
    dots = np.zeros((64, 64, 3), np.uint8)
    dots[:, ::2] = (255, 0, 0)
    dots[:, 1::2] = (0, 0, 255)
    assert np.abs(keep(tmp_path, encoded(Image.fromarray(dots), "PNG")) - dots).mean() < 10
    for width, expected in ((128, 0x11), (129, 0x22)):
        jpeg = read_picture(write(tmp_path, encoded(picture(0, width, 90), "PNG")), Encoding()).data
        frame = jpeg.index(b"\xff\xc0")
        assert jpeg[frame + 11] == expected  # luma samples per chroma sample, across and down


def test_colour_for_each_pixel_is_a_choice(tmp_path):
    dots = np.zeros((160, 200, 3), np.uint8)
    dots[:, ::2] = (255, 0, 0)
    dots[:, 1::2] = (0, 0, 255)
    source = write(tmp_path, encoded(Image.fromarray(dots), "PNG"))
    halved, whole = (read_picture(source, Encoding(chroma=chroma)).data for chroma in ("4:2:0", "4:4:4"))
    errors = [np.abs(pixels(jpeg).astype(int) - dots).mean() for jpeg in (halved, whole)]
    assert errors[0] > 5 * errors[1]
    (tmp_path / "in").mkdir()
    source.rename(tmp_path / "in/a.png")
    words = [str(tmp_path / "in"), str(tmp_path / "store"), "--backends", "dali", "--quiet"]
    assert convert.main([*words, "--chroma", "4:4:4"]) == 0
    store = Store.open(tmp_path / "store")
    with contextlib.closing(StoredPictures.in_shards(store)) as jpegs:
        assert jpegs.read(0).tobytes() == whole
    with pytest.raises(UsageError, match=r"made with other settings \(chroma 4:4:4 -> 4:2:0\)"):
        convert.main(words)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "picture"
    path.write_bytes(data)
    return path


def scan_bytes(jpeg: bytes) -> bytes:
    """The entropy-coded bytes of a JPEG with one scan."""
    start = jpeg.index(b"\xff\xda")
    (length,) = struct.unpack_from(">H", jpeg, start + 2)
    return jpeg[start + 2 + length : jpeg.index(b"\xff\xd9", start)]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_plain_jpeg_keeps_its_own_bytes_and_loses_its_metadata(tmp_path, subsampling):
    exif = Image.Exif()
    exif[0x010E] = "SECRET description"
    source = encoded(
        picture(4, 300, 200), subsampling=subsampling, exif=exif, comment=b"SECRET", icc_profile=b"SECRET" * 9
    )
    result = read_picture(write(tmp_path, source + b"SECRET after the end"), Encoding())
    assert result.kept
    assert scan_bytes(result.data) == scan_bytes(source)
    assert b"SECRET" not in result.data
    assert np.array_equal(pixels(result.data), pixels(source))


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(5), progressive=True),
        encoded(picture(5).convert("L")),
        encoded(picture(5), keep_rgb=True),
        encoded(picture(5, 600, 300)),
    ],
    ids=["progressive", "grey", "RGB components", "too large"],
)
def test_other_jpegs_are_encoded_anew_as_baseline_ycbcr(tmp_path, data):
    result = read_picture(write(tmp_path, data), Encoding())
    assert not result.kept
    assert plain_jpeg(result.data) is not None
    assert max(result.width, result.height) <= 500


@needs_compiler
def test_a_jpeg_that_pillow_alone_forgives_is_encoded_anew(tmp_path):
    """A download that was cut and closed: Pillow fills up with grey and says nothing, our decoder would stop a run."""
    whole = encoded(picture(4, 300, 200))
    cut = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
    assert plain_jpeg(cut) is not None
    assert not clean(plain_jpeg(cut) or b"")
    result = read_picture(write(tmp_path, cut), Encoding())
    assert not result.kept
    assert clean(result.data)


def png_file(width: int, height: int, idat: bytes, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(tmp_path):
    # Were any pixel of it decoded, the reason would be that the data end early.
    why = reason(tmp_path, png_file(30000, 30000, zlib.compress(bytes(1000))))
    assert why == "is 30000 x 30000 pixels, over --max-pixels 100000000: not decoded"
    gif = bytearray(encoded(Image.new("P", (10, 10)), "GIF"))
    frame = gif.index(b"\x2c")  # the frame lies about its size; the screen of the header is small
    gif[frame + 5 : frame + 9] = struct.pack("<HH", 60000, 60000)
    assert "over --max-pixels" in reason(tmp_path, bytes(gif))


def test_files_that_are_no_usable_picture_say_why(tmp_path):
    jpeg, png = encoded(picture(6)), encoded(picture(6), "PNG")
    assert reason(tmp_path, b"") == "is empty (0 bytes)"
    assert "cannot be decoded" in reason(tmp_path, jpeg[: len(jpeg) // 2])
    assert "cannot be decoded" in reason(tmp_path, png[: len(png) // 2])
    assert "header is damaged" in reason(tmp_path, jpeg[:20])
    assert reason(tmp_path, b"%PDF-1.7 ...") == "is no picture but PDF"
    assert reason(tmp_path, b"hello") == "is no picture"
    assert "HEIC" in reason(tmp_path, b"\0\0\0\x18ftypheic" + bytes(40))
    assert "under --min-side 8" in reason(tmp_path, encoded(picture(6, 20, 7), "PNG"))
    assert "too narrow at 500" in reason(tmp_path, encoded(Image.new("RGB", (1000, 9)), "PNG"))
    assert "cannot be read" in reason_of_missing(tmp_path)
    os.mkfifo(tmp_path / "missing")  # in the place of a file since the listing: nobody waits for its writer
    assert reason_of_missing(tmp_path) == "is no regular file"


def reason_of_missing(tmp_path: Path) -> str:
    with pytest.raises(Rejected) as caught:
        read_picture(tmp_path / "missing", Encoding())
    return str(caught.value)


def test_damaged_files_end_as_picture_or_reason_and_never_otherwise(tmp_path):
    draw = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [
        encoded(picture(7, 80, 60), exif=exif),
        encoded(picture(7, 80, 60), progressive=True),
        encoded(picture(7, 80, 60), "PNG"),
        encoded(picture(7, 80, 60).convert("RGBA"), "WEBP"),
        encoded(picture(7, 80, 60).convert("P"), "GIF"),
        encoded(picture(7, 80, 60), "TIFF", compression="tiff_lzw"),
    ]
    outcomes = {True: 0, False: 0}
    for data, _ in itertools.product(good, range(50)):
        damaged = bytearray(data)
        how = draw.integers(4)
        at = int(draw.integers(len(data)))
        if how == 0:
            del damaged[at:]
        elif how == 1:
            damaged[at : at + 8] = draw.bytes(8)
        elif how == 2:
            damaged[at:at] = draw.bytes(int(draw.integers(1, 64)))
        else:
            for spot in draw.integers(0, min(200, len(data)), 3):
                damaged[spot] ^= int(draw.integers(1, 256))
        write(tmp_path, bytes(damaged))
        result = try_entry(
            Entry(b"picture", len(damaged)), (FolderReader(os.fsencode(tmp_path)), Encoding(max_pixels=1e6))
        )
        if isinstance(result, str):
            assert result.isprintable()
        else:
            assert pixels(result.data).shape == (result.height, result.width, 3)
        outcomes[isinstance(result, str)] += 1
    assert min(outcomes.values()) > 50  # the damage is neither always harmless nor always fatal


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


# ------------------------------------------------------------------------------------------------ killed on the way


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


def sleepy(item: int, common: str) -> str:
    if common == "hang" and item == 5:
        time.sleep(60)
    if common == "crash" and item == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if common == "raise" and item == 5:
        raise DataError("item 5 is wrong")
    return f"{common} {item}"


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
    # multiprocessing's own resource tracker may have come
    assert all("resource_tracker" in " ".join(one.cmdline()) for one in set(psutil.Process().children()) - before)


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
    (left,) = [one for one in new if "resource_tracker" not in " ".join(one.cmdline())]
    # Nor is it waited for at the end of this process.
    assert left.pid not in {child.pid for child in multiprocessing.active_children()}
    left.kill()
    left.wait(10)


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
