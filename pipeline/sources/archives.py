"""Pictures in tar and zip archives: listed and read where they lie, never extracted.

A plain tar archive on this machine is read by offset and a zip archive by its own directory. What cannot be read at
random, a compressed tar or an archive behind a URL, is streamed once, and only its pictures are copied into one file
beside the store in the making. A zip archive behind a URL is read by its directory too, so its server must give parts.
No archive and no directory is held whole in memory: a member costs what an entry costs (pipeline/sources/entries.py).
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from functools import cached_property, partial
from pathlib import Path
from typing import IO, cast

from pipeline.errors import DaaeError, DataError
from pipeline.handles import Handles, check_machine
from pipeline.pictures import Rejected, check_size, has_picture_extension, sniff
from pipeline.sources.entries import Entry, Labels, Listing, Tell, Vocabulary, no_labels, nobody
from pipeline.sources.folder import LABELS, find_labels
from pipeline.sources.members import DAMAGED, Member, each_in_tar, open_tar, zip_members
from pipeline.sources.spool import Spool, check_room
from pipeline.sources.volumes import Heard, Volume, archive_kind, told_apart, volumes_digest, why_unreadable
from pipeline.sources.zips import ZipDirectory, open_member, read_record

LARGEST_LABEL = 1 << 20  # bytes of a .cls or a .json
LARGEST_TABLE = 1 << 30  # bytes of a labels.csv


class ArchiveReader:
    """Reads entries of archives inside a worker: volumes are opened when first used."""

    def __init__(self, volumes: list[tuple[str, str]]) -> None:
        self.volumes = volumes  # (zip or tar, path); an entry's volume is a place here
        self._files = Handles()

    def read(self, entry: Entry, largest: int) -> bytes:
        """Raises Rejected; ResourceError where the machine fails and not the archive."""
        check_size(entry.size, largest)
        kind, path = self.volumes[entry.volume]
        try:
            if kind == "zip":
                return self._files.using(path, partial(_from_zip, entry))
            data = self._files.read(path, entry.size, entry.at)
        except DAMAGED as error:
            raise Rejected(why_unreadable(error)) from None
        if len(data) < entry.size:
            raise Rejected(f"is cut off: the archive ends {entry.size - len(data):,} bytes before it does")
        return data


def _from_zip(entry: Entry, handle: int) -> bytes:
    # What it inflates to is bounded by the size that the directory claims, which check_size has seen.
    with open(handle, "rb", closefd=False) as file, open_member(file, read_record(file, entry.at)) as member:
        return member.read(entry.size)


class ArchiveSource:
    """Tar and zip archives: one, or several that make up one data set.

    Labels come from labels.csv in the archive, from the folders at its top (for several flat archives: from their
    names, where these are no mere numbers), or for `webdataset` from each sample's .cls or the "label" of its .json.
    """

    def __init__(
        self, name: str, volumes: list[Volume], *, webdataset: bool, largest: int, tell: Tell = nobody
    ) -> None:
        self.name, self.volumes, self.webdataset, self.largest, self.tell = name, volumes, webdataset, largest, tell
        self.kind = "webdataset" if webdataset else self._kinds[0].removeprefix("compressed ")

    @cached_property
    def _kinds(self) -> list[str]:
        kinds = []
        for volume in self.volumes:
            self.tell(volume.path, 0)
            kind = archive_kind(volume.head())
            if kind is None:
                raise DataError(f"{volume.path} is neither a tar nor a zip archive.")
            kinds.append(kind)
        return kinds

    def digest(self) -> str:
        return volumes_digest(self.kind, self.volumes)

    def reader(self, spool: Path) -> ArchiveReader:
        volumes = [
            ("zip" if kind == "zip" else "tar", volume.path)
            for kind, volume in zip(self._kinds, self.volumes, strict=True)
        ]
        return ArchiveReader([*volumes, ("tar", str(spool))])

    def listing(self, spool: Path) -> Listing:
        """Read the directories; stream what cannot be read at random, its pictures go to the file `spool`.

        A damaged archive gives what can be read of it, and is listed as unreadable. One behind a URL is an error: it is
        the network as likely, and then half of it would be missing.
        """
        listing = Listing()
        check_room(spool, self.name, sum(each.size for place, each in enumerate(self.volumes) if self._streamed(place)))
        with Spool(spool, self.largest) as pile:
            reader = _Lister(listing, pile, self.webdataset, len(self.volumes))
            for place, (volume, prefix) in enumerate(zip(self.volumes, self._prefixes(), strict=True)):
                try:
                    self._walk(reader, place, volume, prefix)
                except DaaeError:
                    raise
                # Each protocol has errors of its own.
                except Exception as error:
                    check_machine(volume.path, error)
                    if volume.remote:
                        raise DataError(f"{volume.path} {why_unreadable(error)}.") from None
                    if not isinstance(error, DAMAGED):
                        raise
                    listing.unreadable.append((os.fsencode(volume.name), why_unreadable(error)))
                reader.flush()
        if len(listing.unreadable) >= len(self.volumes) and not len(listing.files):
            raise DataError(f"{self.name} {listing.unreadable[0][1]}.")
        replaced = listing.files.settle_order()
        if replaced:
            listing.skipped["replaced by a later file of the same name"] += replaced
        listing.labels = reader.labels() if self.webdataset else self._labels(listing, reader)
        return listing

    def _streamed(self, place: int) -> bool:
        return self.volumes[place].remote or self._kinds[place] == "compressed tar"

    def _prefixes(self) -> list[bytes]:
        """The folders that the archives stand for; a single one is the whole source."""
        return told_apart([volume.stem for volume in self.volumes]) if len(self.volumes) > 1 else [b""]

    def _walk(self, reader: _Lister, place: int, volume: Volume, prefix: bytes) -> None:
        kind = self._kinds[place]
        streamed = self._streamed(place)
        with Heard(volume, lambda: self.tell(volume.path, len(reader.listing.files))) as heard:
            file = cast(IO[bytes], heard)
            if kind == "zip":
                for member in zip_members(ZipDirectory(file), reader.listing.skipped):
                    try:
                        reader.take(member, prefix, None if streamed else place)
                    except DAMAGED as error:  # the next one lies elsewhere
                        if volume.remote and isinstance(error, OSError):
                            raise
                        reader.listing.unreadable.append((posixpath.join(prefix, member.path), why_unreadable(error)))
                return
            # A stream is read in order only; the other mode may also go back, for the first bytes of a file.
            with open_tar(file, "r|*" if streamed else "r:") as archive:
                take = partial(reader.take, prefix=prefix, volume=None if streamed else place)
                each_in_tar(archive, reader.listing, prefix, take, streamed=streamed)

    def _labels(self, listing: Listing, reader: _Lister) -> Labels:
        depth = 0
        if len(self.volumes) > 1:
            # The class is the top folder inside the archives where all files lie in one, or where some of the archives'
            # own names differ by number only (part-000, part-001) and not all are WordNet ids; else the archive's name.
            deep = all(path.count(b"/") > 1 for path in listing.files.paths())
            stems = [volume.stem for volume in self.volumes]
            numbered = len({re.sub(r"\d+", "", stem) for stem in stems}) < len(stems)
            depth = 1 if deep or (numbered and not all(re.fullmatch(r"n\d{8}", stem) for stem in stems)) else 0
        pictures = reader.real
        name = f"{self.name}: {os.fsdecode(LABELS)}"
        labels = find_labels(listing, reader.table, name, lambda one: one.path in pictures, depth)
        return labels if any(labels.columns.values()) else no_labels(listing.files)


class _Lister:
    """Takes members of archives in order and enters what is a picture."""

    def __init__(self, listing: Listing, spool: Spool, webdataset: bool, spool_volume: int) -> None:
        self.listing, self.spool, self.webdataset, self.spool_volume = listing, spool, webdataset, spool_volume
        self.table: bytes | None = None
        self.real: set[bytes] = set()  # pictures at the top by their first bytes; one settles that there are no labels
        self.words = Vocabulary()
        self._key: bytes | None = None
        self._pictures = 0
        self._label = -1

    def take(self, member: Member, prefix: bytes, volume: int | None) -> None:
        """volume: None where its bytes must be copied now."""
        if self.webdataset:
            folder, name = posixpath.split(member.path)
            stem, _, extension = name.partition(b".")
            key, extension = posixpath.join(folder, stem), extension.lower()
            if key != self._key:
                self.flush()
                self._key = key
            if extension in (b"cls", b"json") and member.size <= LARGEST_LABEL:
                with member.open() as file:
                    label = label_text(extension, file.read())
                if label:
                    self._label = self.words.code(label)
                return
        path = posixpath.join(prefix, member.path) if prefix else member.path
        if member.path == LABELS and not prefix and member.size <= LARGEST_TABLE:
            with member.open() as file:
                self.table = file.read()
            self.listing.not_an_image(path)
            return
        self._enter(member, path, volume)

    def _enter(self, member: Member, path: bytes, volume: int | None) -> None:
        known = has_picture_extension(path)
        at_top = b"/" not in path and not self.real
        if volume is not None and known and not at_top:
            self._add(path, member, volume, member.at)
            return
        with member.open() as file:
            head = file.read(32)
            if at_top and sniff(head):
                self.real.add(path)
            if not known and not sniff(head):
                self.listing.not_an_image(path)
            elif volume is not None:
                self._add(path, member, volume, member.at)
            else:
                at = self.spool.add(_Rejoined(head, file), member.size)
                self._add(path, member, self.spool_volume, at)

    def _add(self, path: bytes, member: Member, volume: int, at: int) -> None:
        self.listing.files.add(path, member.size, stamp=member.stamp, volume=volume, at=at)
        self._pictures += 1

    def flush(self) -> None:
        """The end of a sample: its label, which may come after its pictures, goes to all of them."""
        if self._pictures and self._label >= 0:
            self.listing.files.relabel_last(self._pictures, self._label)
        self._key, self._pictures, self._label = None, 0, -1

    def labels(self) -> Labels:
        classes, column = self.words.settle(self.listing.files.labels, numbers=True)
        return Labels({"class": classes}, column[:, None]) if classes else no_labels(self.listing.files)


class _Rejoined:
    """A stream of which the first bytes have been read already."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self.head, self.rest = head, rest

    def read(self, size: int) -> bytes:
        if self.head:
            block, self.head = self.head[:size], self.head[size:]
            return block
        return self.rest.read(size)


