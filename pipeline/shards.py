"""The writing side of a store: tar shards, their indexes, labels, names, and the manifest that makes it one.

Everything here is a pure function of what is added: tar headers carry no time, owner or mode of the source, so the
same pictures in the same order give the same bytes. `pipeline.store` describes the files and reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.decoder import checksum_in_c, ppm_head
from pipeline.names import printable
from pipeline.staging import write_durably
from pipeline.store import FORMAT, INDEX, MANIFEST, suffix

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
MAX_SIDE = np.iinfo(INDEX["height"]).max
ROW = struct.Struct("<IIQHHQ")  # an INDEX row


class ShardWriter:
    """Appends pictures to `shard-00000.tar`, `shard-00001.tar`, … and writes each shard's index for DALI's reader.

    A sample is `%09d.jpg` (its sample id; `%09d.ppm` where pixels are stored raw) and `%09d.cls`: the first label
    column as decimal text of one fixed width, because a batch of differing widths cannot become one array. Unknown is
    `-00001`: `int()` of it is -1, as everywhere else in the project, and a class 0 cannot be mistaken for it.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, label_width: int = 6, raw: bool = False) -> None:
        self.folder, self.raw = folder, raw
        self.shard_bytes = shard_bytes
        self.label_width = label_width
        self.shards: list[str] = []
        self.files: dict[str, dict] = {}  # name -> bytes and sha256, as the manifest holds it
        self.count = 0
        self._rows = bytearray()
        self._file: BinaryIO | None = None

    @property
    def index(self) -> np.ndarray:
        """(count,) INDEX."""
        return np.frombuffer(bytes(self._rows), INDEX)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A part of the index."""
        return np.frombuffer(bytes(self._rows[start * ROW.size : stop * ROW.size]), INDEX)

    @property
    def finished(self) -> int:
        """Shards that are whole and on the disk."""
        return len(self.files) // 2

    def resume(self, shards: Sequence[str], files: Mapping[str, dict], index: np.ndarray) -> None:
        """Go on behind shards that an earlier writer finished."""
        self.shards, self.files, self.count = list(shards), dict(files), len(index)
        self._rows = bytearray(index.tobytes())

    def add(self, data: bytes, *, label: int, height: int, width: int) -> None:
        """Append one picture, a verified JPEG or raw pixels."""
        key, kind = f"{self.count:09d}", suffix(raw=self.raw)
        head = ppm_head(height, width) if self.raw else b""
        cls, size = b"%0*d" % (self.label_width, label), len(head) + len(data)
        room = 2 * BLOCK + _padded(size) + _padded(len(cls))
        if self._file is None or (self._place and self._place + room > self.shard_bytes):
            self._next_shard()
        offset = self._member(f"{key}.{kind}", head + data)
        cls_offset = self._member(f"{key}.cls", cls)
        self._lines.append(f"{kind} {offset} {size} {key}.{kind} cls {cls_offset} {len(cls)} {key}.cls")
        total = checksum_in_c(np.frombuffer(data, np.uint8))
        self._rows += ROW.pack(len(self.shards) - 1, len(data), offset + len(head), height, width, total)
        self.count += 1

    def close(self) -> None:
        """Finish the last shard. Idempotent."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            # Two empty blocks end an archive; tar pads it to a whole record.
            end = bytes(2 * BLOCK)
            self._write(file, end + bytes(-(self._place + len(end)) % RECORD))
            file.flush()
            os.fsync(file.fileno())
        finally:
            file.close()
        name = self.shards[-1]
        self.files[name] = {"bytes": self._place, "sha256": self._digest.hexdigest()}
        index = "\n".join([f"v1.2 {len(self._lines)}", *self._lines, ""])
        self.files |= write_file(self.folder, index_name(name), index.encode())

    def abandon(self) -> None:
        """Close the open file without finishing it."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
                file.close()

    def _next_shard(self) -> None:
        self.close()
        self.shards.append(f"shard-{len(self.shards):05d}.tar")
        self._file = open(self.folder / self.shards[-1], "wb", buffering=1 << 18)  # noqa: SIM115 (closed in close())
        self._digest = hashlib.sha256()
        self._place = 0
        self._lines: list[str] = []

    def _member(self, name: str, data: bytes) -> int:
        """Write one file of the archive; returns where its data starts."""
        assert self._file is not None
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = len(data), 0o644, 0
        self._write(self._file, header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._place
        self._write(self._file, data + bytes(_padded(len(data)) - len(data)))
        return offset

    def _write(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self._digest.update(data)
        self._place += len(data)


def index_name(shard: str) -> str:
    """The file that holds a shard's index for DALI's reader."""
    return shard.removesuffix(".tar") + ".idx"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def write_file(folder: Path, name: str, data: bytes) -> dict[str, dict]:
    """Write a file of the store; returns its entry for the manifest's `files`."""
    write_durably(folder / name, data)
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def describe_file(path: Path, heard: Callable[[], None] = lambda: None) -> dict[str, dict]:
    """The manifest's entry for a file that something else wrote; makes sure that it is on the disk.

    heard: called for every MiB.
    """
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
            heard()
        os.fsync(file.fileno())
        return {path.name: {"bytes": os.fstat(file.fileno()).st_size, "sha256": state.hexdigest()}}


def write_tables(folder: Path, index: np.ndarray, labels: np.ndarray, names: Iterable[bytes]) -> dict[str, dict]:
    """Write `index.npy`, `labels.npy` and `names.txt`; returns their entries for the manifest.

    index: (count,) INDEX. labels: (count, columns), any integer type. names: source paths, relative, in order.
    """
    files = {}
    for name, table in (("index.npy", index), ("labels.npy", labels.astype("<i4"))):
        buffer = io.BytesIO()
        np.save(buffer, table)
        files |= write_file(folder, name, buffer.getvalue())
    lines = "".join(printable(name) + "\n" for name in names)
    return files | write_file(folder, "names.txt", lines.encode())


def write_manifest(folder: Path, *, files: Mapping[str, dict], index: np.ndarray, **facts: object) -> dict:
    """Write `manifest.json`, which turns the folder into a store: last of all files. Returns what it holds."""
    manifest = {
        "format": FORMAT,
        "count": len(index),
        "max_height": int(index["height"].max()),
        "max_width": int(index["width"].max()),
        **facts,
        "files": {name: files[name] for name in sorted(files)},
    }
    write_durably(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest
