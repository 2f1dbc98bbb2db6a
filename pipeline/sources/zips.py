"""Zip archives, read by their own directory one record at a time: a million members take no memory.

`zipfile` makes an object of half a kilobyte of each, in every process that opens the archive.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

# PKWARE's APPNOTE: 4.3.12 and 4.3.7 (a member's record and its header before the data), 4.3.14 to 4.3.16 (the end).
RECORD = struct.Struct("<4s6H3L5H2L")
HEADER = struct.Struct("<4s5H3L2H")
END, END64, LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
LARGEST_COMMENT = 0xFFFF
LARGEST_RECORD = RECORD.size + 3 * 0xFFFF
BLOCK = 1 << 20  # bytes of the directory that are held
ENCRYPTED, UTF8 = 1, 1 << 11  # flags of a member
ELSEWHERE = 0xFFFFFFFF  # a number of 64 bits stands in the extra field
LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Record:
    """What the directory says of a member."""

    at: int  # where this stands in the file
    name: bytes
    flags: int
    method: int
    crc: int
    packed: int  # bytes as they are stored
    size: int
    mode: int  # of a Unix file, 0 where it was made elsewhere
    header: int  # where the member begins


class ZipDirectory:
    def __init__(self, file: IO[bytes]) -> None:
        """Raises BadZipFile: no end of a directory, or one that cannot be."""
        self.file = file
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - LARGEST_COMMENT - END.size - LOCATOR.size - END64.size))
        tail = file.read(size - start)
        at = tail.rfind(b"PK\5\6")
        if not 0 <= at <= len(tail) - END.size:
            raise zipfile.BadZipFile("it has no directory, so it is cut off or no zip archive")
        length = END.unpack_from(tail, at)[5]
        before = at - LOCATOR.size - END64.size
        if before >= 0 and tail.startswith(b"PK\6\7", before + END64.size) and tail.startswith(b"PK\6\6", before):
            at = before
            length = END64.unpack_from(tail, at)[8]
        self.stop = start + at
        self.start = self.stop - length
        if self.start < 0:
            raise zipfile.BadZipFile("its directory is damaged")

    def __iter__(self) -> Iterator[Record]:
        """Raises BadZipFile. The file may be read elsewhere between two records."""
        place, block, used = self.start, b"", 0
        while place + used < self.stop:
            if len(block) - used < LARGEST_RECORD and place + len(block) < self.stop:
                place, used = self.file.seek(place + used), 0
                block = self.file.read(min(BLOCK, self.stop - place))
            record, length = _parse(block, used, place + used)
            yield record
            used += length


def read_record(file: IO[bytes], at: int) -> Record:
    """The one that stands there. Raises BadZipFile."""
    file.seek(at)
    fixed = file.read(RECORD.size)
    return _parse(fixed + file.read(sum(struct.unpack_from("<2H", fixed.ljust(32), 28))), 0, at)[0]


def open_member(file: IO[bytes], record: Record) -> IO[bytes]:
    """A member, inflated as it is read, to no more than the size in its record; its sum is compared at the end.

    Raises BadZipFile; NotImplementedError where it is compressed in a way that Python does not know.
    """
    header = b""
    if record.header < record.at:
        file.seek(record.header)
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile("it does not lie where the directory says")
    file.seek(record.header + HEADER.size + sum(HEADER.unpack(header)[-2:]))
    info = zipfile.ZipInfo(record.name.decode("utf-8", "replace"))
    info.compress_type, info.compress_size, info.file_size = record.method, record.packed, record.size
    info.CRC, info.flag_bits = record.crc, record.flags
    return cast(IO[bytes], zipfile.ZipExtFile(file, "r", info))


def _parse(block: bytes, start: int, at: int) -> tuple[Record, int]:
    """The record that begins at block[start], and its length with the comment behind it."""
    try:
        (
            mark, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length, _, _,
            attributes, header,
        ) = RECORD.unpack_from(block, start)  # fmt: skip
    except struct.error:
        raise zipfile.BadZipFile("its directory is cut off") from None
    name_at = start + RECORD.size
    extra_at = name_at + name_length
    name, extra = block[name_at:extra_at], block[extra_at : extra_at + extra_length]
    if mark != b"PK\1\2" or len(extra) < extra_length:
        raise zipfile.BadZipFile("its directory is damaged")
    if not flags & UTF8:
        name = name.decode("cp437").encode()
    size, packed, header = _wide(extra, (size, packed, header))
    found = Record(at, name, flags, method, crc, packed, size, attributes >> 16, header)
    return found, RECORD.size + name_length + extra_length + comment_length


def _wide(extra: bytes, values: tuple[int, int, int]) -> list[int]:
    """Numbers of a record; those that need 64 bits stand, in order, in an extra field of kind 1 (APPNOTE 4.5.3)."""
    at, wide = 0, iter(())
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            count = min(length, len(extra) - at - 4) // 8
            wide = iter(struct.unpack_from(f"<{count}Q", extra, at + 4))
            break
        at += 4 + length
    return [min(next(wide, value), LARGEST) if value == ELSEWHERE else value for value in values]