def label_text(extension: bytes, data: bytes) -> str:
    """What a .cls says, or the "label" of a .json; numbers in plain form, "" where it is unknown."""
    text = data.decode("utf-8", "replace").strip()
    if extension == b"json":
        try:
            value = json.loads(text)
        except ValueError:
            return ""
        text = value.get("label") if isinstance(value, dict) else None
    return plain_label(text)


def plain_label(value: object) -> str:
    """A label of any type as text: integers in plain form, and "" for None, negative numbers and other types."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        value = value.strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            return value
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return ""
    return str(value) if value >= 0 else ""


def looks_like_webdataset(volume: Volume) -> bool:
    """Whether the first files of a tar archive are pictures, each with a .cls or .json of the same key beside it."""
    pictures, labelled = set(), set()
    try:
        with Heard(volume, lambda: None) as file, open_tar(cast(IO[bytes], file), "r|*") as archive:
            for count, info in enumerate(iter(archive.next, None)):
                folder, name = posixpath.split(info.name)
                stem, _, extension = name.partition(".")
                if has_picture_extension(os.fsencode(name)):
                    pictures.add((folder, stem))
                elif extension.lower() in ("cls", "json"):
                    labelled.add((folder, stem))
                if count >= 40:
                    break
    except DaaeError:
        raise
    except Exception as error:
        check_machine(volume.path, error)
        if volume.remote:
            raise DataError(f"{volume.path} {why_unreadable(error)}.") from None
        if not isinstance(error, DAMAGED):
            raise
    return bool(pictures & labelled)
