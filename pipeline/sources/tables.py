"""Pictures inside tables: Parquet files and Hugging Face data sets on disk. Both need packages that are optional.

A row can only be read with all the rows around it, so the pictures are copied once, in the order of the table, into
one file from which they can be read in any order.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import DaaeError, DataError, ResourceError
from pipeline.handles import check_machine
from pipeline.sources.archives import ArchiveReader, plain_label
from pipeline.sources.entries import Labels, Listing, Tell, Vocabulary, no_labels, nobody
from pipeline.sources.spool import Spool, check_room
from pipeline.sources.volumes import Volume, told_apart, volumes_digest

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo", "image_bytes", "bytes")
LABEL_NAMES = ("label", "labels", "class", "cls", "target", "fine_label")
ROWS = 64  # read at once
# How the Hugging Face hub names the files and folders of a split: train-00000-of-00002.parquet, test/0000.parquet.
SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test|testing)(?![a-z])", re.IGNORECASE)
SAME = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the picture and its label; None: found by type and name."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Row:
    name: bytes
    data: bytes | None
    label: object


class TableSource(ABC):
    """What Parquet and Hugging Face sources share: rows in order, pictures spooled, labels from one column."""

    kind: str
    name: str
    largest: int
    tell: Tell

    @abstractmethod
    def rows(self) -> Iterator[Row]: ...

    @abstractmethod
    def size(self) -> int:
        """Bytes of its files: the pictures in them are hardly ever compressed once more."""

    @abstractmethod
    def class_names(self) -> list[str] | None:
        """The names behind integer labels, where the table tells them."""

    def listing(self, spool: Path) -> Listing:
        listing, words, names = Listing(), Vocabulary(), self.class_names()
        check_room(spool, self.name, self.size())
        with Spool(spool, self.largest) as pile:
            for row in self.rows():
                self.tell(row.name, len(listing.files))
                if row.data is None:
                    listing.unreadable.append((row.name, "holds no bytes"))
                    continue
                code = _named(row.label, names) if names is not None else words.code(plain_label(row.label))
                at = pile.add(_Bytes(row.data), len(row.data))
                listing.files.add(row.name, len(row.data), at=at, label=code)
        replaced = listing.files.settle_order()
        if replaced:
            raise DataError(f"{self.name} has {replaced:,} rows that go by the name of another one, and would be lost.")
        codes = listing.files.labels
        if names is not None:
            listing.labels = Labels({"class": names}, codes[:, None])
        else:
            classes, column = words.settle(codes, numbers=True)
            listing.labels = Labels({"class": classes}, column[:, None]) if classes else no_labels(listing.files)
        return listing

    def reader(self, spool: Path) -> ArchiveReader:
        return ArchiveReader([("tar", str(spool))])


def _named(label: object, names: list[str]) -> int:
    if isinstance(label, str):
        return names.index(label) if label in names else -1
    return label if isinstance(label, int) and 0 <= label < len(names) else -1


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)

    def read(self, size: int) -> bytes:
        block, self.data = self.data[:size], self.data[size:]
        return bytes(block)


def _choose(name: str, what: str, asked: str | None, fitting: list[str], usual: tuple[str, ...]) -> str | None:
    """A column: the one asked for, or the first with a usual name; None where there is neither.

    Raises DataError where the one asked for is not among the fitting ones.
    """
    if asked is not None:
        if asked not in fitting:
            there = ", ".join(fitting) or "none"
            raise DataError(f"{name} has no {what} column {asked!r} (columns that could be one: {there}).")
        return asked
    return next((column for column in usual if column in fitting), None)


def _picture_column(name: str, asked: str | None, sure: list[str], maybe: list[str], none: str) -> str:
    """The column of the pictures: the one asked for, the first with a usual name, or the only one that is sure.

    sure: columns that hold pictures; maybe: others that could. none: what to say where there are neither. Raises
    DataError where it cannot be told.
    """
    fitting = sure + maybe
    image = _choose(name, "picture", asked, fitting, IMAGE_NAMES) or (sure[0] if len(sure) == 1 else None)
    if image is None:
        there = ", ".join(fitting) or none
        raise DataError(f"{name}: which column is the picture? --columns names it ({there}).")
    return image


def _package(module: str, name: str) -> Any:
    """A module of a package that is optional. Raises ResourceError, with how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ResourceError(
            f"{name} needs {error.name}, which is not installed. Run `pip install {package}`."
        ) from None


