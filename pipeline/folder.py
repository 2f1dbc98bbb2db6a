"""What lies in a folder of images: the pictures in the order of the store, everything else counted, and labels."""

from __future__ import annotations

import csv
import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.pictures import has_picture_extension, sniff
from pipeline.shards import printable

LABELS = b"labels.csv"


@dataclass(frozen=True, slots=True)
class Source:
    path: bytes  # relative to SRC
    size: int
    mtime_ns: int


@dataclass
class Listing:
    """What lies under SRC. `files`: what claims to be a picture, in the order of the store."""

    root: bytes
    files: list[Source] = field(default_factory=list)
    others: list[Source] = field(default_factory=list)  # regular files that are no pictures
    skipped: Counter = field(default_factory=Counter)  # reason -> files or folders
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)  # folders, and why

    def digest(self) -> str:
        """sha256 over path, size and time of every file: another digest means that SRC has changed."""
        state = hashlib.sha256()
        for one in sorted([*self.files, *self.others], key=lambda one: one.path):
            state.update(b"%d %d %d %s\0" % (len(one.path), one.size, one.mtime_ns, one.path))
        return state.hexdigest()

    def looked_at(self) -> str:
        number = len(self.files) + sum(self.skipped.values())
        parts = [f"{count} {reason}" for reason, count in sorted(self.skipped.items(), key=lambda item: -item[1])]
        example = f", e.g. {printable(self.others[0].path)}" if self.others else ""
        return f"looked at {number} files" + (f": {', '.join(parts)}{example}" if parts else "")


def scan(root: Path) -> Listing:
    """Find the pictures under a folder, at any depth. Raises DataError if it is missing or cannot be read.

    Regular files and links to them; links to folders are followed once each, so loops end. Hidden names and __MACOSX
    are left out. A file counts as a picture by its extension or by its first bytes, and is opened only where the
    extension does not tell. The order is the store's: by a hash of the path, so neighbours in a shard are unrelated
    and a reader that shuffles within a window sees mixed classes.
    """
    if not root.is_dir():
        raise DataError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}.")
    listing = Listing(os.fsencode(root))
    seen: set[tuple[int, int]] = set()
    folders, links = [b""], []
    while folders or links:
        # Folders first, so that a picture's path is its own and not one through a link.
        folder = folders.pop() if folders else links.pop(0)
        folders_here, links_here = _scan_folder(listing, folder, seen)
        folders += reversed(folders_here)
        links += links_here
    if b"" in dict(listing.unreadable):
        raise DataError(f"{root} cannot be read: {dict(listing.unreadable)[b'']}.")
    listing.files.sort(key=lambda one: hashlib.blake2b(one.path, digest_size=16).digest())
    listing.others.sort(key=lambda one: one.path)
    return listing


def _scan_folder(listing: Listing, folder: bytes, seen: set[tuple[int, int]]) -> tuple[list[bytes], list[bytes]]:
    folders, links = [], []
    try:
        facts = os.stat(os.path.join(listing.root, folder))
        if (facts.st_dev, facts.st_ino) in seen:
            listing.skipped["links to folders seen already"] += 1
            return [], []
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(os.path.join(listing.root, folder)) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        listing.unreadable.append((folder, error.strerror or "unknown reason"))
        return [], []
    for entry in inside:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith(b".") or entry.name == b"__MACOSX":
            listing.skipped["hidden"] += 1
            continue
        try:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
                continue
            facts = entry.stat()
        except OSError:
            listing.skipped["broken links"] += 1
            continue
        if not stat.S_ISREG(facts.st_mode):
            listing.skipped["not regular files"] += 1
            continue
        source = Source(path, facts.st_size, facts.st_mtime_ns)
        if has_picture_extension(entry.name) or sniff(_head(listing, path)):
            listing.files.append(source)
        else:
            listing.others.append(source)
            listing.skipped["not images"] += 1
    return folders, links


def _head(listing: Listing, path: bytes) -> bytes:
    try:
        handle = os.open(os.path.join(listing.root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(handle, 32)
    except OSError:
        return b""
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Labels:
    columns: dict[str, list[str]]  # name -> class names, sorted
    table: np.ndarray  # (files of the listing, columns) int32, -1 where unknown


def find_labels(root: Path, listing: Listing) -> Labels:
    """Labels from SRC/labels.csv; else one column `class`, the first folder of each path; else none.

    Raises DataError where labels.csv cannot be understood.
    """
    if any(one.path == LABELS for one in listing.others):
        return _labels_from_table(root / os.fsdecode(LABELS), listing)
    tops = [one.path.split(b"/")[0] if b"/" in one.path else None for one in listing.files]
    for one, top in zip(listing.files, tops, strict=True):
        # A stray file beside the class folders that is no picture says nothing about them.
        if top is None and sniff(_head(listing, one.path)):
            return Labels({}, np.empty((len(tops), 0), np.int32))
    cells = [[printable(top) if top is not None else ""] for top in tops]
    return _encode_labels(["class"], cells)


def _labels_from_table(path: Path, listing: Listing) -> Labels:
    wanted = {one.path: place for place, one in enumerate(listing.files)}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if not header or header[0] != "path" or len(set(header)) < len(header) or not all(header):
                raise DataError(f"{path} must begin with the line `path,<column>,...`, not {','.join(header)[:80]!r}.")
            cells = [[""] * (len(header) - 1) for _ in listing.files]
            given: dict[int, list[str]] = {}
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} cells, but the first line has {len(header)}."
                    )
                place = wanted.get(os.fsencode(os.path.normpath(row[0])))
                values = [cell.strip() for cell in row[1:]]
                if place is None:
                    continue
                if given.setdefault(place, values) != values:
                    raise DataError(f"{path}, line {reader.line_num}: {row[0]} has had other labels before.")
                cells[place] = values
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return _encode_labels(header[1:], cells)


def _encode_labels(names: list[str], cells: list[list[str]]) -> Labels:
    columns, table = {}, np.full((len(cells), len(names)), -1, np.int32)
    for at, name in enumerate(names):
        classes = sorted({row[at] for row in cells} - {""})
        number = {text: value for value, text in enumerate(classes)}
        table[:, at] = [number.get(row[at], -1) for row in cells]
        # A byte that is no UTF-8 must not end up in the manifest.
        columns[name] = [printable(os.fsencode(text)) for text in classes]
    return Labels(columns, table)
