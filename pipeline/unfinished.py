"""What a conversion has finished so far, so that the same command goes on where a killed one stopped.

    .STORE.partial-PID/
      shard-00000.tar …      finished ones, and the one being written
      unfinished/
        job.json             what is being made; another job starts afresh
        finished.jsonl       a line for each shard that is on the disk: how far it reaches, what was bad on the way
        rows.bin             INDEX rows and places in the listing of what those shards hold
        lost.jsonl           items that killed the processes that read them
        spool                pictures of a source that cannot be read at random, and
        listing.npz          what is in it: written when it is complete

Shards are filled in the order of the listing, so all that a kill costs is the one that was being written, and what
workers had decoded for it. A line is written when its shard is on the disk, so a lost line costs a shard, no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, StalledError, UsageError
from pipeline.shards import ShardWriter, describe_file, index_name
from pipeline.sources.entries import Listing, Tell, nobody
from pipeline.sources.source import Source
from pipeline.staging import is_full, sync, write_durably
from pipeline.store import INDEX

FOLDER = "unfinished"
JOB = "job.json"
ROWS = np.dtype([("place", "<u8"), ("row", INDEX)])


@dataclass
class Done:
    """What need not be done again."""

    shards: list[str] = field(default_factory=list)
    files: dict[str, dict] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, ROWS))
    bad: list[dict] = field(default_factory=list)
    kept: int = 0
    next: int = 0  # the first place in the listing that these shards do not cover
    lost: dict[bytes, str] = field(default_factory=dict)


class Unfinished:
    """Keeps the record; opening it in an adopted folder brings back what that record vouches for.

    tell: told of every MiB of finished shards that is read anew, and of the pictures in those that are whole.
    """

    def __init__(self, folder: Path, job: dict, tell: Tell = nobody) -> None:
        self.folder, self.place = folder, folder / FOLDER
        self.done = Done()
        if self.place.is_dir():
            self._restore(tell)
        else:
            self.place.mkdir()
            write_durably(self.place / JOB, json.dumps(job).encode())
        self._shards, self._bad, self._rows = (len(each) for each in (self.done.shards, self.done.bad, self.done.rows))

    @property
    def spool(self) -> Path:
        return self.place / "spool"

    def finished(
        self, writer: ShardWriter, places: Sequence[int], next: int, bad: list[dict], kept: int, *, last: bool
    ) -> None:
        """Vouch for all shards up to the writer's last finished one.

        places: the place in the listing of each sample in them. next: the first place that they do not cover.
        bad, kept: what was met before that.
        """
        new = np.empty(len(places) - self._rows, ROWS)
        new["place"], new["row"] = places[self._rows :], writer.rows(self._rows, len(places))
        _append(self.place / "rows.bin", new.tobytes())
        shards = writer.shards[self._shards : writer.finished]
        line = {
            "shards": shards,
            "files": {name: writer.files[name] for shard in shards for name in (shard, index_name(shard))},
            "rows": len(places),
            "next": next,
            "bad": bad[self._bad :],
            "kept": kept,
            "last": last,
        }
        _append(self.place / "finished.jsonl", (json.dumps(line) + "\n").encode())
        self._shards, self._bad, self._rows = writer.finished, len(bad), len(places)

    def lose(self, path: bytes, reason: str) -> None:
        """Remember an item that killed its readers: the next process must not try it."""
        _append(self.place / "lost.jsonl", (json.dumps({"path": os.fsdecode(path), "reason": reason}) + "\n").encode())

    def listing(self, source: Source) -> Listing:
        """What the source holds; one that can only be streamed is not streamed twice."""
        saved = self.place / "listing.npz"
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            return Listing.load(saved)
        listing = source.listing(self.spool)
        if self.spool.exists():
            listing.save(saved.with_suffix(".part"))
            sync(saved.with_suffix(".part"))
            os.replace(saved.with_suffix(".part"), saved)
        return listing

    def remove(self) -> None:
        # A kill on the way leaves what a next run can go on from: no listing whose spool is gone, the job to the end.
        order = {"listing.npz": 0, "spool": 1, JOB: 3}
        for path in sorted(self.place.iterdir(), key=lambda path: order.get(path.name, 2)):
            path.unlink()
        self.place.rmdir()

    def _restore(self, tell: Tell) -> None:
        """Read the record and remove whatever it does not vouch for."""
        done, table = self.done, self.place / "rows.bin"
        rows = np.fromfile(table, ROWS, count=table.stat().st_size // ROWS.itemsize) if table.exists() else done.rows
        lines = []
        for line in _lines(self.place / "finished.jsonl"):
            paths = [(self.folder / name, facts) for name, facts in line["files"].items()]
            if line["rows"] > len(rows) or not all(_whole(path, facts, tell, len(done.rows)) for path, facts in paths):
                break
            lines.append(line)
            done.shards += line["shards"]
            done.files |= line["files"]
            done.bad += line["bad"]
            done.next, done.kept = line["next"], line["kept"]
            done.rows = rows[: line["rows"]]
        lost = _lines(self.place / "lost.jsonl")
        done.lost = {os.fsencode(line["path"]): line["reason"] for line in lost}
        # Without a line that a kill has torn: what is appended next would become part of it.
        write_durably(table, done.rows.tobytes())
        for name, whole in (("finished.jsonl", lines), ("lost.jsonl", lost)):
            write_durably(self.place / name, "".join(json.dumps(line) + "\n" for line in whole).encode())
        for path in self.folder.iterdir():
            if path.name not in done.files and path != self.place:
                path.unlink()


def fits(folder: Path, job: dict) -> bool:
    """Whether a folder that a killed process left is this job, half done."""
    try:
        return json.loads((folder / FOLDER / JOB).read_text()) == job
    except (OSError, ValueError):
        return False


def worth_keeping(folder: Path, error: BaseException) -> bool:
    """Whether what a conversion leaves when it stops may help the next one: full shards, and nothing wrong with them.

    A full disk is given back, and files that are wrong are wrong again. A disk that fails otherwise may work again.
    Items that killed their readers are forgotten where so many did that something else must be wrong.
    """
    if isinstance(error, StalledError):
        (folder / FOLDER / "lost.jsonl").unlink(missing_ok=True)
    full = any(not line["last"] for line in _lines(folder / FOLDER / "finished.jsonl"))
    return full and not is_full(error) and not isinstance(error, (DataError, UsageError))


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> list[dict]:
    """Whole lines of JSON; a kill may have torn the last one."""
    lines = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def _whole(path: Path, facts: dict, tell: Tell, images: int) -> bool:
    def heard() -> None:
        tell(str(path), images)

    heard()
    if not path.is_file() or path.stat().st_size != facts["bytes"]:
        return False
    return describe_file(path, heard)[path.name] == facts
