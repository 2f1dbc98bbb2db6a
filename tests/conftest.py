"""Small real stores that many tests read, converted once by the program itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.shape import Shape
from pipeline import native
from pipeline.ffcv_writer import ffcv_missing
from pipeline.store import Store
from tests.images import make_folder
from tools import convert

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other cores are other workers'

SMALL = Shape(side=32, patch=8, width=32, depth=2, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
COUNT = 96


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pictures of 80 to 150 px in four classes, both backends where FFCV is installed."""
    root = tmp_path_factory.mktemp("store")
    make_folder(root / "images", COUNT, 96, 4)
    backends = "both" if ffcv_missing() is None else "dali"
    assert convert.main([str(root / "images"), str(root / "store"), "--backends", backends, "--quiet"]) == 0
    return root / "store"


@pytest.fixture(scope="session")
def store(store_path: Path) -> Store:
    return Store.open(store_path)


@pytest.fixture(scope="session")
def unlabelled_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unlabelled")
    make_folder(root / "images", 24, 48)
    assert convert.main([str(root / "images"), str(root / "store"), "--backends", "dali", "--quiet"]) == 0
    return root / "store"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tables this small gain nothing from threads, which wait for each other where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


needs_ffcv = pytest.mark.skipif(ffcv_missing() is not None, reason="FFCV is not installed; `make setup` installs it")
needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason="no C compiler or no libjpeg headers")
PYTHON = sys.executable
