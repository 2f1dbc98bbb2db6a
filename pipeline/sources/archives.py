"""Pictures in tar and zip archives: listed and read where they lie, never extracted.

A plain tar archive on this machine is read by offset and a zip archive by its own directory. What cannot be read at
random, a compressed tar or an archive behind a URL, is streamed once, and only its pictures are copied into one file
beside the store in the making. A zip archive behind a URL is read by its directory too, so its server must give parts.
No archive and no directory is held whole in memory: a member costs what an entry costs (pipeline/sources/entries.py).
"""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import os
import posixpath
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tarfile import HeaderError, ReadError, TarFile
from typing import IO, Any, BinaryIO, Protocol, Self, cast

from pipeline.errors import DaaeError, DataError, ResourceError
from pipeline.handles import Handles, check_machine, steadily
from pipeline.pictures import Rejected, check_size, has_picture_extension, sniff
from pipeline.sources.entries import Entry, Labels, Listing, Tell, Vocabulary, no_labels, nobody
from pipeline.sources.folder import LABELS, find_labels
from pipeline.sources.zips import ENCRYPTED, ZipDirectory, open_member, read_record
from pipeline.staging import disk_error, size_in_words

HEAD = 512
LARGEST_LABEL = 1 << 20  # bytes of a .cls, a .json or a labels.csv in an archive
LARGEST_TABLE = 1 << 30
LARGEST_HEADER = 1 << 20  # bytes of one member's long name or attributes
EXTENDED = {
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
}  # fmt: skip
# What a damaged or hostile archive makes the libraries raise; zipfile's word for a compression or an encryption that it
# does not know is NotImplementedError.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, OSError)


def is_url(name: str) -> bool:
    return "://" in name


@dataclass(frozen=True)
class Volume:
    """One file that is an archive or a table, on this machine or behind a URL that fsspec knows."""

    path: str
    size: int
    version: str  # changes with its content, as far as its place can tell

    @property
    def remote(self) -> bool:
        return is_url(self.path)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return re.sub(r"\.(tar|tgz|tbz2|txz|zip|parquet)(\.\w+)?$", "", self.name)

    def open(self) -> BinaryIO:
        """Raises DataError, ResourceError."""
        try:
            return steadily(self.path, self._open)
        except DaaeError:
            raise
        except Exception as error:  # each protocol has errors of its own
            raise DataError(f"{self.path} {_words(error)}.") from None

    def _open(self) -> BinaryIO:
        if self.remote:
            system, path = file_system(self.path)
            return system.open(path, "rb")
        return open(self.path, "rb")

    def head(self) -> bytes:
        def read() -> bytes:
            with self.open() as file:
                return file.read(HEAD)

        return steadily(self.path, read)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL and the path in it. Raises ResourceError where a package is missing."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise ResourceError(f"{url} needs fsspec, which is not installed. Run `pip install fsspec`.") from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # s3:// needs s3fs, https:// aiohttp
        raise ResourceError(f"{url} cannot be opened: {error}.") from None
    except ValueError as error:
        raise DataError(f"{url} cannot be opened: {error}.") from None


def find_volumes(name: str, tell: Tell = nobody) -> list[Volume]:
    """The files that a path, a URL or a pattern with `*` names, in order. Raises DataError where there are none."""
    tell(name, 0)
    if is_url(name):
        system, path = file_system(name)
        try:
            paths = sorted(system.glob(path)) if "*" in path else [path]
            facts = []
            for each in paths:
                tell(each, 0)
                facts.append(system.info(each))
        # Each protocol has errors of its own.
        except Exception as error:
            raise DataError(f"{name} {_words(error)}.") from None
        marks = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
        volumes = [
            Volume(system.unstrip_protocol(each), fact["size"] or 0, " ".join(str(fact.get(mark)) for mark in marks))
            for each, fact in zip(paths, facts, strict=True)
        ]
    else:
        paths = sorted(glob.glob(name)) if "*" in name and not os.path.exists(name) else [name]
        volumes = []
        for each in paths:
            tell(each, 0)
            try:
                fact = steadily(each, partial(os.stat, each))
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                raise DataError(f"{each} {'does not exist' if missing else 'cannot be read'}.") from None
            if not stat.S_ISREG(fact.st_mode):
                raise DataError(f"{each} is not a regular file.")
            volumes.append(Volume(each, fact.st_size, str(fact.st_mtime_ns)))
    if not volumes:
        raise DataError(f"{name} names no file.")
    return volumes


def told_apart(names: list[str]) -> list[bytes]:
    """Names of volumes as folders, with numbers before them where two are alike."""
    folders = [os.fsencode(name) for name in names]
    unique = len(set(folders)) == len(folders)
    return folders if unique else [b"%05d-%s" % (place, folder) for place, folder in enumerate(folders)]


