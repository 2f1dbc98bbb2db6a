"""Every backend gives the same batches, near Pillow's pixels, from any step on; damage ends in a sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import decoder as decoders
from pipeline import sampling
from pipeline.beton import FIELD_BYTES, HEADER, SAMPLE, VERSION, picture_offsets
from pipeline.errors import DataError, ResourceError, StalledError, UsageError
from pipeline.ffcv_writer import ffcv_missing
from pipeline.inflated import Inflated
from pipeline.loader import Loader, open_loader
from pipeline.sampling import View
from pipeline.shard_loader import Blocks
from pipeline.store import Store
from pipeline.stored import StoredPictures
from tests.conftest import COUNT, PYTHON, needs_compiler, needs_ffcv
from tests.images import make_folder, psnr
from tests.slow_disk import slow_disk
from tools import convert

VIEWS = {"holed": View(side=64, mask_ratio=0.75), "small": View(side=32, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2)}
BATCH = 20


BACKENDS = [
    pytest.param("ffcv", marks=needs_ffcv), "shards", "dali", "resident",
]  # fmt: skip


@pytest.fixture(scope="module", params=BACKENDS)
def loader(store: Store, request) -> Iterator[Loader]:
    opened = open_loader(store, VIEWS, batch=BATCH, seed=3, backend=request.param, label="class")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shards(store: Store) -> Iterator[Loader]:
    opened = open_loader(store, VIEWS, batch=BATCH, seed=3, backend="shards", label="class")
    yield opened
    opened.close()


def reference(store: Store, ids: np.ndarray, name: str, epoch: int, seed: int = 3) -> np.ndarray:
    """Pillow's crop and antialiased bilinear resize of the stored pictures, mirrored where a flip was drawn."""
    stored, view = StoredPictures.in_shards(store), VIEWS[name]
    sizes = np.stack([store.index["height"], store.index["width"]], axis=1)
    where = sampling.geometry(view, name, seed, epoch, ids, sizes[ids])
    made = []
    for sample, (top, left, high, wide), flip in zip(ids, where.boxes, where.flip, strict=True):
        crop = Image.fromarray(stored.picture(int(sample)))
        crop = crop.crop((left, top, left + wide, top + high)).resize((view.side,) * 2, Image.Resampling.BILINEAR)
        made.append(np.asarray(crop)[:, ::-1] if flip else np.asarray(crop))
    return np.stack(made)


def agreement(loader: Loader, store: Store) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in VIEWS}
    for batch in loader.epoch(1):
        for name in VIEWS:
            truth = reference(store, batch.id.numpy(), name, 1)
            found[name].append(psnr(batch.images[name].numpy(), truth))
    return {name: np.concatenate(each) for name, each in found.items()}


def test_pixels_are_pillows(loader, store):
    for decibels in agreement(loader, store).values():
        assert len(decibels) == COUNT // BATCH * BATCH
        assert decibels.min() >= 45
        assert np.median(decibels) >= 50


def test_without_a_compiler_pixels_are_pillows_to_the_bit(store, raw_path, monkeypatch):
    def refuse(*_):
        raise OSError("no C compiler")

    monkeypatch.setattr(decoders.native, "library", refuse)
    for each in (store, Store.open(raw_path)):
        plain = open_loader(each, VIEWS, batch=BATCH, seed=3, backend="shards")
        assert isinstance(plain.source.decoder, decoders.PillowDecoder)
        for batch in plain.epoch(1):
            for name in VIEWS:
                assert np.array_equal(batch.images[name].numpy(), reference(each, batch.id.numpy(), name, 1))
        plain.close()


