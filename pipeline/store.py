"""A converted data set on disk: what `daae convert` writes and every loader reads.

    STORE/
      manifest.json     written last; a folder without it is not a store
      index.npy         one INDEX row per image: where its JPEG lies, how large it is
      labels.npy        (count, columns) int32, -1 where unknown
      names.txt         the source path of each image, relative, one per line, newlines escaped
      shard-00000.tar   WebDataset shards: NNNNNNNNN.jpg and NNNNNNNNN.cls per image, USTAR
      shard-00000.idx   the same shard's index in the format that DALI's reader takes
      images.beton      the same JPEG bytes in an FFCV file (fields `image` and `label`)
      bad_files.jsonl   what was rejected, and why
      stats.json        how the conversion went: seconds, rates, sides

The place of an image in `index.npy` is its **sample id**: every random choice of training is keyed by it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.errors import DataError

FORMAT = 2  # 2: a checksum for each sample
MANIFEST = "manifest.json"
BETON = "images.beton"

# offset counts from the start of the shard to the first byte of the JPEG, not to its tar header; sum is
# decoder.checksum of the JPEG.
INDEX = np.dtype([
    ("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("height", "<u2"), ("width", "<u2"), ("sum", "<u8"),
])  # fmt: skip


@dataclass(frozen=True)
class Store:
    """An opened store. `index` and `labels` are memory-mapped: opening costs the same for any count."""

    root: Path
    manifest: dict

    @classmethod
    def open(cls, root: Path | str) -> Store:
        """Read the manifest and check that every file it names is there with its size.

        Raises DataError: no manifest (never finished, or not a store), another format, a file missing or resized.
        """
        root = Path(root)
        path = root / MANIFEST
        if not path.is_file():
            what = "is not a folder" if not root.is_dir() else f"has no {MANIFEST}"
            raise DataError(f"{root} {what}: it is no finished store. Make one with `daae convert IMAGES {root}`.")
        try:
            manifest = json.loads(path.read_text())
            version = manifest["format"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}). Convert the images again.") from None
        if version != FORMAT:
            raise DataError(f"{root} has format {version}, this program reads {FORMAT}. Convert the images again.")
        for name, facts in manifest["files"].items():
            file = root / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DataError(f"{file} {found}, the manifest says {facts['bytes']:,}. Convert the images again.")
        return cls(root, manifest)

    @property
    def count(self) -> int:
        return self.manifest["count"]

    @property
    def columns(self) -> dict[str, list[str]]:
        """Label column -> its class names; a label is a place in that list."""
        return self.manifest["columns"]

    @property
    def max_height(self) -> int:
        return self.manifest["max_height"]

    @property
    def max_width(self) -> int:
        return self.manifest["max_width"]

    @property
    def shards(self) -> list[Path]:
        return [self.root / name for name in self.manifest["shards"]]

    @property
    def beton(self) -> Path | None:
        return self.root / BETON if BETON in self.manifest["files"] else None

    def name(self, sample: int) -> str:
        """The source path of a sample, as one printable line; for error messages, it reads the list up to there."""
        with open(self.root / "names.txt", encoding="utf-8") as lines:
            return next(itertools.islice(lines, sample, None), "unknown").rstrip("\n")

    @cached_property
    def index(self) -> np.ndarray:
        return np.load(self.root / "index.npy", mmap_mode="r")

    @cached_property
    def labels(self) -> np.ndarray:
        return np.load(self.root / "labels.npy", mmap_mode="r")

    @cached_property
    def fingerprint(self) -> str:
        """Short name of exactly these images, labels and bytes: 16 hex digits over what the manifest vouches for."""
        vouched = {key: self.manifest[key] for key in ("format", "count", "columns")}
        # A .beton beside shards holds their bytes once more: with or without it the data set is the same.
        names = ["index.npy", "labels.npy", *self.manifest["shards"]]
        vouched["files"] = {name: self.manifest["files"][name]["sha256"] for name in names}
        return hashlib.sha256(json.dumps(vouched, sort_keys=True).encode()).hexdigest()[:16]

    def label(self, column: str) -> tuple[np.ndarray, list[str]]:
        """(count,) labels of a column, -1 where unknown, and its class names. Raises DataError where there is none."""
        if column not in self.columns:
            there = ", ".join(self.columns) or "none"
            raise DataError(f"{self.root} has no label column {column!r} (it has: {there}).")
        return np.asarray(self.labels[:, list(self.columns).index(column)]), self.columns[column]
