"""From finished shards to a store, all but its manifest: the tables, and the FFCV file in one last pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.ffcv_writer import move_index, write_beton
from pipeline.shards import ShardWriter, describe_file, write_tables
from pipeline.store import BETON
from tools.converting.watchdog import WRITING, Watchdog
from tools.progress import Progress


@dataclass(frozen=True)
class Assembled:
    files: dict[str, dict]  # as the manifest holds it
    index: np.ndarray
    shards: list[str]


def assemble(
    folder: Path,
    writer: ShardWriter,
    labels: np.ndarray,
    names: Callable[[], Iterable[bytes]],
    *,
    backends: list[str],
    watchdog: Watchdog,
) -> Assembled:
    """labels: (count, columns). names: source paths, afresh at each call. Raises ResourceError, StalledError."""
    files, index, shards = dict(writer.files), writer.index, writer.shards

    def write() -> dict[str, dict]:
        watchdog.tell(str(folder), len(index))
        return write_tables(folder, index, labels, names())

    tables = watchdog.do(WRITING, write, writes=True)
    if "ffcv" in backends:
        progress = Progress("FFCV file", total_bytes=int(index["size"].sum()), quiet=watchdog.quiet)

        def heard(done: int) -> None:
            watchdog.tell(str(folder / BETON), len(index))
            progress.at(done_bytes=done)

        def write_ffcv() -> Path:
            return write_beton(folder, raw=writer.raw, stall_seconds=watchdog.stall_seconds, progress=heard)

        with progress.show():
            beton = watchdog.do(WRITING, write_ffcv, writes=True)
        files |= describe_file(beton)
        if "dali" not in backends:
            # The FFCV file is then the only shard: the index points at the pictures inside it.
            index, shards = move_index(beton, index), [BETON]
            tables = watchdog.do(WRITING, write, writes=True)
            for name in writer.files:
                (folder / name).unlink()
            files = {BETON: files[BETON]}
    return Assembled(files | tables, index, shards)