def volumes_digest(kind: str, volumes: list[Volume]) -> str:
    facts = [kind, *((each.name, each.size, each.version) for each in volumes)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def archive_kind(head: bytes) -> str | None:
    """tar, compressed tar or zip, by the first bytes; None where it is neither."""
    if head[257:262] == b"ustar" or (len(head) == HEAD and not any(head)):
        return "tar"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
        return "compressed tar"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    try:  # archives of before 1988 bear no signature, only a sum over the header
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return "tar"


# -------------------------------------------------------------------------------------------------------------- read


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
            raise Rejected(_words(error)) from None
        if len(data) < entry.size:
            raise Rejected(f"is cut off: the archive ends {entry.size - len(data):,} bytes before it does")
        return data


def _from_zip(entry: Entry, handle: int) -> bytes:
    # What it inflates to is bounded by the size that the directory claims, which check_size has seen.
    with open(handle, "rb", closefd=False) as file, open_member(file, read_record(file, entry.at)) as member:
        return member.read(entry.size)


# -------------------------------------------------------------------------------------------------------------- list


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def check_room(spool: Path, name: str, copied: int) -> None:
    """Raises ResourceError where the disk of the spool has no room for so many bytes of the source `name`."""
    free = shutil.disk_usage(spool.parent).free
    if copied > free:
        raise ResourceError(
            f"{spool.parent} has {size_in_words(free)} free, the pictures of {name} need about "
            f"{size_in_words(copied)} there while they are converted. Free some, or choose another disk."
        )


class Spool:
    """Pictures of a stream, one behind the other in one file; `file` is made when the first one comes."""

    def __init__(self, path: Path, largest: int) -> None:
        self.path, self.largest = path, largest
        self.at = 0
        self._file: BinaryIO | None = None

    def add(self, source: Readable, size: int) -> int:
        """Copy a picture; returns where it begins. One that is too large for a picture is left out: its size tells.

        A stream that ends early leaves no trace.
        """
        if size > self.largest:
            return 0
        if self._file is None:
            self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__())
        start, left = self.at, size
        self._file.seek(start)
        while left:
            block = source.read(min(left, 1 << 20))
            if not block:
                raise EOFError("it ends inside a file")
            try:
                self._file.write(block)
            except OSError as error:
                raise disk_error(error, self.path) from None
            left -= len(block)
        self.at = start + size
        return start

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            if error is None:
                try:
                    file.truncate(self.at)
                    os.fsync(file.fileno())
                except OSError as failure:
                    raise disk_error(failure, self.path) from None


@dataclass(frozen=True)
class Member:
    """A regular file in an archive, under a name that stays inside it."""

    path: bytes
    size: int
    at: int  # where it lies in the volume for tar, where its record does for zip
    stamp: int
    open: Callable[[], IO[bytes]]


def inside(path: bytes, skipped: dict[str, int]) -> bytes | None:
    """A member's name as a path inside its archive; None, and counted, where it leaves it or is hidden."""
    parts = path.split(b"/")
    if path.startswith(b"/") or b".." in parts or b"\0" in path:
        skipped["names that lead out of the archive"] += 1
        return None
    path = posixpath.normpath(path)
    if any(part.startswith(b".") or part == b"__MACOSX" for part in path.split(b"/")):
        skipped["hidden"] += 1
        return None
    return path


def each_in_tar(
    archive: _Tar,
    listing: Listing,
    prefix: bytes,
    take: Callable[[Member], None],
    *,
    streamed: bool,
    nested: bool = True,
) -> None:
    """Give `take` the files in order, and those of tar archives among them, one level deep, as if each were a folder.

    Links, devices and names that lead out are counted in the listing and never followed. An archive inside that is
    damaged is listed as unreadable, under `prefix`, and what comes behind it is read. Raises one of DAMAGED.
    """
    while (info := archive.next()) is not None:
        vars(archive)["members"].clear()  # it would keep all of them
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            listing.skipped["links" if info.issym() or info.islnk() else "not regular files"] += 1
            continue
        path = inside(info.name.encode("utf-8", "surrogateescape"), listing.skipped)
        if path is None:
            continue
        if nested and path.lower().endswith(b".tar"):
            try:
                with _content(archive, info) as file, _open_tar(file, "r|" if streamed else "r:") as inner:
                    shifted = partial(_take_shifted, take, path[:-4], info)
                    each_in_tar(inner, listing, prefix, shifted, streamed=streamed, nested=False)
            except (tarfile.TarError, EOFError) as error:
                listing.unreadable.append((posixpath.join(prefix, path), _words(error)))
            continue
        take(Member(path, info.size, info.offset_data, int(info.mtime * 1e9), partial(_content, archive, info)))
    if archive.open_end:
        listing.skipped["archives without an end mark (cut off?)"] += 1


def _take_shifted(take: Callable[[Member], None], folder: bytes, outer: tarfile.TarInfo, member: Member) -> None:
    """Take a member of an archive inside: offsets count from the beginning of that one."""
    if member.at + member.size > outer.size:  # what lies behind is another's
        raise ReadError("unexpected end of data")
    take(replace(member, path=posixpath.join(folder, member.path), at=outer.offset_data + member.at))


