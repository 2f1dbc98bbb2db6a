"""Both backends give the same batches, near Pillow's pixels, from any step on; damage ends in a sentence."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import sampling
from pipeline.errors import DataError, StalledError, UsageError
from pipeline.jpeg import JpegReader, picture
from pipeline.loader import Loader, open_loader
from pipeline.sampling import View
from pipeline.store import Store
from tests.conftest import COUNT, needs_ffcv, psnr

VIEWS = {"holed": View(side=64, mask_ratio=0.75), "small": View(side=32, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2)}
BATCH = 20


@pytest.fixture(scope="module")
def dali(store) -> Iterator[Loader]:
    loader = open_loader(store, VIEWS, batch=BATCH, seed=3, backend="dali", label="class")
    yield loader
    loader.close()


@pytest.fixture(scope="module")
def ffcv(store) -> Iterator[Loader]:
    loader = open_loader(store, VIEWS, batch=BATCH, seed=3, backend="ffcv", label="class")
    yield loader
    loader.close()


def reference(store: Store, ids: np.ndarray, name: str, epoch: int, seed: int = 3) -> np.ndarray:
    """Pillow's crop and antialiased bilinear resize of the stored pictures, mirrored where a flip was drawn."""
    reader, view = JpegReader(store), VIEWS[name]
    sizes = np.stack([store.index["height"], store.index["width"]], axis=1)
    where = sampling.geometry(view, name, seed, epoch, ids, sizes[ids])
    made = []
    for sample, (top, left, high, wide), flip in zip(ids, where.boxes, where.flip, strict=True):
        crop = Image.fromarray(picture(reader.read(int(sample))[:]))
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


def test_dali_pixels_are_pillows(dali, store):
    for decibels in agreement(dali, store).values():
        assert len(decibels) == COUNT // BATCH * BATCH
        assert decibels.min() >= 45
        assert np.median(decibels) >= 50


@needs_ffcv
def test_ffcv_pixels_are_near_pillows(ffcv, store):
    for decibels in agreement(ffcv, store).values():
        assert decibels.min() >= 30
        assert np.median(decibels) >= 40


@needs_ffcv
def test_ffcv_gives_dalis_batches(ffcv, dali, store):
    for one, other in zip(ffcv.epoch(2), dali.epoch(2), strict=True):
        assert torch.equal(one.id, other.id)
        assert torch.equal(one.label, other.label)
        assert psnr(one.images["holed"].numpy(), other.images["holed"].numpy()).min() > 30


@needs_ffcv
def test_ffcv_leaves_torchs_threads_alone(ffcv):
    before = torch.get_num_threads()
    next(iter(ffcv.epoch(0)))
    assert torch.get_num_threads() == before


@needs_ffcv
def test_ffcv_repeats_itself_and_resumes_anywhere(ffcv):
    _same_from_any_step(ffcv)


def test_dali_repeats_itself_and_resumes_anywhere(dali):
    _same_from_any_step(dali)


def _same_from_any_step(loader: Loader) -> None:
    whole = [(b.id.clone(), b.images["holed"].clone()) for b in loader.epoch(4)]
    assert len(whole) == loader.batches == COUNT // BATCH
    tail = list(loader.epoch(4, start=3))
    assert len(tail) == len(whole) - 3
    for batch, (ids, pixels) in zip(tail, whole[3:], strict=True):
        assert torch.equal(batch.id, ids)
        assert torch.equal(batch.images["holed"], pixels)
    assert len({int(i) for ids, _ in whole for i in ids}) == BATCH * len(whole)


def test_a_sample_has_the_same_pixels_at_any_batch_size_and_worker_count(dali, store):
    expected = {int(i): p for b in dali.epoch(0) for i, p in zip(b.id, b.images["small"].clone(), strict=True)}
    other = open_loader(store, VIEWS, batch=7, seed=3, backend="dali", workers=3)
    compared = 0
    for batch in other.epoch(0):
        for sample, pixels in zip(batch.id, batch.images["small"], strict=True):
            if int(sample) in expected:
                assert torch.equal(pixels, expected[int(sample)])
                compared += 1
    other.close()
    assert compared >= COUNT - 2 * BATCH


def test_an_ordered_pass_sees_every_image_once_with_its_label(store):
    loader = open_loader(
        store, {"eval": View(side=32, centre=1.0)}, batch=36, shuffle=False, label="class", backend="dali"
    )
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


def test_an_abandoned_epoch_leaves_no_thread_behind(dali):
    before = threading.active_count()
    for _ in range(3):
        iterator = dali.epoch(0)
        next(iterator)
        iterator.close()
    assert threading.active_count() <= before


@pytest.fixture
def damaged_path(store_path: Path, tmp_path: Path) -> Path:
    """A copy of the store with one JPEG overwritten, in the shard and in the .beton; sizes unchanged."""
    root = tmp_path / "damaged"
    shutil.copytree(store_path, root)
    store = Store.open(store_path)
    reader = JpegReader(store)
    jpeg = reader.read(17).tobytes()
    for file in [*root.glob("*.tar"), *root.glob("*.beton")]:
        data = file.read_bytes()
        assert data.count(jpeg) == 1
        file.write_bytes(data.replace(jpeg, b"\xff\xd8" + bytes(len(jpeg) - 2)))
    return root


def test_dali_names_a_damaged_sample(damaged_path):
    loader = open_loader(Store.open(damaged_path), VIEWS, batch=BATCH, backend="dali")
    with pytest.raises(DataError, match=r"sample 17 of .*damaged.*shard-00000\.tar at byte"):
        list(loader.epoch(0))


@needs_ffcv
def test_ffcv_names_a_damaged_sample_instead_of_showing_black(damaged_path):
    loader = open_loader(Store.open(damaged_path), VIEWS, batch=BATCH, backend="ffcv")
    with pytest.raises(DataError, match=r"sample 17 of .*damaged"):
        list(loader.epoch(0))


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
    def canvases(self, ids):
        time.sleep(5)
        yield torch.zeros(len(ids[0]), 8, 8, 3, dtype=torch.uint8)

    def close(self) -> None: ...


class _Broken(_Hanging):
    def canvases(self, ids):
        raise ValueError("disk on fire")
        yield


@pytest.mark.parametrize(("source", "words"), [(_Hanging(), "no batch for"), (_Broken(), "disk on fire")])
def test_a_loader_that_hangs_or_breaks_ends_the_wait(store, source, words):
    loader = Loader(
        store, source, VIEWS, batch=BATCH, seed=0, device=torch.device("cpu"), label=None, shuffle=True,
        stall_seconds=0.5, rank=0, ranks=1,
    )  # fmt: skip
    begin = time.monotonic()
    with pytest.raises(StalledError, match=words):
        next(iter(loader.epoch(0)))
    assert time.monotonic() - begin < 4
