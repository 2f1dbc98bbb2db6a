"""What lies in tar and zip archives, member by member: names that stay inside, nothing but regular files."""

from __future__ import annotations

import lzma
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from tarfile import HeaderError, ReadError, TarFile
from typing import IO, Any, Self

from pipeline.sources.entries import Listing
from pipeline.sources.volumes import why_unreadable
from pipeline.sources.zips import ENCRYPTED, ZipDirectory, open_member

LARGEST_HEADER = 1 << 20  # bytes of one member's long name or attributes
EXTENDED = {
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
}  # fmt: skip
# What a damaged or hostile archive makes the libraries raise; zipfile's word for a compression or an encryption that it
# does not know is NotImplementedError.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, OSError)


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
                with _content(archive, info) as file, open_tar(file, "r|" if streamed else "r:") as inner:
                    shifted = partial(_take_shifted, take, path[:-4], info)
                    each_in_tar(inner, listing, prefix, shifted, streamed=streamed, nested=False)
            except (tarfile.TarError, EOFError) as error:
                listing.unreadable.append((posixpath.join(prefix, path), why_unreadable(error)))
            continue
        take(Member(path, info.size, info.offset_data, _stamp(info.mtime), partial(_content, archive, info)))
    if archive.open_end:
        listing.skipped["archives without an end mark (cut off?)"] += 1


def _stamp(seconds: float) -> int:
    """Nanoseconds; 0 for what is no time of these centuries: a header may hold anything, also nan."""
    return int(seconds * 1e9) if 0 <= seconds < 1 << 33 else 0


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
        if not 0 <= header.size < 1 << 63:  # below 0 the next one would be one that was read already, for ever
            raise ReadError(f"it has a file of {header.size:,} bytes")
        return header


class _Tar(TarFile):
    tarinfo = _Header
    open_end = False


def open_tar(file: IO[bytes], mode: Any) -> _Tar:
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