class ParquetSource(TableSource):
    """Parquet files with the bytes of a picture in each row, as a binary column or a struct of `bytes` and `path`."""

    kind = "parquet"

    def __init__(
        self, name: str, volumes: list[Volume], columns: Columns, *, largest: int, tell: Tell = nobody
    ) -> None:
        """Raises DataError where the files are of several splits."""
        self.name, self.volumes, self.columns, self.largest, self.tell = name, volumes, columns, largest, tell
        splits = splits_in([volume.path for volume in volumes])
        if len(splits) > 1:
            raise DataError(
                f"{name} holds several splits ({', '.join(splits)}). Name one, e.g. {next(iter(splits.values()))}."
            )

    def digest(self) -> str:
        return volumes_digest(f"{self.kind} {self.columns.image} {self.columns.label}", self.volumes)

    def size(self) -> int:
        return sum(volume.size for volume in self.volumes)

    @cached_property
    def _chosen(self) -> tuple[str, str | None, list[str] | None]:
        """Image column, label column, class names."""
        arrow, parquet = _package("pyarrow", self.name), _package("pyarrow.parquet", self.name)
        try:
            with self.volumes[0].open() as file:
                schema = parquet.read_schema(file)
        except Exception as error:
            raise _damaged(self.volumes[0], error, arrow.ArrowException) from None

        def holds_bytes(kind: Any) -> bool:
            if arrow.types.is_struct(kind):
                return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
            return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)

        pictures = [field.name for field in schema if holds_bytes(field.type)]
        image = _picture_column(self.name, self.columns.image, pictures, [], "none of its columns holds bytes")
        simple = [
            field.name
            for field in schema
            if arrow.types.is_integer(field.type) or arrow.types.is_string(field.type)
            or arrow.types.is_large_string(field.type) or arrow.types.is_dictionary(field.type)
        ]  # fmt: skip
        label = _choose(self.name, "label", self.columns.label, simple, LABEL_NAMES)
        return image, label, _names_in(schema.metadata, label)

    def class_names(self) -> list[str] | None:
        return self._chosen[2]

    def rows(self) -> Iterator[Row]:
        image, label, _ = self._chosen
        arrow, parquet = _package("pyarrow", self.name), _package("pyarrow.parquet", self.name)
        wanted = [image] if label is None else [image, label]
        folders = told_apart([volume.name for volume in self.volumes])
        for volume, folder in zip(self.volumes, folders, strict=True):
            at = 0
            try:
                with volume.open() as file, parquet.ParquetFile(file) as table:
                    for batch in table.iter_batches(batch_size=ROWS, columns=wanted):
                        pictures = batch.column(batch.schema.get_field_index(image)).to_pylist()
                        texts = (
                            batch.column(batch.schema.get_field_index(label)).to_pylist()
                            if label is not None
                            else [None] * len(pictures)
                        )
                        for cell, text in zip(pictures, texts, strict=True):
                            yield _row(b"%s/%09d" % (folder, at), cell, text)
                            at += 1
            except Exception as error:
                raise _damaged(volume, error, arrow.ArrowException, KeyError) from None


