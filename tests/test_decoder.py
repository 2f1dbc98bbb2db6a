"""The region decoder against Pillow, and against everything that can be wrong with a file."""

from __future__ import annotations

import io
import os
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import decoder, native
from pipeline.sampling import Geometry
from tests.images import encoded, picture, psnr

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no region decoder: {native.why_not()}")

KINDS = {
    "4:2:0": {"subsampling": 2}, "4:2:2": {"subsampling": 1}, "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True}, "restart": {"restart_marker_blocks": 3}, "gray": {},
}  # fmt: skip


def jpeg(height: int, width: int, seed: int, kind: str = "4:2:0", quality: int = 90) -> bytes:
    image = picture(seed, width, height)
    return encoded(image.convert("L") if kind == "gray" else image, quality=quality, **KINDS[kind])


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def in_memory(files: list[bytes]) -> tuple[np.ndarray, list[np.ndarray]]:
    """SAMPLE rows, and the arrays that have to live as long as they do."""
    arrays = [np.frombuffer(data, np.uint8) for data in files]
    rows = np.zeros(len(files), decoder.SAMPLE)
    for row, array, data in zip(rows, arrays, files, strict=True):
        width, height = decoded(data).size
        row["data"], row["size"], row["file"] = array.ctypes.data, array.size, -1
        row["height"], row["width"], row["sum"] = height, width, decoder.checksum(data)
    return rows, arrays


def random_boxes(rows: np.ndarray, seed: int) -> Geometry:
    """Any box at all: single rows and columns, whole pictures, edges."""
    draw = np.random.default_rng(seed)
    boxes = []
    for height, width in zip(rows["height"].tolist(), rows["width"].tolist(), strict=True):
        high, wide = draw.integers(1, height + 1), draw.integers(1, width + 1)
        top = draw.choice([0, height - high, draw.integers(0, height - high + 1)])
        left = draw.choice([0, width - wide, draw.integers(0, width - wide + 1)])
        boxes.append((top, left, high, wide))
    return Geometry(np.array(boxes), draw.random(len(rows)) < 0.5)


def by_pillow(files: list[bytes], where: Geometry, side: int) -> np.ndarray:
    out = []
    for data, (top, left, high, wide), flip in zip(files, where.boxes.tolist(), where.flip, strict=True):
        cropped = decoded(data).crop((left, top, left + wide, top + high))
        view = np.asarray(cropped.resize((side, side), Image.Resampling.BILINEAR))
        out.append(view[:, ::-1] if flip else view)
    return np.stack(out)


def views(rows: np.ndarray, where: list[Geometry], sides: list[int], threads: int = 2, *, simd: bool = True):
    outs = [np.zeros((len(rows), side, side, 3), np.uint8) for side in sides]
    opened = decoder.RegionDecoder(threads, simd=simd)
    failed = opened.decode(rows, where, outs)
    opened.close()
    return outs, failed


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_is_pillows_crop_resized(kind):
    sizes = [(333, 500), (500, 375), (97, 131), (16, 16), (15, 241), (1, 1), (640, 33)]
    files = [jpeg(height, width, seed, kind) for seed, (height, width) in enumerate(sizes * 3)]
    rows, _alive = in_memory(files)
    where, sides = [random_boxes(rows, seed) for seed in (1, 2, 3)], [224, 112, 32]
    outs, failed = views(rows, where, sides)
    assert failed.size == 0
    for out, geometry, side in zip(outs, where, sides, strict=True):
        decibels = psnr(out, by_pillow(files, geometry, side))
        assert decibels.min() > 45
        assert np.median(decibels) > 54


def test_a_box_as_large_as_the_view_is_the_decoded_picture_itself():
    files = [jpeg(300, 400, seed) for seed in range(4)]
    rows, _alive = in_memory(files)
    boxes = np.array([(0, 0, 224, 224), (76, 176, 224, 224), (31, 57, 224, 224), (16, 48, 224, 224)])
    (out,), _ = views(rows, [Geometry(boxes, np.zeros(4, bool))], [224])
    for view, data, (top, left, high, wide) in zip(out, files, boxes, strict=True):
        assert np.array_equal(view, np.asarray(decoded(data))[top : top + high, left : left + wide])


def test_plain_arithmetic_threads_and_company_change_no_bit():
    files = [jpeg(200 + 13 * seed, 300 - 7 * seed, seed) for seed in range(12)]
    rows, _alive = in_memory(files)
    where = [random_boxes(rows, 5), random_boxes(rows, 6)]
    fast, _ = views(rows, where, [160, 64], threads=3)
    plain, _ = views(rows, where, [160, 64], threads=1, simd=False)
    alone, _ = views(rows, where[1:], [64])
    assert np.array_equal(fast[0], plain[0])
    assert np.array_equal(fast[1], plain[1])
    assert np.array_equal(fast[1], alone[0])
    part, _ = views(rows[5:6], [Geometry(where[0].boxes[5:6], where[0].flip[5:6])], [160])
    assert np.array_equal(fast[0][5], part[0][0])


