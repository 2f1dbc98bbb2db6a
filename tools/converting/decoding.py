"""The long part of a conversion: every picture of a listing is decoded, and what is good written as shards in order.

worker processes: read, check, decode, encode -> this process, in order -> shards, each vouched for once it is whole
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from array import array
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.limits import usable_cores
from pipeline.names import printable
from pipeline.ordered_map import ordered_map
from pipeline.pictures import Encoding, Stored
from pipeline.shards import ShardWriter
from pipeline.sources.entries import Entry, Listing
from pipeline.sources.source import Reader, try_entry
from pipeline.unfinished import Unfinished
from tools.converting.flags import Convert
from tools.converting.watchdog import WRITING, Watchdog
from tools.progress import Progress

TASK = 8  # files that a worker takes at once; fewer where raw pictures may be large
TASK_BYTES = 32 << 20
# Pictures are written, in a thread of its own each time, when so many bytes of them wait or so much time has passed.
HELD_BYTES, HELD_SECONDS = 4 << 20, 0.5

Answers = list[Stored | str]  # to the files of a task that are not lost: a picture, or why there is none


@dataclass
class Made:
    shards: ShardWriter
    chosen: array = field(default_factory=lambda: array("q"))  # sample id -> place in listing.files
    bad: list[dict] = field(default_factory=list)
    kept: int = 0  # pictures whose own JPEG is stored as it was


class Remaining:
    """What is left to do, cut into tasks of `size` files when a worker is free: no list of a million paths."""

    def __init__(self, listing: Listing, start: int, lost: dict[bytes, str], size: int = TASK) -> None:
        self.files, self.start, self.size = listing.files, start, size
        self.lost = {place for place in map(listing.files.find, lost) if place is not None}

    def __len__(self) -> int:
        return -(-(len(self.files) - self.start) // self.size)

    def places(self, task: int) -> range:
        first = self.start + task * self.size
        return range(first, min(first + self.size, len(self.files)))

    def __getitem__(self, task: int) -> list[Entry]:
        if not 0 <= task < len(self):
            raise IndexError(task)
        return [self.files[place] for place in self.places(task) if place not in self.lost]


class Decoding:
    """The pictures of one conversion, behind those that an earlier run of it has finished."""

    def __init__(
        self, flags: Convert, listing: Listing, folder: Path, unfinished: Unfinished, watchdog: Watchdog
    ) -> None:
        self.flags, self.listing, self.folder = flags, listing, folder
        self.unfinished, self.watchdog = unfinished, watchdog
        width = label_width(listing.labels.columns)
        raw = flags.pixels == "raw"
        self.made = Made(ShardWriter(folder, shard_bytes=flags.shard_mb << 20, label_width=width, raw=raw))
        self.made.bad = [{"path": printable(path), "reason": why, "bytes": 0} for path, why in listing.unreadable]
        self.allowed = tolerated(flags.max_bad, len(listing.files))
        done = unfinished.done
        if done.rows.size:
            self.made.shards.resume(done.shards, done.files, done.rows["row"])
            self.made.chosen = array("q", done.rows["place"].tolist())
            self.made.bad, self.made.kept = list(done.bad), done.kept
            note(
                flags,
                f"going on behind {done.next:,} of {len(listing.files):,} images that an earlier run had finished.",
            )
        size = min(TASK, max(1, TASK_BYTES // (3 * flags.max_side**2))) if raw else TASK
        self.tasks = Remaining(listing, done.next, done.lost, size)

    def run(self, reader: Reader) -> Made:
        """Raises ResourceError, StalledError; what was vouched for until then is there to be gone on from."""
        flags, start, sizes = self.flags, self.tasks.start, self.listing.files.sizes
        results = ordered_map(
            try_entry,
            self.tasks,
            (reader, encoding_of(flags)),
            workers=_workers(flags),
            stall_seconds=flags.stall_timeout,
            describe=lambda entry: os.path.join(shown(flags.src), printable(entry.path)),
            lost=self._lose,
        )
        progress = Progress(
            "images", total_bytes=int(sizes[start:].sum()), total_images=len(sizes) - start, quiet=flags.quiet
        )
        held, held_bytes, written, done_bytes = [], 0, time.monotonic(), 0
        try:
            with contextlib.closing(results), progress.show():
                for task, answers in enumerate(results):
                    held.append((task, answers))
                    held_bytes += sum(len(answer.data) for answer in answers if not isinstance(answer, str))
                    if held_bytes > HELD_BYTES or time.monotonic() - written > HELD_SECONDS:
                        self.watchdog.do(WRITING, partial(self._write, held), writes=True)
                        held, held_bytes, written = [], 0, time.monotonic()
                    places = self.tasks.places(task)
                    done_bytes += int(sizes[places.start : places.stop].sum())
                    progress.at(images=places.stop - start, done_bytes=done_bytes, bad=len(self.made.bad))
                self.watchdog.do(WRITING, partial(self._end, held), writes=True)
        except BaseException:
            if not self.watchdog.hung:
                self.made.shards.abandon()
            raise
        self.made.bad.sort(key=lambda row: row["path"])
        return self.made

    def _write(self, held: list[tuple[int, Answers]]) -> None:
        made = self.made
        for task, answers in held:
            answer_of = iter(answers)
            for place in self.tasks.places(task):
                entry = self.listing.files[place]
                self.watchdog.tell(str(self.folder), place)
                answer = self.unfinished.done.lost[entry.path] if place in self.tasks.lost else next(answer_of)
                if isinstance(answer, str):
                    made.bad.append({"path": printable(entry.path), "reason": answer, "bytes": entry.size})
                # Past the limit the rest is still checked, so that the list is whole, but no longer written.
                elif len(made.bad) <= self.allowed:
                    self._add(place, answer)

    def _add(self, place: int, picture: Stored) -> None:
        made, labels = self.made, self.listing.labels
        label = int(labels.table[place, 0]) if labels.columns else -1
        finished = made.shards.finished
        made.shards.add(picture.data, label=label, height=picture.height, width=picture.width)
        if made.shards.finished > finished:
            self._vouch(place, last=False)
        made.chosen.append(place)
        made.kept += picture.kept

    def _end(self, held: list[tuple[int, Answers]]) -> None:
        self._write(held)
        self.made.shards.close()
        if self.made.chosen and len(self.made.bad) <= self.allowed:
            self._vouch(len(self.listing.files), last=True)

    def _vouch(self, place: int, *, last: bool) -> None:
        """A shard is on the disk; it and those before it reach up to `place` in the listing."""
        made = self.made
        self.unfinished.finished(made.shards, made.chosen, place, made.bad, made.kept, last=last)

    def _lose(self, entry: Entry, how: str) -> str:
        """Why there is no picture of a file that ended two processes: told the next run too, which leaves it alone."""
        reason = f"the process that decoded it {how}, and so did a second one"
        self.watchdog.do(WRITING, lambda: self.unfinished.lose(entry.path, reason), writes=True)
        return reason


def encoding_of(flags: Convert) -> Encoding:
    """Raises UsageError: flags that exclude one another."""
    if flags.pixels == "raw" and (flags.quality, flags.chroma) != (Encoding.quality, Encoding.chroma):
        raise UsageError("--quality and --chroma say how JPEGs are made, and --pixels raw makes none: leave them out.")
    return Encoding(
        max_side=flags.max_side,
        pixels=flags.pixels,
        quality=flags.quality,
        chroma=flags.chroma,
        max_pixels=flags.max_pixels,
        min_side=flags.min_side,
    )


def label_width(columns: dict[str, list[str]]) -> int:
    """Digits of a label in a shard: one width for all, because a batch of differing widths cannot become one array."""
    return max(6, *(len(str(len(classes) - 1)) for classes in columns.values()), 0)


def tolerated(share: float, count: int) -> int:
    """How many bad files of `count` a conversion survives: the share, but a few always, unless it is 0."""
    return max(10, math.ceil(share * count)) if share else 0


def _workers(flags: Convert) -> int:
    cores = max(1, int(usable_cores()))
    if flags.workers is not None and flags.workers > cores:
        note(flags, f"--workers {flags.workers}, but this process may use {cores} cores: more will not be faster.")
    return flags.workers or cores


def note(flags: Convert, text: str) -> None:
    if not flags.quiet:
        print(f"note: {text}", file=sys.stderr)


def shown(src: str) -> str:
    return printable(os.fsencode(src))
