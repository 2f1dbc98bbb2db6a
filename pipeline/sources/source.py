"""Where pictures come from: a source lists its items in a stable order and gives the bytes of each inside a worker.

`open_source()` is the one place that decides which kind of source a path, a URL or a pattern is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pipeline.errors import DataError, UsageError
from pipeline.handles import check_machine, read_whole
from pipeline.names import printable
from pipeline.pictures import Encoding, Rejected, Stored, check_picture, has_picture_extension
from pipeline.sources.archives import ArchiveSource, looks_like_webdataset
from pipeline.sources.entries import Entry, Labels, Listing, Tell, Vocabulary, no_labels, nobody
from pipeline.sources.folder import FolderSource
from pipeline.sources.imagenet import DEVKIT, is_validation, validation_labels
from pipeline.sources.tables import Columns, HuggingFaceSource, ParquetSource
from pipeline.sources.volumes import archive_kind, find_volumes, is_url

Kind = Literal["auto", "folder", "archive", "webdataset", "parquet", "hf"]
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
HUGGING_FACE = ("dataset_info.json", "dataset_dict.json")
LOOKED_AT = 1000  # names of a folder; what it is shows early


class Reader(Protocol):
    """Goes to the workers: picklable, and opens what it needs when it is first asked."""

    def read(self, entry: Entry, largest: int) -> bytes:
        """The bytes of one item, at most `largest`. Raises Rejected with the reason."""
        ...


class Source(Protocol):
    @property
    def kind(self) -> str: ...

    def digest(self) -> str:
        """Another digest means that the source has changed."""
        ...

    def listing(self, spool: Path) -> Listing:
        """Everything in the source, in the order of the store, with labels.

        spool: a file that it may write, which must last as long as what it lists is read. Raises DataError,
        ResourceError.
        """
        ...

    def reader(self, spool: Path) -> Reader: ...


def try_entry(entry: Entry, common: tuple[Reader, Encoding]) -> Stored | str:
    """What a worker does with an item: the verified picture, or why it is none."""
    reader, encoding = common
    try:
        return check_picture(reader.read(entry, encoding.max_bytes), encoding)
    except Rejected as reason:
        return str(reason)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person may say about a source beside its name."""

    kind: Kind = "auto"
    subset: Path | None = None  # a file of paths
    devkit: Path | None = None
    columns: Columns = dataclasses.field(default_factory=Columns)


def open_source(name: str, choice: Choice, *, largest: int, tell: Tell = nobody) -> Source:
    """Find out what `name` is: a folder, a file, a URL, or a pattern with `*` that names several files.

    largest: bytes of a file beyond which no picture is copied. tell: told where this, and what the source does later,
    stands. Raises DataError, ResourceError, UsageError.
    """
    tell(name, 0)
    kind = choice.kind
    if kind == "auto":
        kind = _look(name)
    if kind == "folder":
        source = FolderSource(Path(name), tell)
    elif kind == "hf":
        source = HuggingFaceSource(Path(name), choice.columns, largest=largest, tell=tell)
    else:
        endings = (".parquet",) if kind == "parquet" else ARCHIVES
        volumes = [volume for one in _names(name, endings) for volume in find_volumes(one, tell)]
        if kind == "parquet":
            source = ParquetSource(name, volumes, choice.columns, largest=largest, tell=tell)
        else:
            source = ArchiveSource(name, volumes, webdataset=kind == "webdataset", largest=largest, tell=tell)
    if choice.columns != Columns() and kind not in ("parquet", "hf"):
        raise UsageError(f"--columns is for Parquet and Hugging Face data sets; {name} is neither.")
    devkit = choice.devkit or _devkit_beside(name, kind)
    return Refined(source, name, choice.subset, devkit) if choice.subset or devkit else source


def _names(name: str, endings: tuple[str, ...]) -> list[str]:
    """The files in a folder with these endings, at any depth, or the name itself."""
    if is_url(name) or not os.path.isdir(name):
        return [name]
    paths = [os.path.join(place, file) for place, _, files in os.walk(name) for file in files if file.endswith(endings)]
    if not paths:
        raise DataError(f"{name} holds no file that ends in {' or '.join(endings)}.")
    return sorted(paths)


def _look(name: str) -> Kind:
    if not is_url(name) and os.path.isdir(name):
        return _look_at_folder(name)
    volumes = find_volumes(name)
    head = volumes[0].head()
    if head.startswith(b"PAR1"):
        return "parquet"
    kind = archive_kind(head)
    if kind is None:
        raise DataError(f"{name} is not a folder, nor a tar, zip or Parquet file.")
    return "webdataset" if kind != "zip" and looks_like_webdataset(volumes[0]) else "archive"