def _content(archive: TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(info)
    assert file is not None  # it is a regular file
    return file


# The types that pyright knows lack both: the empty block that ends an archive, and the end of the file where a header
# should be.
_END, _NOTHING = (vars(tarfile)[name] for name in ("EOFHeaderError", "EmptyHeaderError"))


class _Header(tarfile.TarInfo):
    """A member's header. One whose long name or attributes claim a gigabyte is refused before that is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED and not 0 <= header.size <= LARGEST_HEADER:
            raise HeaderError(f"it has a header of {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        """Raises ReadError where a header is damaged or cut off: `next()` would take that for the end."""
        try:
            header = super().fromtarfile(tarfile)
        except _END:
            raise
        except _NOTHING:
            # What was streamed or never closed lacks the blocks that end an archive, and tar itself takes it as it is.
            # One that was cut off just between two members looks the same: so it is counted, and not a bad file.
            vars(tarfile)["open_end"] = True
            raise
        except HeaderError as error:
            if tarfile.offset == 0 or type(error) is HeaderError:
                raise
            raise ReadError(f"{error} at byte {tarfile.offset:,}, and what follows is lost") from None
        if header.size < 0:  # the next one would be one that was read already, for ever
            raise ReadError(f"it has a file of {header.size:,} bytes")
        return header


class _Tar(TarFile):
    tarinfo = _Header
    open_end = False


def _open_tar(file: IO[bytes], mode: Any) -> _Tar:
    return _Tar.open(fileobj=file, mode=mode, encoding="utf-8", errors="surrogateescape")


def zip_members(directory: ZipDirectory, skipped: dict[str, int]) -> Iterator[Member]:
    """Members in the order of the directory; links and what is encrypted or leads out are counted in `skipped`."""
    for record in directory:
        if record.name.endswith(b"/"):
            continue
        if stat.S_IFMT(record.mode) not in (0, stat.S_IFREG):
            skipped["links" if stat.S_ISLNK(record.mode) else "not regular files"] += 1
            continue
        if record.flags & ENCRYPTED:
            skipped["encrypted"] += 1
            continue
        path = inside(record.name, skipped)
        if path is not None:
            yield Member(path, record.size, record.at, 0, partial(open_member, directory.file, record))


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
                        raise DataError(f"{volume.path} {_words(error)}.") from None
                    if not isinstance(error, DAMAGED):
                        raise
                    listing.unreadable.append((os.fsencode(volume.name), _words(error)))
                reader.flush()
        if len(listing.unreadable) >= len(self.volumes) and not len(listing.files):
            raise DataError(f"{self.name} {listing.unreadable[0][1]}.")
        replaced = listing.files.shuffle()
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
        with _Heard(volume, lambda: self.tell(volume.path, len(reader.listing.files))) as heard:
            file = cast(IO[bytes], heard)
            if kind == "zip":
                for member in zip_members(ZipDirectory(file), reader.listing.skipped):
                    try:
                        reader.take(member, prefix, None if streamed else place)
                    except DAMAGED as error:  # the next one lies elsewhere
                        if volume.remote and isinstance(error, OSError):
                            raise
                        reader.listing.unreadable.append((posixpath.join(prefix, member.path), _words(error)))
                return
            # A stream is read in order only; the other mode may also go back, for the first bytes of a file.
            with _open_tar(file, "r|*" if streamed else "r:") as archive:
                take = partial(reader.take, prefix=prefix, volume=None if streamed else place)
                each_in_tar(archive, reader.listing, prefix, take, streamed=streamed)

    def _labels(self, listing: Listing, reader: _Lister) -> Labels:
        depth = 0
        if len(self.volumes) > 1:
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
            key = posixpath.join(folder, name.split(b".")[0])
            if key != self._key:
                self.flush()
                self._key = key
            extension = name[len(name.split(b".")[0]) + 1 :].lower()
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


def _words(error: Exception) -> str:
    return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


class _Heard:
    """An open volume that tells of every read: a stream that flows differs from one that has stopped."""

    def __init__(self, volume: Volume, heard: Callable[[], None]) -> None:
        self.volume, self.heard, self.file = volume, heard, volume.open()

    def read(self, size: int = -1) -> bytes:
        """Raises ResourceError where the disk fails twice; behind a URL whatever the protocol does."""
        self.heard()
        if self.volume.remote:  # it tries again by itself
            return self.file.read(size)
        at = self.file.tell()

        def read() -> bytes:
            try:
                return self.file.read(size)
            except OSError:
                self.file.close()
                self.file = self.volume.open()
                self.file.seek(at)
                raise

        return steadily(self.volume.path, read)

    def __enter__(self) -> _Heard:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


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
        with _Heard(volume, lambda: None) as file, _open_tar(cast(IO[bytes], file), "r|*") as archive:
            for count, info in enumerate(iter(archive.next, None)):
                folder, name = posixpath.split(info.name)
                stem, _, extension = name.partition(".")
                if has_picture_extension(os.fsencode(name)):
                    pictures.add((folder, stem))
                elif extension.lower() in ("cls", "json"):
                    labelled.add((folder, stem))
                if count >= 40:
                    break
    except DAMAGED as error:
        check_machine(volume.path, error)
    return bool(pictures & labelled)