@pytest.fixture(scope="module")
def raw_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures in four classes, stored as pixels, in both backends where FFCV is installed."""
    root = tmp_path_factory.mktemp("raw")
    make_folder(root / "images", 2 * BATCH, 96, 4)
    words = [str(root / "images"), str(root / "store"), "--pixels", "raw", "--quiet"]
    assert convert.main([*words, "--backends", "both" if ffcv_missing() is None else "dali"]) == 0
    return root / "store"


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_raw_store_are_pillows(raw_path, backend):
    store = Store.open(raw_path)
    opened = open_loader(store, VIEWS, batch=BATCH, seed=3, backend=backend, label="class")
    for decibels in agreement(opened, store).values():
        assert len(decibels) == 2 * BATCH
        assert decibels.min() > 50
    opened.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_byte_that_changed_in_a_raw_store_is_never_shown(raw_path, tmp_path, backend):
    shutil.copytree(raw_path, tmp_path / "damaged")
    store = Store.open(raw_path)
    with contextlib.closing(StoredPictures.in_shards(store)) as stored:
        pixels = stored.read(17).tobytes()
    for file in [*(tmp_path / "damaged").glob("*.tar"), *(tmp_path / "damaged").glob("*.beton")]:
        data = file.read_bytes()
        assert data.count(pixels) == 1
        file.write_bytes(data.replace(pixels, pixels[:-1] + bytes([pixels[-1] ^ 1])))
    with pytest.raises(DataError, match=r"sample 17 of .* its bytes are not those that were converted"):
        list(open_loader(Store.open(tmp_path / "damaged"), VIEWS, batch=BATCH, backend=backend).epoch(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_pixels_and_jpegs_are_read_as_one_store(store, raw_path, backend):
    """As generated images may be, beside real ones."""
    raw = Store.open(raw_path)
    manifest = store.manifest | {
        "count": store.count + raw.count,
        "max_height": max(store.max_height, raw.max_height),
        "max_width": max(store.max_width, raw.max_width),
    }
    both = Inflated(store.root, manifest, store, raw, 1)
    opened = open_loader(both, VIEWS, batch=BATCH, seed=3, backend=backend)
    for decibels in agreement(opened, both).values():
        assert len(decibels) == (store.count + raw.count) // BATCH * BATCH
        assert decibels.min() >= 45
    opened.close()


def test_every_backend_gives_the_same_batches(loader, shards):
    for one, other in zip(loader.epoch(2), shards.epoch(2), strict=True):
        assert torch.equal(one.id, other.id)
        assert torch.equal(one.label, other.label)
        for name in VIEWS:
            assert psnr(one.images[name].numpy(), other.images[name].numpy()).min() > 45


@needs_ffcv
def test_the_beton_holds_the_bytes_of_the_shards(store, shards):
    other = open_loader(store, VIEWS, batch=BATCH, seed=3, backend="ffcv")
    for one, two in zip(shards.epoch(0), other.epoch(0), strict=True):
        assert all(torch.equal(one.images[name], two.images[name]) for name in VIEWS)
    other.close()


@pytest.mark.slow
@needs_ffcv
def test_ffcv_itself_finds_the_same_pictures_in_the_beton(store, tmp_path):
    assert store.beton is not None
    code = (
        "import sys, numpy as np; from ffcv.reader import Reader; "
        "np.save(sys.argv[2], Reader(sys.argv[1]).metadata['f0']['data_ptr'])"
    )
    answer = tmp_path / "pointers.npy"
    subprocess.run([PYTHON, "-c", code, str(store.beton), str(answer)], check=True, timeout=120)
    assert np.array_equal(picture_offsets(store.beton, store.count), np.load(answer))


def test_an_epoch_repeats_itself_and_resumes_anywhere(loader):
    whole = [(b.id.clone(), b.images["holed"].clone()) for b in loader.epoch(4)]
    assert len(whole) == loader.batches == COUNT // BATCH
    tail = list(loader.epoch(4, start=3))
    assert len(tail) == len(whole) - 3
    for batch, (ids, pixels) in zip(tail, whole[3:], strict=True):
        assert torch.equal(batch.id, ids)
        assert torch.equal(batch.images["holed"], pixels)
    assert len({int(i) for ids, _ in whole for i in ids}) == BATCH * len(whole)


def test_batches_and_parts_of_them_are_the_callers_to_keep(shards):
    kept, copies = [], []
    for batch in shards.epoch(5):
        kept.append(batch)
        copies.append({name: pixels.clone() for name, pixels in batch.images.items()})
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(batch.images[name], copy[name]) for name in VIEWS)
    part = kept[0].images["small"][3:5]
    del kept, batch
    places = set()
    for _ in range(4):
        for batch, copy in zip(shards.epoch(5), copies, strict=True):
            assert all(torch.equal(batch.images[name], copy[name]) for name in VIEWS)
            assert torch.equal(part, copies[0]["small"][3:5])
            places.add(batch.images["small"].data_ptr())
    assert len(places) <= shards.ahead + 3


def test_memory_is_used_again_once_nothing_shows_a_part_of_it():
    blocks, shape = Blocks(1), (8, 4, 4, 3)
    whole = torch.from_numpy(blocks.take(shape))
    place, part = whole.data_ptr(), whole.numpy()[3:5]
    del whole
    assert blocks.take(shape).ctypes.data != place
    del part
    others = [np.empty(shape, np.uint8) for _ in range(20)]  # memory that had been given back would be theirs
    assert all(other.ctypes.data != place for other in others)
    assert blocks.take((7, 4, 4, 3)).ctypes.data != place
    assert blocks.take(shape).ctypes.data == place


def test_a_sample_has_the_same_pixels_at_any_batch_size_and_worker_count(shards, store):
    expected = {int(i): p for b in shards.epoch(0) for i, p in zip(b.id, b.images["small"].clone(), strict=True)}
    other = open_loader(store, VIEWS, batch=7, seed=3, backend="shards", workers=3)
    compared = 0
    for batch in other.epoch(0):
        for sample, pixels in zip(batch.id, batch.images["small"], strict=True):
            if int(sample) in expected:
                assert torch.equal(pixels, expected[int(sample)])
                compared += 1
    other.close()
    assert compared >= COUNT - 2 * BATCH


def test_an_ordered_pass_sees_every_image_once_with_its_label(store):
    loader = open_loader(store, {"eval": View(side=32, centre=1.0)}, batch=36, shuffle=False, label="class")
    batches = list(loader.epoch(0))
    loader.close()
    assert torch.cat([b.id for b in batches]).tolist() == list(range(COUNT))
    assert torch.cat([b.label for b in batches]).tolist() == store.label("class")[0].tolist()
    assert [len(b.id) for b in batches] == [36, 36, 24]


def test_fewer_images_than_a_batch(store):
    with pytest.raises(DataError, match=f"{COUNT} images, fewer than one batch of 100"):
        open_loader(store, VIEWS, batch=100)


def test_uneven_ranks(store):
    with pytest.raises(UsageError, match="divided evenly"):
        open_loader(store, VIEWS, batch=20, ranks=3)


def test_an_abandoned_epoch_leaves_no_thread_behind(loader):
    before = threading.active_count()
    for _ in range(3):
        iterator = loader.epoch(0)
        next(iterator)
        iterator.close()
    assert threading.active_count() <= before


@pytest.fixture
def damaged_path(store_path: Path, tmp_path: Path) -> Path:
    """A copy of the store with one JPEG overwritten, in the shard and in the .beton; sizes unchanged."""
    root = tmp_path / "damaged"
    shutil.copytree(store_path, root)
    store = Store.open(store_path)
    jpeg = StoredPictures.in_shards(store).read(17).tobytes()
    for file in [*root.glob("*.tar"), *root.glob("*.beton")]:
        data = file.read_bytes()
        assert data.count(jpeg) == 1
        file.write_bytes(data.replace(jpeg, b"\xff\xd8" + bytes(len(jpeg) - 2)))
    return root


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_sample_is_named_and_never_shown_as_black(damaged_path, backend):
    with pytest.raises(DataError, match=r"sample 17 of .*(damaged|not those that were converted).* at byte .*jpg\)"):
        list(open_loader(Store.open(damaged_path), VIEWS, batch=BATCH, backend=backend).epoch(0))


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=needs_ffcv), "shards", "dali"])
def test_a_store_that_is_cut_short_while_it_is_read(store_path, tmp_path, backend):
    root = tmp_path / "cut"
    shutil.copytree(store_path, root)
    opened = open_loader(Store.open(root), VIEWS, batch=BATCH, backend=backend)
    next(iter(opened.epoch(0)))
    for file in [*root.glob("*.tar"), *root.glob("*.beton")]:
        os.truncate(file, file.stat().st_size // 3)
    with pytest.raises(DataError, match=r"sample \d+ of .*the file ends before it"):
        list(opened.epoch(1))
    opened.close()


@needs_ffcv
def test_a_beton_whose_table_was_never_written_is_refused(store_path, tmp_path):
    root = tmp_path / "cut"
    shutil.copytree(store_path, root)
    beton = root / "images.beton"
    data = bytearray(beton.read_bytes())
    data[16:24] = bytes(8)
    beton.write_bytes(data)
    with pytest.raises(DataError, match="incomplete"):
        open_loader(Store.open(root), VIEWS, batch=BATCH, backend="ffcv")


def test_a_beton_that_ends_within_its_rows_is_refused(tmp_path):
    path = tmp_path / "images.beton"
    header = np.array([(VERSION, 2, 1 << 21, 5, 50)], HEADER)
    path.write_bytes(header.tobytes() + bytes(2 * FIELD_BYTES + 2 * SAMPLE.itemsize))
    with pytest.raises(DataError, match=r"images\.beton ends after 2 of 5 rows\. Convert the images again\."):
        picture_offsets(path, 5)


def test_a_file_of_another_size_is_refused_at_opening(store_path, tmp_path):
    root = tmp_path / "short"
    shutil.copytree(store_path, root)
    shard = root / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-00000\.tar has .* bytes, the manifest says"):
        Store.open(root)


def test_a_folder_without_manifest_is_no_store(tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Store.open(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        Store.open(tmp_path / "nowhere")


class _Hanging:
    def batches(self, plan, where):
        time.sleep(5)
        yield {}

    def doing(self) -> str:
        return "waiting for a tape"

    def close(self) -> None: ...


class _Broken(_Hanging):
    def batches(self, plan, where):
        raise ValueError("disk on fire")
        yield


@pytest.mark.parametrize(
    ("source", "words"), [(_Hanging(), "no batch for 0 s: it is waiting for a tape"), (_Broken(), "disk on fire")]
)
def test_a_loader_that_hangs_or_breaks_ends_the_wait(store, source, words):
    loader = Loader(
        store, source, VIEWS, batch=BATCH, seed=0, device=torch.device("cpu"), label=None, shuffle=True,
        stall_seconds=0.5, rank=0, ranks=1,
    )  # fmt: skip
    begin = time.monotonic()
    with pytest.raises(StalledError, match=words):
        next(iter(loader.epoch(0)))
    assert time.monotonic() - begin < 4


class _Failing(_Hanging):
    def __init__(self, error: BaseException):
        self.error = error

    def batches(self, plan, where):
        raise self.error
        yield


class _Stuck(_Hanging):
    """Makes one batch and hangs in the second."""

    def __init__(self):
        self.free = threading.Event()

    def batches(self, plan, where):
        yield {}
        self.free.wait(60)


def loader_of(store: Store, source: _Hanging, stall_seconds: float = 10.0) -> Loader:
    return Loader(
        store, source, VIEWS, batch=BATCH, seed=0, device=torch.device("cpu"), label=None, shuffle=True,
        stall_seconds=stall_seconds, rank=0, ranks=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), r"no memory for its batches \(MemoryError\)\. Use a smaller --batch"),
        (torch.OutOfMemoryError("tried to allocate 3 GiB"), "no memory for its batches"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "smaller --batch"),
        (OSError(errno.EIO, "Input/output error", "shard-00000.tar"), "shard-00000.tar cannot be read: Input/output"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "no memory"),
    ],
)
def test_what_the_machine_lacks_has_the_code_of_a_resource(store, error, words):
    with pytest.raises(ResourceError, match=words):
        next(loader_of(store, _Failing(error)).epoch(0))


def test_an_epoch_that_is_left_beside_a_hung_read_is_not_waited_for(store):
    """Though a read may hang for five minutes before it is given up: who leaves has pressed Ctrl-C."""
    source = _Stuck()
    loader = loader_of(store, source, stall_seconds=300.0)
    epoch = loader.epoch(0)
    next(epoch)
    begin = time.monotonic()
    epoch.close()
    assert time.monotonic() - begin < 20
    # Its thread is still in the source, which serves one thread at a time.
    loader.stall_seconds = 0.2
    with pytest.raises(StalledError, match="waiting for a tape for an epoch that was left"):
        next(loader.epoch(1))
    source.free.set()
    loader.stall_seconds = 30.0
    assert len(next(loader.epoch(1)).id) == BATCH


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loader_may_be_closed_twice(store, backend):
    opened = open_loader(store, VIEWS, batch=BATCH, backend=backend)
    opened.close()
    opened.close()


# --- who is at fault --------------------------------------------------------------------------------------------------


class _Refusing(decoders.PillowDecoder):
    """Gives one picture this status."""

    def __init__(self, status: int):
        super().__init__(1)
        self.status = status

    def decode(self, samples, where, outs) -> np.ndarray:
        samples["status"][3] = self.status
        return np.array([3])


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (decoders.NO_MEMORY, r"no memory to decode sample \d+ of .*\. Use fewer --workers or a smaller --batch\."),
        (decoders.UNREADABLE, r"shard-00000\.tar could not be read, and a moment later it could\. Look at the disk"),
    ],
)
def test_what_is_not_wrong_with_the_picture_is_no_damage(store, monkeypatch, status: int, words: str):
    opened = open_loader(store, VIEWS, batch=BATCH, backend="shards")
    genuine = opened.source.decoder
    monkeypatch.setattr(opened.source, "decoder", _Refusing(status))
    with pytest.raises(ResourceError, match=words):
        list(opened.epoch(0))
    genuine.close()
    opened.close()


def test_pillow_without_memory_says_so(store, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(decoders.native, "_load", lambda: "no C compiler")
    monkeypatch.setattr(decoders, "_cut", full)
    opened = open_loader(store, VIEWS, batch=BATCH, backend="shards")
    with pytest.raises(ResourceError, match=r"no memory to decode sample \d+ of "):
        list(opened.epoch(0))
    opened.close()


@pytest.mark.parametrize(
    "words", ["Can't allocate 129499136 bytes on device 0.", "CUDA allocation failed", "bad_alloc"]
)
def test_dali_without_memory_says_so(store, monkeypatch, words: str):
    def run():
        raise RuntimeError(f"Critical error in pipeline:\n{words}\nCurrent pipeline object is no longer valid.")

    opened = open_loader(store, VIEWS, batch=BATCH, backend="dali")
    monkeypatch.setattr(opened.source.pipeline, "run", run)
    with pytest.raises(ResourceError, match=rf"DALI has no memory to decode {BATCH} pictures at once"):
        list(opened.epoch(0))
    opened.close()


def test_what_dali_says_of_pictures_that_are_whole_is_one_line(store, monkeypatch):
    def run():
        raise RuntimeError("Critical error in pipeline:\nit gave up\n" + "frame\n" * 100)

    opened = open_loader(store, VIEWS, batch=BATCH, backend="dali")
    monkeypatch.setattr(opened.source.pipeline, "run", run)
    with pytest.raises(DataError, match=r"^DALI cannot decode: Critical error in pipeline: it gave up .{0,200}\.$"):
        list(opened.epoch(0))
    opened.close()


def test_dali_that_does_not_start_says_so(store, monkeypatch):
    from nvidia.dali.pipeline import Pipeline

    def build(self):
        raise RuntimeError("CUDA driver version\nis insufficient " + "frame\n" * 100)

    monkeypatch.setattr(Pipeline, "build", build)
    with pytest.raises(
        ResourceError, match=r"^DALI does not start on cpu: CUDA driver version is .{0,180}\. Use --loader shards\.$"
    ):
        open_loader(store, VIEWS, batch=BATCH, backend="dali")


def test_dali_pads_a_batch_to_its_own_largest_picture(store, monkeypatch):
    """Padded to the store's, one huge picture among a million would be paid for in every batch."""
    from pipeline import dali_loader

    genuine, padded, largest = dali_loader.crop_resize, [], []

    def watched(canvas, where, side: int):
        padded.append(tuple(canvas.shape[1:3]))
        return genuine(canvas, where, side)

    monkeypatch.setattr(dali_loader, "crop_resize", watched)
    opened = open_loader(store, {"small": View(side=32)}, batch=2, backend="dali")
    for batch in opened.epoch(0):
        rows = store.index[batch.id.numpy()]
        largest.append((int(rows["height"].max()), int(rows["width"].max())))
    opened.close()
    assert padded == largest
    assert len(set(largest)) > 1


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=needs_ffcv), "shards", "dali"])
def test_a_disk_that_fails_is_no_damage(store, monkeypatch, backend, compiled: bool):
    """C meets a file that cannot be read, and Python, when it looks why, the disk's error."""
    if not compiled:
        monkeypatch.setattr(decoders.native, "_load", lambda: "no C compiler")
    opened = open_loader(store, VIEWS, batch=BATCH, backend=backend)
    for file in opened.source.stored._open:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, file)
        os.close(nothing)

    def fail(*_) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ResourceError, match=r"cannot be read: Input/output error\. Look at the disk or network"):
        list(opened.epoch(0))
    opened.close()


