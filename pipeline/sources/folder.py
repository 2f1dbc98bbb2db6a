"""What lies in a folder of images: the pictures in the order of the store, everything else counted, and labels."""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.handles import check_machine, read_whole, steadily
from pipeline.pictures import has_picture_extension, read_file, sniff
from pipeline.sources.entries import Entry, Labels, Listing, Tell, Vocabulary, no_labels, nobody

LABELS = b"labels.csv"


@dataclass(frozen=True)
class FolderReader:
    root: bytes

    def read(self, entry: Entry, largest: int) -> bytes:
        return read_file(os.path.join(self.root, entry.path), largest)


class FolderSource:
    """Image files at any depth. Labels come from labels.csv or else from the folders at the top."""

    kind = "folder"

    def __init__(self, root: Path, tell: Tell = nobody) -> None:
        self.root, self.tell = root, tell

    @cached_property
    def _listing(self) -> Listing:
        return scan(self.root, self.tell)

    def digest(self) -> str:
        return self._listing.digest()

    def listing(self, spool: Path) -> Listing:
        listing, path = self._listing, self.root / os.fsdecode(LABELS)
        table = read_whole(path) if listing.others.find(LABELS) is not None else None
        listing.labels = find_labels(
            listing, table, str(path), lambda one: sniff(_head(os.fsencode(self.root), one.path))
        )
        return listing

    def reader(self, spool: Path) -> FolderReader:
        return FolderReader(os.fsencode(self.root))


def scan(root: Path, tell: Tell = nobody) -> Listing:
    """Find the pictures under a folder, at any depth.

    Regular files and links to them; links to folders are followed once each, so loops end. Hidden names and __MACOSX
    are left out. A file counts as a picture by its extension or by its first bytes, and is opened only where the
    extension does not tell.
    Raises DataError if it is missing or cannot be read, ResourceError where the disk or the network fails.
    """
    tell(str(root), 0)
    if not steadily(root, root.is_dir):
        raise DataError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}.")
    listing, place = Listing(), os.fsencode(root)
    seen: set[tuple[int, int]] = set()
    folders, links = [b""], []
    while folders or links:
        # Folders first, so that a picture's path is its own and not one through a link.
        folder = folders.pop() if folders else links.pop(0)
        folders_here, links_here = _scan_folder(place, listing, folder, seen, tell)
        folders += reversed(folders_here)
        links += links_here
    if b"/" in dict(listing.unreadable):
        raise DataError(f"{root} {dict(listing.unreadable)[b'/']}.")
    listing.files.settle_order()
    listing.others.settle_order()
    return listing


def _scan_folder(
    root: bytes, listing: Listing, folder: bytes, seen: set[tuple[int, int]], tell: Tell
) -> tuple[list[bytes], list[bytes]]:
    """Enter what lies in a folder. Returns the folders in it and the links to folders, in the order of their names."""
    folders, links = [], []
    place = os.path.join(root, folder)
    tell(place, len(listing.files))
    try:
        facts = steadily(place, lambda: os.stat(place))
        if (facts.st_dev, facts.st_ino) in seen:
            listing.skipped["links to folders seen already"] += 1
            return [], []
        seen.add((facts.st_dev, facts.st_ino))
        # One by one: a folder may hold a million files, and their order is settled later.
        with steadily(place, lambda: os.scandir(place)) as entries:
            for entry in entries:
                if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                    listing.skipped["hidden"] += 1
                    continue
                tell(entry.path, len(listing.files))
                path = os.path.join(folder, entry.name)
                if _is_folder(entry):
                    (links if entry.is_symlink() else folders).append(path)
                else:
                    _enter(root, listing, path, entry)
    except OSError as error:
        check_machine(place, error)
        listing.unreadable.append((folder + b"/", f"cannot be read: {error.strerror or 'unknown reason'}"))
    return sorted(folders), sorted(links)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return steadily(entry.path, entry.is_dir)
    except OSError:  # a link to itself
        return False


def _enter(root: bytes, listing: Listing, path: bytes, entry: os.DirEntry[bytes]) -> None:
    try:
        facts = steadily(entry.path, entry.stat)
    except OSError:
        listing.skipped["broken links"] += 1
        return
    if not stat.S_ISREG(facts.st_mode):
        listing.skipped["not regular files"] += 1
    elif has_picture_extension(entry.name) or sniff(_head(root, path)):
        listing.files.add(path, facts.st_size, stamp=facts.st_mtime_ns)
    else:
        listing.others.add(path, facts.st_size, stamp=facts.st_mtime_ns)
        listing.not_an_image(path)


def _head(root: bytes, path: bytes) -> bytes:
    place = os.path.join(root, path)

    def read() -> bytes:
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(handle, 32)
        finally:
            os.close(handle)

    try:
        return steadily(place, read)
    except OSError:
        return b""


def find_labels(
    listing: Listing, table: bytes | None, name: str, is_picture: Callable[[Entry], object], depth: int = 0
) -> Labels:
    """Labels from a table; else one column `class`, the folder of each path that is `depth` below the top; else none.

    table: what labels.csv holds, where there is one; name: what to call it. is_picture: whether a file really is one,
    asked about those that lie in no folder. Raises DataError where the table cannot be understood.
    """
    if table is not None:
        return _labels_from_table(table, name, listing)
    words, codes = Vocabulary(), np.empty(len(listing.files), np.int32)
    for place, path in enumerate(listing.files.paths()):
        parts = path.split(b"/", depth + 1)
        text = parts[depth].decode("utf-8", "surrogateescape") if len(parts) > depth + 1 else ""
        # A stray file beside the class folders that is no picture says nothing about them.
        if not text and is_picture(listing.files[place]):
            return no_labels(listing.files)
        codes[place] = words.code(text)
    classes, column = words.settle(codes)
    return Labels({"class": classes}, column[:, None])


def _labels_from_table(table: bytes, name: str, listing: Listing) -> Labels:
    try:
        reader = csv.reader(io.TextIOWrapper(io.BytesIO(table), "utf-8-sig", "surrogateescape", ""), strict=True)
        header = [title.strip() for title in next(reader, [])]
        if not header or header[0] != "path" or len(set(header)) < len(header) or not all(header):
            raise DataError(f"{name} must begin with the line `path,<column>,...`, not {','.join(header)[:80]!r}.")
        words = [Vocabulary() for _ in header[1:]]
        codes = np.full((len(listing.files), len(words)), -1, np.int32)
        given = np.zeros(len(listing.files), bool)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{name}, line {reader.line_num}: {len(row)} cells, but the first line has {len(header)}."
                )
            place = listing.files.find(os.fsencode(os.path.normpath(row[0])))
            if place is None:
                continue
            values = [each.code(cell.strip()) for each, cell in zip(words, row[1:], strict=True)]
            if given[place] and codes[place].tolist() != values:
                raise DataError(f"{name}, line {reader.line_num}: {row[0]} has had other labels before.")
            given[place], codes[place] = True, values
    except csv.Error as error:
        raise DataError(f"{name} cannot be read as CSV: {error}.") from None
    settled = [each.settle(codes[:, at]) for at, each in enumerate(words)]
    columns = {title: classes for title, (classes, _) in zip(header[1:], settled, strict=True)}
    return Labels(columns, np.stack([column for _, column in settled], axis=1) if settled else codes)
