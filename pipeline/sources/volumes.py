"""Files that hold many pictures, on this machine or behind a URL: what they are, and how they are opened and heard."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import DaaeError, DataError, ResourceError
from pipeline.handles import steadily
from pipeline.sources.entries import Tell, nobody

HEAD = 512

T = TypeVar("T")


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
        return self._trying(self._open)

    def _trying(self, read: Callable[[], T]) -> T:
        try:
            return steadily(self.path, read)
        except DaaeError:
            raise
        except Exception as error:  # each protocol has errors of its own
            raise DataError(f"{self.path} {why_unreadable(error)}.") from None

    def _open(self) -> BinaryIO:
        if self.remote:
            system, path = file_system(self.path)
            return system.open(path, "rb")
        return open(self.path, "rb")

    def head(self) -> bytes:
        """Its first bytes. Raises DataError, ResourceError."""

        def read() -> bytes:
            with self._open() as file:
                return file.read(HEAD)

        return self._trying(read)


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
            raise DataError(f"{name} {why_unreadable(error)}.") from None
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


class Heard:
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

    def __enter__(self) -> Heard:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def why_unreadable(error: Exception) -> str:
    return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
