"""A store whose own files are damaged: one sentence, never a wrong label and never the end of the process."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, ResourceError
from pipeline.inflated import Inflated
from pipeline.loader import open_loader
from pipeline.sampling import View
from pipeline.store import MANIFEST, Store
from tests.conftest import COUNT, PYTHON, needs_ffcv
from tests.test_verify import flip

VIEWS = {"small": View(side=16)}


@pytest.fixture
def copy(store_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "copy"))


@pytest.mark.parametrize("backend", ["shards", "dali", "resident", pytest.param("ffcv", marks=needs_ffcv)])
@pytest.mark.parametrize("name", ["index.npy", "labels.npy"])
def test_a_flipped_bit_in_a_table_is_found_when_a_loader_opens(copy: Path, name: str, backend):
    flip(copy / name, (copy / name).stat().st_size - 3)
    with pytest.raises(DataError, match=rf"{name} is not what was written: its sha256 differs"):
        open_loader(Store.open(copy), VIEWS, batch=20, backend=backend, label="class")


def test_of_two_stores_both_have_their_tables_checked(store_path: Path, copy: Path):
    real = Store.open(store_path)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["generated"] = {"real": real.fingerprint, "generator": "0" * 16}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    flip(copy / "index.npy", (copy / "index.npy").stat().st_size - 3)
    with pytest.raises(DataError, match=r"copy/index\.npy is not what was written"):
        open_loader(Inflated.join(real, copy, 1), VIEWS, batch=20, backend="shards")


def test_tables_are_mapped_until_a_loader_holds_them(store_path: Path):
    store = Store.open(store_path)
    before = store.index, store.labels
    assert all(isinstance(table, np.memmap) for table in before)
    open_loader(store, VIEWS, batch=20, backend="shards").close()
    assert not any(isinstance(table, np.memmap) for table in (store.index, store.labels))
    assert np.array_equal(store.index, before[0])
    assert np.array_equal(store.labels, before[1])


TRUNCATED = """
import os, sys
from pipeline.loader import open_loader
from pipeline.sampling import View
from pipeline.store import Store
loader = open_loader(Store.open(sys.argv[1]), {"small": View(side=16)}, batch=20, backend="shards", label="class")
for name in ("index.npy", "labels.npy"):
    os.truncate(os.path.join(sys.argv[1], name), 0)
print(sum(len(batch.id) for batch in loader.epoch(0)))
"""


def test_a_table_that_is_cut_short_under_a_run_costs_nothing(copy: Path):
    """Through a memory map the process would be killed by SIGBUS."""
    done = subprocess.run([PYTHON, "-c", TRUNCATED, str(copy)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, f"{COUNT // 20 * 20}\n"), done.stderr


@pytest.mark.parametrize("at", [0, 6, 8, 10])  # mark, version and length of the header, and the header
@pytest.mark.parametrize("name", ["index", "labels"])
def test_a_table_with_a_damaged_header_is_a_sentence(copy: Path, name: str, at: int):
    flip(copy / f"{name}.npy", at)
    with pytest.raises(DataError, match=rf"{name}\.npy is damaged \(.*\)\. Convert the images again\."):
        getattr(Store.open(copy), name)


def change(root: Path, work: Callable[[dict], object]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    work(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


MANIFESTS: dict[str, Callable[[dict], object]] = {
    "no files": lambda facts: facts.pop("files"),
    "files as a list": lambda facts: facts.update(files=list(facts["files"])),
    "a file without its size": lambda facts: facts["files"]["index.npy"].pop("bytes"),
    "a file without its digest": lambda facts: facts["files"]["index.npy"].pop("sha256"),
    "a file without facts": lambda facts: facts["files"].update({"index.npy": None}),
    "no labels": lambda facts: facts["files"].pop("labels.npy"),
    "a shard that nobody vouches for": lambda facts: facts["shards"].append("shard-00009.tar"),
    "a count in words": lambda facts: facts.update(count="many"),
    "no columns": lambda facts: facts.pop("columns"),
    "no height": lambda facts: facts.pop("max_height"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest_is_a_sentence(copy: Path, name: str):
    change(copy, MANIFESTS[name])
    with pytest.raises(DataError, match=r"manifest\.json cannot be read \(.+\)\. Convert the images again\.") as caught:
        Store.open(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b'{"format": 2, "\xff": 0}', b"[2]", b"2", b"", b"[" * 100_000])
def test_what_is_no_manifest_at_all_is_a_sentence(copy: Path, content: bytes):
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        Store.open(copy)


def test_a_count_that_is_not_the_tables_is_found(copy: Path):
    change(copy, lambda facts: facts.update(count=COUNT - 1))
    with pytest.raises(DataError, match=rf"index\.npy is damaged \(it holds \({COUNT},\) "):
        open_loader(Store.open(copy), VIEWS, batch=20, backend="shards")


def test_a_disk_that_cannot_be_read_is_no_damage(copy: Path, monkeypatch):
    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    store = Store.open(copy)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ResourceError, match=r"index\.npy cannot be read: Input/output error\. Look at the disk"):
        store.hold_tables()
    with pytest.raises(ResourceError, match=r"manifest\.json cannot be read: Input/output error\. Look at the disk"):
        Store.open(copy)


def test_a_name_that_is_no_text_still_names_a_sample(copy: Path):
    names = copy / "names.txt"
    names.write_bytes(b"\xff" + names.read_bytes()[1:])
    assert Store.open(copy).name(0).startswith("�")
    store = Store.open(copy)
    names.unlink()
    assert store.name(0) == "unknown"