def test_height_and_width_whose_filters_have_one_place_get_one_each():
    """377 is a Fibonacci number: multiplied by the golden ratio, lengths that far apart lie beside one another."""
    files = [jpeg(60, 440, 3)] * 60
    rows, _alive = in_memory(files)
    boxes = np.array([(60 - high, 3, high, high + 377) for high in range(1, 61)])
    where = Geometry(boxes, np.arange(60) % 2 == 0)
    (out,), failed = views(rows, [where], [24], threads=1)
    assert failed.size == 0
    assert psnr(out, by_pillow(files, where, 24)).min() > 45


def test_what_is_wrong_with_a_picture_is_said_of_that_one_alone(tmp_path: Path):
    files = [jpeg(120, 160, seed) for seed in range(7)]
    rows, alive = in_memory(files)
    where = Geometry(np.tile([10, 10, 100, 140], (7, 1)), np.zeros(7, bool))
    good, _ = views(rows, [where], [64])
    rows["sum"][1] = 0
    rows["size"][1] //= 2  # cut in half
    alive[2] = np.frombuffer(b"no JPEG at all, but long enough" * 9, np.uint8)
    rows["data"][2], rows["size"][2], rows["sum"][2] = alive[2].ctypes.data, alive[2].size, 0
    rows["width"][3] = 161
    flipped = bytearray(files[4])
    flipped[700] ^= 4
    alive[4] = np.frombuffer(bytes(flipped), np.uint8)
    rows["data"][4] = alive[4].ctypes.data
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 100 + files[5] + files[6][:-9])
    file = os.open(path, os.O_RDONLY)
    rows["file"][5:], rows["offset"][5:], rows["data"][5:] = file, (100, 100 + len(files[5])), 0
    (out,), failed = views(rows, [where], [64])
    os.close(file)
    assert failed.tolist() == [1, 2, 3, 4, 6]
    assert rows["status"].tolist() == [0, 1, 1, 2, 5, 0, 4]
    assert set(rows["status"][failed]) <= decoder.FAILURES.keys()
    assert np.array_equal(out[[0, 5]], good[0][[0, 5]])


def raw_rows(images: list[Image.Image]) -> tuple[np.ndarray, list[np.ndarray]]:
    """As in_memory, of pixels."""
    arrays = [np.asarray(image).reshape(-1).copy() for image in images]
    rows = np.zeros(len(images), decoder.SAMPLE)
    for row, array, image in zip(rows, arrays, images, strict=True):
        row["data"], row["size"], row["file"], row["raw"] = array.ctypes.data, array.size, -1, 1
        row["height"], row["width"], row["sum"] = image.height, image.width, decoder.checksum(array)
    return rows, arrays


@pytest.mark.parametrize("simd", [True, False])
def test_views_of_raw_pixels_are_pillows_beside_jpegs_in_one_batch(simd):
    sizes = [(333, 500), (97, 131), (16, 16), (15, 241), (1, 1), (640, 33), (2, 3)]
    images = [picture(seed, width, height) for seed, (height, width) in enumerate(sizes * 2)]
    files = [encoded(image, "PNG") for image in images]
    rows, _alive = raw_rows(images)
    compressed, _alive_too = in_memory([jpeg(120, 160, 40 + seed) for seed in range(3)])
    mixed = np.concatenate([rows[:7], compressed, rows[7:]])
    where, sides = [random_boxes(mixed, seed) for seed in (1, 2)], [112, 33]
    outs, failed = views(mixed, where, sides, simd=simd)
    assert failed.size == 0
    of_raw = np.flatnonzero(mixed["raw"])
    for out, geometry, side in zip(outs, where, sides, strict=True):
        mine = Geometry(geometry.boxes[of_raw], geometry.flip[of_raw])
        truth = by_pillow(files, mine, side)
        assert psnr(out[of_raw], truth).min() > 50
        assert np.abs(out[of_raw].astype(int) - truth).max() <= 1
        slow = np.zeros_like(out)
        assert decoder.PillowDecoder(2).decode(mixed, [geometry], [slow]).size == 0
        assert np.array_equal(slow[of_raw], truth)