def splits_in(paths: list[str]) -> dict[str, str]:
    """Splits that names of files begin with, or of folders that not all of them lie in -> a pattern for each.

    paths: at least one.
    """
    places = [path.split("/") for path in paths]
    columns = enumerate(zip(*places, strict=False))
    shared = next((at for at, parts in columns if len(set(parts)) > 1), len(places[0]))
    found: dict[str, str] = {}
    for place in places:
        for at in range(len(place) - 1, shared - 1, -1):
            word = SPLIT.match(place[at])
            if word is None:
                continue
            name = word[0] if at == len(place) - 1 else place[at] + "/"
            found.setdefault(SAME.get(word[0].lower(), word[0].lower()), "/".join([*place[:at], name]) + "*.parquet")
            break
    return found


def _row(name: bytes, cell: Any, label: object) -> Row:
    """cell: bytes, or {"bytes": …, "path": …} as Hugging Face stores pictures."""
    if isinstance(cell, dict):
        path, cell = cell.get("path"), cell.get("bytes")
        if isinstance(path, str) and path:
            name += b"/" + os.path.basename(path).encode("utf-8", "surrogateescape")
    return Row(name, cell, label)


def _names_in(metadata: dict | None, label: str | None) -> list[str] | None:
    """Class names that the `datasets` package has left in a Parquet file's schema."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _damaged(volume: Volume, error: Exception, *known: type[Exception]) -> Exception:
    """What to raise for an error on reading a volume: a sentence where it is `known`, the system's or a protocol's.

    Raises ResourceError where the disk or the network failed, and not the file.
    """
    check_machine(volume.path, error)
    if isinstance(error, DaaeError) or not (volume.remote or isinstance(error, (OSError, *known))):
        return error
    return DataError(f"{volume.path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}.")


class HuggingFaceSource(TableSource):
    """A data set that `datasets` has saved to disk: a folder of .arrow files and dataset_info.json."""

    kind = "hf"

    def __init__(self, root: Path, columns: Columns, *, largest: int, tell: Tell = nobody) -> None:
        self.root, self.name, self.columns, self.largest, self.tell = root, str(root), columns, largest, tell

    def _files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def digest(self) -> str:
        paths = self._files()
        facts = [(str(path.relative_to(self.root)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return hashlib.sha256(json.dumps([self.kind, str(self.columns), facts]).encode()).hexdigest()

    @cached_property
    def _table(self) -> tuple[Any, str, str | None]:
        """The data set with its pictures as bytes, and the names of image and label column."""
        datasets = _package("datasets", self.name)
        datasets.disable_progress_bars()
        try:
            table = datasets.load_from_disk(str(self.root))
        # A damaged folder makes it raise almost anything.
        except Exception as error:
            check_machine(self.root, error)
            why = " ".join(str(error).split())[:200]
            raise DataError(f"{self.root} cannot be read as a Hugging Face data set: {why}.") from None
        if isinstance(table, datasets.DatasetDict):
            splits = ", ".join(table)
            raise DataError(
                f"{self.root} holds several splits ({splits}). Name one, e.g. {self.root}/{next(iter(table))}."
            )
        pictures = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
        raw = [
            name for name, kind in table.features.items() if getattr(kind, "dtype", "") in ("binary", "large_binary")
        ]
        image = _picture_column(self.name, self.columns.image, pictures, raw, "none of its columns holds pictures")
        named = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [
            name for name, kind in table.features.items() if getattr(kind, "dtype", "") in ("string", "int64", "int32")
        ]
        label = _choose(self.name, "label", self.columns.label, [*named, *plain], (*named[:1], *LABEL_NAMES))
        table = table.select_columns([image] if label is None else [image, label])
        if image in pictures:
            table = table.cast_column(image, datasets.Image(decode=False))
        return table, image, label

    def class_names(self) -> list[str] | None:
        table, _, label = self._table
        names = getattr(table.features[label], "names", None) if label is not None else None
        return list(names) if names else None

    def rows(self) -> Iterator[Row]:
        table, image, label = self._table
        at = 0
        for batch in table.iter(batch_size=ROWS):
            texts = batch[label] if label is not None else [None] * len(batch[image])
            for cell, text in zip(batch[image], texts, strict=True):
                yield _row(b"%09d" % at, cell, text)
                at += 1