def test_a_store_of_more_shards_than_files_that_may_be_open(store, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 20
    shards, which = [store.shards[0]] * 200, np.arange(store.count) % 200
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        stored = StoredPictures(store, shards, which, store.index["offset"])
        assert stored.picture(95).shape[:2] == (store.index["height"][95], store.index["width"][95])
        stored.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        monkeypatch.setattr("pipeline.stored.make_room_for_files", lambda count: None)  # nothing more may be had
        with pytest.raises(ResourceError, match=rf"this process may have {few:,} open at once.*`ulimit -n`"):
            StoredPictures(store, shards, which, store.index["offset"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


GROWTH = """
import sys
import psutil
from pipeline.loader import open_loader
from pipeline.sampling import View
from pipeline.store import Store
views = {"full": View(side=int(sys.argv[2])), "small": View(side=int(sys.argv[2]) // 2)}
loader = open_loader(Store.open(sys.argv[1]), views, batch=int(sys.argv[3]), backend="shards", workers=2)
process, sizes = psutil.Process(), []
before = process.memory_info().rss
for epoch in range(int(sys.argv[4])):
    for batch in loader.epoch(epoch):
        pass
    sizes.append(process.memory_info().rss)
print(max(sizes) - before, sizes[-1] - max(sizes[: len(sizes) // 5 or 1]))
"""


def growth(store: Path, side: int, batch: int, epochs: int) -> tuple[int, int]:
    """Bytes of a process beyond what it had before the first batch, at most; and after a fifth of the epochs."""
    command = [PYTHON, "-c", GROWTH, str(store), str(side), str(batch), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    most, later = map(int, done.stdout.split())
    return most, later


def test_fifty_epochs_do_not_grow(store_path):
    _, later = growth(store_path, 32, 16, 50)
    assert later < 4 << 20


def test_large_batches_stay_small_in_memory(tmp_path):
    """Batches of 256 at 224 and 112 px: three of them are under way at any time, of 48 MB each."""
    (one,) = make_folder(tmp_path / "in", 1, 400)
    for place in range(511):
        shutil.copy(one, one.with_name(f"copy-{place}.jpg"))
    words = [str(tmp_path / "in"), str(tmp_path / "store"), "--backends", "dali", "--quiet"]
    assert convert.main(words) == 0
    most, _ = growth(tmp_path / "store", 224, 256, 3)
    assert most < 1.0e9


WITHOUT_COMPILER = "native._load = lambda: 'no C compiler'"


@needs_compiler
@pytest.mark.parametrize(
    ("before", "doing"), [("pass", "reading sample "), (WITHOUT_COMPILER, "reading and decoding 20 samples of ")]
)
def test_a_disk_that_hangs_is_named(store_path, before: str, doing: str):
    """With the sample where that is known. And the process ends: threads that hang in the kernel are left behind."""
    code = (
        "import sys; from pipeline import native; from pipeline.loader import open_loader; "
        "from pipeline.sampling import View; from pipeline.store import Store; from train.command import run\n"
        f"{before}\n"
        "loader = open_loader(Store.open(sys.argv[1]), {'v': View(side=32)}, batch=20, backend='shards', "
        "stall_seconds=1.0)\n"
        "try: code = run(lambda _: next(loader.epoch(0)), [])\n"
        "finally: loader.close()\n"
        "sys.exit(code)"
    )
    begin = time.monotonic()
    done = on_a_hung_disk(code, store_path)
    assert done.returncode == 6
    assert f"no batch for 1 s: it is {doing}" in done.stderr
    assert time.monotonic() - begin < 15


@needs_compiler
def test_a_disk_that_hangs_while_the_store_is_read_into_memory_is_named(store_path):
    code = (
        "import sys; from pipeline.loader import open_loader; from pipeline.sampling import View; "
        "from pipeline.store import Store; from train.command import run\n"
        "def read(_):\n"
        "    open_loader(Store.open(sys.argv[1]), {'v': View(side=32)}, batch=20, backend='resident', "
        "stall_seconds=1.0)\n"
        "    return 0\n"
        "sys.exit(run(read, []))"
    )
    begin = time.monotonic()
    done = on_a_hung_disk(code, store_path)
    assert done.returncode == 6
    assert "nothing was read for 1 s, at sample " in done.stderr
    assert time.monotonic() - begin < 15


def on_a_hung_disk(code: str, store: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PYTHON, "-c", code, str(store)], env=slow_disk(milliseconds=20_000), capture_output=True, text=True, timeout=60
    )