def _look_at_folder(name: str) -> Kind:
    try:
        with os.scandir(name) as entries:
            inside = [(one.name, one.is_dir()) for one in itertools.islice(entries, LOOKED_AT)]
    except OSError as error:
        check_machine(name, error)
        raise DataError(f"{name} cannot be read: {error.strerror}.") from None
    files = sorted(file for file, is_folder in inside if not is_folder and not file.startswith("."))
    if any(file in HUGGING_FACE for file in files):
        return "hf"
    if any(has_picture_extension(os.fsencode(file)) for file in files):
        return "folder"
    if any(file.endswith(".parquet") for file in files) or _parquet_below(name, inside):
        return "parquet"
    archives = [file for file in files if file.endswith(ARCHIVES)]
    if not archives or any(is_folder for _, is_folder in inside):
        return "folder"
    if any(file.startswith("ILSVRC2012_") for file in archives):
        raise UsageError(
            f"{name} holds several archives of ImageNet: name the one to convert, e.g. {name}/{archives[0]}."
        )
    first = find_volumes(os.path.join(name, archives[0]))[0]
    tar = archive_kind(first.head()) not in (None, "zip")
    return "webdataset" if tar and looks_like_webdataset(first) else "archive"


def _parquet_below(name: str, inside: list[tuple[str, bool]]) -> bool:
    """Whether the only folder is `data` with Parquet files, as the Hugging Face hub lays them out."""
    if [folder for folder, is_folder in inside if is_folder and not folder.startswith(".")] != ["data"]:
        return False
    with os.scandir(os.path.join(name, "data")) as entries:
        return any(one.name.endswith(".parquet") for one in itertools.islice(entries, LOOKED_AT))


def _devkit_beside(name: str, kind: str) -> Path | None:
    if kind != "archive" or is_url(name) or not os.path.basename(name).startswith("ILSVRC2012_img_val"):
        return None
    beside = Path(name).parent / DEVKIT
    return beside if beside.exists() else None


class Refined:
    """A source of which a list names a part, or whose labels ImageNet's development kit tells."""

    def __init__(self, source: Source, name: str, subset: Path | None, devkit: Path | None) -> None:
        self.source, self.name, self.subset, self.devkit = source, name, subset, devkit
        self.kind = source.kind

    def digest(self) -> str:
        state = hashlib.sha256(self.source.digest().encode())
        for path in filter(None, (self.subset, self.devkit)):
            state.update(read_whole(path))
        return state.hexdigest()

    def listing(self, spool: Path) -> Listing:
        listing = self.source.listing(spool)
        if self.devkit is not None:
            if not is_validation(listing):
                raise DataError(f"{self.name} is not ImageNet's validation set, which --devkit is for.")
            listing.labels = validation_labels(listing, self.devkit)
        if self.subset is not None:
            select(listing, self.subset, read_whole(self.subset))
        return listing

    def reader(self, spool: Path) -> Reader:
        return self.source.reader(spool)


def select(listing: Listing, name: Path, lines: bytes) -> None:
    """Leave what a list names: `path`, `path label` or `path,label` on each line. Labels in it replace the others.

    A line that is a path as it stands has no label, so paths may hold blanks and commas. What is in the list but not
    in the source goes to `unreadable`, and so ends among the bad files. Raises DataError.
    """
    words, codes = Vocabulary(), np.full(len(listing.files), -2, np.int32)
    for number, line in enumerate(lines.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        place, label = _find_line(listing, line)
        if place is None:
            listing.unreadable.append((line.strip(), "is in the list, but not in the source"))
            continue
        code = words.code(label.decode("utf-8", "surrogateescape"))
        if codes[place] not in (-2, code):
            raise DataError(f"{name}, line {number}: {printable(line)} has had another label before.")
        codes[place] = code
    chosen = np.flatnonzero(codes != -2)
    if not len(chosen):
        raise DataError(f"{name} names nothing in the source ({listing.looked_at()}).")
    listing.skipped["not in the list"] += len(codes) - len(chosen)
    listing.files.keep(chosen)
    classes, column = words.settle(codes[chosen], numbers=True)
    old = listing.labels
    listing.labels = Labels({"class": classes}, column[:, None]) if classes else _narrowed(old, chosen, listing)


def _find_line(listing: Listing, line: bytes) -> tuple[int | None, bytes]:
    line = line.strip()
    tries = [(line, b"")]
    for cut in (b",", b"\t", b" "):
        path, found, label = line.rpartition(cut)
        if found:
            tries.append((path.strip(), label.strip()))
    for path, label in tries:
        place = listing.files.find(os.path.normpath(path))
        if place is not None:
            return place, label
    return None, b""


def _narrowed(labels: Labels, chosen: np.ndarray, listing: Listing) -> Labels:
    """Labels of a part; classes that it lacks are left out."""
    if not labels.columns:
        return no_labels(listing.files)
    columns, table = {}, labels.table[chosen]
    for at, (title, classes) in enumerate(labels.columns.items()):
        used = sorted(set(np.unique(table[:, at]).tolist()) - {-1})
        place = np.full(len(classes) + 1, -1, np.int32)
        place[used] = np.arange(len(used))
        columns[title], table[:, at] = [classes[each] for each in used], place[table[:, at]]
    return Labels(columns, table)
