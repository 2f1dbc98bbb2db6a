"""The work of `daae convert`, from a source of images to a finished store.

list the source, with labels -> decode in worker processes -> shards in one thread -> FFCV file -> manifest -> rename
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from array import array
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, ResourceError, UsageError
from pipeline.ffcv_writer import ffcv_missing
from pipeline.limits import usable_cores
from pipeline.ordered_map import ordered_map
from pipeline.pictures import Encoding, Stored
from pipeline.shards import ShardWriter, printable, write_file, write_manifest
from pipeline.sources.entries import Entry, Listing, Tell
from pipeline.sources.source import Choice, Reader, Source, open_source, try_entry
from pipeline.sources.tables import Columns
from pipeline.staging import size_in_words, staging, write_durably
from pipeline.store import FORMAT, MANIFEST, Store
from pipeline.unfinished import Unfinished, fits, worth_keeping
from tools.converting.assembly import assemble
from tools.converting.flags import Convert
from tools.converting.watchdog import WRITING, Watchdog
from tools.progress import Progress

BAD_FILES, STATS = "bad_files.jsonl", "stats.json"
TASK = 8  # files that a worker takes at once
# Pictures are written, in a thread of its own each time, when so many bytes of them wait or so much time has passed.
HELD_BYTES, HELD_SECONDS = 4 << 20, 0.5
SPLITS = {"train", "val", "valid", "validation", "test", "training", "testing"}


def convert(flags: Convert, dst: Path) -> dict:
    """Do what the flags say. Returns what `--json` prints.

    Raises DataError, ResourceError, StalledError, UsageError; then DST is as it was, and nothing else is left but
    `DST.bad_files.jsonl` where too many files were bad, and beside DST the shards that the same command can go on from,
    or whatever is there where the disk that it is written to hangs.
    """
    with Watchdog(flags.stall_timeout, quiet=flags.quiet) as watchdog:
        return _convert(flags, dst, watchdog)


def _convert(flags: Convert, dst: Path, watchdog: Watchdog) -> dict:
    start = time.monotonic()
    backends = _backends(flags)
    options = _options(flags, backends)
    source = watchdog.do("looking at the source", lambda: source_of(flags, watchdog.tell))
    digest = watchdog.do("listing", source.digest)
    nothing_to_do = _earlier(flags, dst, options, digest)
    if nothing_to_do is not None:
        return nothing_to_do
    complaint = dst.parent / f"{dst.name}.{BAD_FILES}"
    # The FFCV file is made of the shards at the end: with or without it they are the same.
    job = {"format": FORMAT, "source": digest, "encode": {**options, "backends": None}}
    adopt, keep = (lambda left: fits(left, job)), (lambda left, error: _keep(left, error, watchdog))
    with staging(dst, replace=flags.overwrite, adopt=adopt, keep=keep) as folder:
        unfinished = watchdog.do(
            "reading what is finished", lambda: Unfinished(folder, job, watchdog.tell), writes=True
        )
        listing = watchdog.do("listing", lambda: unfinished.listing(source))
        if not listing.files:
            raise DataError(f"{flags.src} has no images ({listing.looked_at()}).")
        for path, why in listing.unreadable[:3]:
            _note(flags, f"{printable(path)} {why}; what else is there is used.")
        _check_disk(flags, dst, listing, backends, int(unfinished.done.rows["row"]["size"].sum()))
        complaint.unlink(missing_ok=True)
        made = _decode(flags, listing, source.reader(unfinished.spool), folder, unfinished, watchdog)
        _check_bad(flags, listing, made, complaint)
        chosen = np.array(made.chosen, np.int64)
        whole = assemble(
            folder,
            made.shards,
            listing.labels.table[chosen],
            lambda: (listing.files.path(place) for place in made.chosen),
            backends=backends,
            watchdog=watchdog,
        )
        seconds = time.monotonic() - start

        def finish() -> None:
            watchdog.tell(str(folder), len(chosen))
            bad = write_file(folder, BAD_FILES, bad_lines(made.bad))
            # The one file that differs from run to run, so the manifest does not vouch for it.
            write_durably(folder / STATS, (json.dumps(_stats(listing, made, seconds), indent=1) + "\n").encode())
            write_manifest(
                folder,
                files=whole.files | bad,
                index=whole.index,
                columns=listing.labels.columns,
                shards=whole.shards,
                encode=options,
                source={"path": _shown(flags.src), "files": len(listing.files), "listing": digest},
                bad=len(made.bad),
                skipped=dict(sorted(listing.skipped.items())),
            )
            # Last of all: killed before, the same command goes on here.
            unfinished.remove()

        watchdog.do(WRITING, finish, writes=True)
    return _result(dst, seconds, done="converted")


def source_of(flags: Convert, tell: Tell) -> Source:
    """The source that the flags name; it tells where it stands. Raises DataError, ResourceError, UsageError."""
    image, _, label = flags.columns.partition(",")
    choice = Choice(
        kind=flags.kind,
        subset=flags.list,
        devkit=flags.devkit,
        columns=Columns(image.strip() or None, label.strip() or None),
    )
    return open_source(flags.src, choice, largest=encoding_of(flags).max_bytes, tell=tell)


def _shown(src: str) -> str:
    return printable(os.fsencode(src))


def _keep(folder: Path, error: BaseException, watchdog: Watchdog) -> bool:
    kept = watchdog.hung or worth_keeping(folder, error)
    if kept and (watchdog.hung or not watchdog.quiet):
        print(
            f"note: the shards finished so far are kept in {folder}; the same command goes on there.", file=sys.stderr
        )
    return kept


# ------------------------------------------------------------------------------------------------------------ decode


@dataclass
class Made:
    shards: ShardWriter
    chosen: array = field(default_factory=lambda: array("q"))  # sample id -> place in listing.files
    bad: list[dict] = field(default_factory=list)
    kept: int = 0


class _Tasks:
    """What is left to do, cut into tasks when a worker is free: no list of a million paths."""

    def __init__(self, listing: Listing, start: int, lost: dict[bytes, str]) -> None:
        self.files, self.start = listing.files, start
        self.lost = {place for place in map(listing.files.find, lost) if place is not None}

    def __len__(self) -> int:
        return -(-(len(self.files) - self.start) // TASK)

    def places(self, task: int) -> range:
        first = self.start + task * TASK
        return range(first, min(first + TASK, len(self.files)))

    def __getitem__(self, task: int) -> list[Entry]:
        if not 0 <= task < len(self):
            raise IndexError(task)
        return [self.files[place] for place in self.places(task) if place not in self.lost]


def _decode(
    flags: Convert, listing: Listing, reader: Reader, folder: Path, unfinished: Unfinished, watchdog: Watchdog
) -> Made:
    """Decode everything, write what is good in order, list what is bad."""
    labels, files = listing.labels, listing.files
    made = Made(ShardWriter(folder, shard_bytes=flags.shard_mb << 20, label_width=label_width(labels.columns)))
    made.bad = [{"path": printable(path), "reason": why, "bytes": 0} for path, why in listing.unreadable]
    allowed = tolerated(flags.max_bad, len(files))
    done = unfinished.done
    if done.rows.size:
        made.shards.resume(done.shards, done.files, done.rows["row"])
        made.chosen, made.bad, made.kept = array("q", done.rows["place"].tolist()), list(done.bad), done.kept
        _note(flags, f"going on behind {done.next:,} of {len(files):,} images that an earlier run had finished.")
    tasks = _Tasks(listing, done.next, done.lost)
    sizes = files.sizes
    progress = Progress(
        "images",
        total_bytes=int(sizes[done.next :].sum()),
        total_images=len(files) - done.next,
        quiet=flags.quiet,
    )

    def lose(entry: Entry, how: str) -> str:
        reason = f"the process that decoded it {how}, and so did a second one"
        watchdog.do(WRITING, lambda: unfinished.lose(entry.path, reason), writes=True)
        return reason

    results = ordered_map(
        try_entry,
        tasks,
        (reader, encoding_of(flags)),
        workers=_workers(flags),
        stall_seconds=flags.stall_timeout,
        describe=lambda entry: os.path.join(_shown(flags.src), printable(entry.path)),
        lost=lose,
    )

    def take(held: list[tuple[int, list[Stored | str]]]) -> None:
        for task, answers in held:
            answer_of = iter(answers)
            for place in tasks.places(task):
                entry = files[place]
                watchdog.tell(str(folder), place)
                answer = done.lost[entry.path] if place in tasks.lost else next(answer_of)
                if isinstance(answer, str):
                    made.bad.append({"path": printable(entry.path), "reason": answer, "bytes": entry.size})
                # Past the limit the rest is still checked, so that the list is whole, but no longer written.
                elif len(made.bad) <= allowed:
                    label = int(labels.table[place, 0]) if labels.columns else -1
                    finished = made.shards.finished
                    made.shards.add(answer.jpeg, label=label, height=answer.height, width=answer.width)
                    if made.shards.finished > finished:
                        _vouch(unfinished, made, place, last=False)
                    made.chosen.append(place)
                    made.kept += answer.kept

    def end(held: list[tuple[int, list[Stored | str]]]) -> None:
        take(held)
        made.shards.close()
        if made.chosen and len(made.bad) <= allowed:
            _vouch(unfinished, made, len(files), last=True)

    held, held_bytes, written, done_bytes = [], 0, time.monotonic(), 0
    try:
        with contextlib.closing(results), progress.show():
            for task, answers in enumerate(results):
                held.append((task, answers))
                held_bytes += sum(len(answer.jpeg) for answer in answers if not isinstance(answer, str))
                if held_bytes > HELD_BYTES or time.monotonic() - written > HELD_SECONDS:
                    watchdog.do(WRITING, partial(take, held), writes=True)
                    held, held_bytes, written = [], 0, time.monotonic()
                places = tasks.places(task)
                done_bytes += int(sizes[places.start : places.stop].sum())
                progress.at(images=places.stop - done.next, done_bytes=done_bytes, bad=len(made.bad))
            watchdog.do(WRITING, partial(end, held), writes=True)
    except BaseException:
        if not watchdog.hung:
            made.shards.abandon()
        raise
    made.bad.sort(key=lambda row: row["path"])
    return made


def label_width(columns: dict[str, list[str]]) -> int:
    """Digits of a label in a shard: one width for all, because a batch of differing widths cannot become one array."""
    return max(6, *(len(str(len(classes) - 1)) for classes in columns.values()), 0)


def _vouch(unfinished: Unfinished, made: Made, place: int, *, last: bool) -> None:
    """A shard is on the disk; it and those before it reach up to `place` in the listing."""
    unfinished.finished(made.shards, made.chosen, place, made.bad, made.kept, last=last)


def _workers(flags: Convert) -> int:
    cores = max(1, int(usable_cores()))
    if flags.workers is not None and flags.workers > cores:
        _note(flags, f"--workers {flags.workers}, but this process may use {cores} cores: more will not be faster.")
    return flags.workers or cores


def _note(flags: Convert, text: str) -> None:
    if not flags.quiet:
        print(f"note: {text}", file=sys.stderr)


def tolerated(share: float, count: int) -> int:
    """How many bad files of `count` a conversion survives: the share, but a few always, unless it is 0."""
    return max(10, math.ceil(share * count)) if share else 0


def _check_bad(flags: Convert, listing: Listing, made: Made, complaint: Path) -> None:
    allowed = tolerated(flags.max_bad, len(listing.files))
    if made.chosen and len(made.bad) <= allowed:
        return
    write_durably(complaint, bad_lines(made.bad))
    example = f"e.g. {made.bad[0]['path']} {made.bad[0]['reason']}"
    if len(made.bad) >= len(listing.files):
        others = sum(listing.skipped.values())
        looked = f"looked at {len(listing.files) + others} files: {len(made.bad)} bad, {example}"
        raise DataError(f"{flags.src} has no readable images ({looked}). See {complaint}")
    raise DataError(
        f"{flags.src} has {len(made.bad):,} bad files of {len(listing.files):,}, {example}; "
        f"--max-bad {flags.max_bad:g} tolerates {allowed:,}. See {complaint}"
    )


def bad_lines(bad: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in bad).encode()


# -------------------------------------------------------------------------------------------- before and after the work


def _backends(flags: Convert) -> list[str]:
    if flags.backends == "dali":
        return ["dali"]
    missing = ffcv_missing()
    if missing is None:
        return ["dali", "ffcv"] if flags.backends == "both" else ["ffcv"]
    if flags.backends == "ffcv":
        raise ResourceError(f"--backends ffcv needs FFCV: {missing}. Run `make setup`, or pass --backends dali.")
    print(f"note: FFCV is not there ({missing}); writing tar shards only.", file=sys.stderr)
    return ["dali"]


def _options(flags: Convert, backends: list[str]) -> dict:
    """What decides the bytes of the store, as the manifest records it."""
    encoding = dataclasses.asdict(encoding_of(flags))
    return encoding | {
        "chroma": "4:2:0",
        "small_chroma": "4:4:4",
        "resampling": "lanczos",
        "background": "white",
        "backends": backends,
        "shard_mb": flags.shard_mb,
    }


def _earlier(flags: Convert, dst: Path, options: dict, digest: str) -> dict | None:
    """The result of an earlier conversion if DST is just what is asked for; None if DST may be written.

    Raises UsageError: DST is something else.
    """
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return None
    if not (dst / MANIFEST).is_file():
        raise UsageError(f"{dst} exists and is not a store. Choose another DST, or remove it yourself.")
    if flags.overwrite:
        return None
    ask = "Choose another DST, or --overwrite replaces it."
    try:
        manifest = Store.open(dst).manifest
        before, listing, bad = manifest["encode"], manifest["source"]["listing"], manifest["bad"]
    except (DataError, KeyError, TypeError) as error:
        raise UsageError(f"{dst} is a damaged store: {error} {ask}") from None
    if listing != digest:
        raise UsageError(f"{dst} is a store of other files, or {flags.src} has changed since. {ask}")
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in options.items() if before.get(name) != value]
    if changed:
        raise UsageError(f"{dst} was made with other settings ({'; '.join(changed)}). {ask}")
    if bad > tolerated(flags.max_bad, manifest["source"]["files"]):
        raise UsageError(f"{dst} was made without {bad} bad files, more than --max-bad {flags.max_bad:g}. {ask}")
    return _result(dst, 0.0, done="nothing to do")


def _check_disk(flags: Convert, dst: Path, listing: Listing, backends: list[str], done_bytes: int) -> None:
    """done_bytes: JPEG bytes that an earlier run has written already."""
    # A stored picture is rarely larger than its source, and hardly ever than 0.4 bytes a pixel; tar adds 2 kB.
    largest = flags.max_side**2 * 0.4 * (3 if flags.quality > 95 else 1)
    sizes = listing.files.sizes
    pictures = float(np.minimum(1.2 * sizes, largest).sum() + 1024 * len(sizes))
    need = (pictures + 2048 * len(sizes)) + (pictures if "ffcv" in backends else 0) + (32 << 20) - done_bytes
    place = dst.absolute().parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise ResourceError(
            f"{place} has {size_in_words(free)} free, the store needs about {size_in_words(need)}. "
            "Free some, choose another disk, or lower --max-side or --quality."
        )


def encoding_of(flags: Convert) -> Encoding:
    return Encoding(
        max_side=flags.max_side, quality=flags.quality, max_pixels=flags.max_pixels, min_side=flags.min_side
    )


def _stats(listing: Listing, made: Made, seconds: float) -> dict:
    index = made.shards.index
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(len(listing.files) / seconds, 1),
        "source_bytes": int(listing.files.sizes.sum()),
        "jpeg_bytes": int(index["size"].sum()),
        "kept": made.kept,
        "encoded": len(made.chosen) - made.kept,
        "mean_height": round(float(index["height"].mean()), 1),
        "mean_width": round(float(index["width"].mean()), 1),
    }


def _result(dst: Path, seconds: float, *, done: str) -> dict:
    store = Store.open(dst)
    manifest = store.manifest
    return {
        "store": str(dst),
        "done": done,
        "images": store.count,
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "seconds": round(seconds, 2),
        "bad": manifest["bad"],
        "skipped": manifest["skipped"],
        "columns": {name: len(classes) for name, classes in store.columns.items()},
        "splits": [each for each in store.columns.get("class", ()) if each.lower() in SPLITS],
        "backends": manifest["encode"]["backends"],
        "fingerprint": store.fingerprint,
    }