def test_raw_pixels_of_another_size_are_no_picture():
    for size in (3 * 40 * 30 - 1, 3 * 40 * 30 + 1, 0):
        rows, _alive = raw_rows([picture(1, 40, 31), picture(2, 40, 30)])
        rows["height"][0], rows["size"][0], rows["sum"][0] = 30, size, 0
        where = Geometry(np.tile([5, 5, 20, 30], (2, 1)), np.zeros(2, bool))
        _, failed = views(rows, [where], [16])
        assert (failed.tolist(), rows["status"].tolist()) == ([0], [decoder.OTHER_PICTURE, decoder.DONE])
        rows["status"] = 0
        assert decoder.PillowDecoder(1).decode(rows, [where], [np.zeros((2, 16, 16, 3), np.uint8)]).tolist() == [0]
        assert rows["status"].tolist() == [decoder.OTHER_PICTURE, decoder.DONE]


def test_a_fetched_batch_is_files_that_pillow_opens(tmp_path):
    """What DALI is fed with: raw pixels become portable pixmaps."""
    images = [picture(seed, 50 + seed, 40) for seed in range(4)]
    rows, _alive = raw_rows(images)
    source = jpeg(60, 70, 9)
    compressed, _alive_too = in_memory([source])
    mixed = np.concatenate([rows[:2], compressed, rows[2:]])
    parts = [images[0].tobytes(), images[1].tobytes(), source, images[2].tobytes(), images[3].tobytes()]
    (tmp_path / "shard").write_bytes(b"x" * 7 + b"".join(parts))
    mixed["offset"] = 7 + np.cumsum([0, *map(len, parts[:-1])])
    handle = os.open(tmp_path / "shard", os.O_RDONLY)
    mixed["file"], mixed["data"] = handle, 0
    files, failed = decoder.fetch(decoder.RegionDecoder(2), mixed)
    os.close(handle)
    assert failed.size == 0
    assert files[2].tobytes() == source
    for file, image in zip([files[0], files[1], files[3], files[4]], images, strict=True):
        with Image.open(io.BytesIO(file.tobytes())) as found:
            assert (found.format, found.size, found.tobytes()) == ("PPM", image.size, image.tobytes())
    where = random_boxes(mixed, 3)
    (out,), failed = views(mixed, [where], [24])  # the rows point into the fetched files now
    assert failed.size == 0
    first = Geometry(where.boxes[:1], where.flip[:1])
    assert psnr(out[:1], by_pillow([encoded(images[0], "PNG")], first, 24)).min() > 50


def test_a_closed_file_is_a_failure_and_no_crash(tmp_path: Path):
    rows, _alive = in_memory([jpeg(40, 40, 1)])
    rows["file"] = 999_999
    _, failed = views(rows, [random_boxes(rows, 1)], [16])
    assert failed.tolist() == [0]
    assert rows["status"].tolist() == [4]


def test_pictures_come_from_threads_that_may_be_left_behind():
    """One hangs in the third picture; the other goes on."""
    free, found = threading.Event(), []

    def work(place: int) -> int:
        if place == 2:
            free.wait(60)
        return 10 * place

    with pytest.raises(queue.Empty):
        found.extend(decoder.in_threads(work, 6, 2, patience=0.5))
    assert sorted(found) == [(place, 10 * place) for place in (0, 1, 3, 4, 5)]
    left = [thread for thread in threading.enumerate() if thread.name == "pictures"]
    assert left
    assert all(thread.daemon for thread in left)
    free.set()
    for thread in left:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(decoder.in_threads(work, 200, 3)) == [(place, 10 * place) for place in range(200)]


def test_what_a_picture_raises_ends_the_others():
    seen = []

    def work(place: int) -> None:
        seen.append(place)
        if place == 5:
            raise ValueError("picture 5")

    with pytest.raises(ValueError, match="picture 5"):
        list(decoder.in_threads(work, 100_000, 2))
    assert len(seen) < 100_000


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 100_001])
def test_the_checksum_is_the_same_in_c_and_changes_with_every_bit(size):
    draw = np.random.default_rng(size)
    data = draw.integers(0, 256, size, np.uint8)
    seen = {decoder.checksum(data)}
    assert decoder.checksum_in_c(data) in seen
    for bit in draw.integers(0, 8 * size, 50):
        changed = data.copy()
        changed[bit // 8] ^= 1 << (bit % 8)
        seen.add(decoder.checksum(changed))
        assert decoder.checksum_in_c(changed) == decoder.checksum(changed) != decoder.checksum(data)


def test_without_a_compiler_the_reason_is_said(monkeypatch, tmp_path):
    source = tmp_path / "native" / "crops.c"
    source.parent.mkdir()
    source.write_text("int no = main;")
    monkeypatch.setattr(native, "SOURCE", source)
    with pytest.raises(OSError, match=r"failed: .*crops\.c.*; libjpeg-turbo's headers come with libjpeg-dev"):
        native.built()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(OSError, match="no C compiler"):
        native.built()
    assert list(source.parent.iterdir()) == [source]  # nothing half-made is left
