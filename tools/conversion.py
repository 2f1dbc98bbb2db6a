"""The work of `daae convert`, from a folder of images to a finished store.

scan the folder -> labels -> decode in worker processes -> shards in one thread -> FFCV file -> manifest -> rename
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, ResourceError, UsageError
from pipeline.ffcv_writer import ffcv_missing, move_index, write_beton
from pipeline.folder import Labels, Listing, find_labels, scan
from pipeline.ordered_map import ordered_map
from pipeline.pictures import Encoding, try_picture
from pipeline.shards import ShardWriter, describe_file, printable, write_file, write_manifest, write_tables
from pipeline.staging import size_in_words, staging, write_durably
from pipeline.store import BETON, MANIFEST, Store
from tools.convert import Convert
from tools.progress import Progress

BAD_FILES, STATS = "bad_files.jsonl", "stats.json"
TASK = 8  # files that a worker takes at once


def convert(flags: Convert) -> dict:
    """Do what the flags say. Returns what `--json` prints.

    Raises DataError, ResourceError, StalledError, UsageError; then DST is as it was, and nothing else is left but
    `DST.bad_files.jsonl` where too many files were bad.
    """
    start = time.monotonic()
    backends = _backends(flags)
    options = _options(flags, backends)
    listing = scan(flags.src)
    digest = listing.digest()
    nothing_to_do = _earlier(flags, options, digest)
    if nothing_to_do is not None:
        return nothing_to_do
    if not listing.files:
        raise DataError(f"{flags.src} has no images ({listing.looked_at()}).")
    labels = find_labels(flags.src, listing)
    _check_disk(flags, listing, backends)
    complaint = flags.dst.parent / f"{flags.dst.name}.{BAD_FILES}"
    with staging(flags.dst, replace=flags.overwrite) as folder:
        complaint.unlink(missing_ok=True)
        made = _decode(flags, listing, labels, folder)
        _check_bad(flags, listing, made, complaint)
        files, rows, shards = dict(made.shards.files), made.shards.rows, made.shards.shards
        names = [listing.files[place].path for place in made.chosen]
        tables = write_tables(folder, rows, labels.table[made.chosen], names)
        if "ffcv" in backends:
            progress = Progress("FFCV file", total_bytes=made.jpeg_bytes, quiet=flags.quiet)
            with progress.show():
                beton = write_beton(
                    folder, stall_seconds=flags.stall_timeout, progress=lambda done: progress.at(done_bytes=done)
                )
            files |= describe_file(beton)
            if "dali" not in backends:
                # The FFCV file is then the only shard: the index points at the JPEGs inside it.
                rows, shards, files = move_index(beton, rows), [BETON], {BETON: files[BETON]}
                tables = write_tables(folder, rows, labels.table[made.chosen], names)
                for name in made.shards.files:
                    (folder / name).unlink()
        files |= tables | write_file(folder, BAD_FILES, _bad_lines(made.bad))
        seconds = time.monotonic() - start
        # The one file that differs from run to run, so the manifest does not vouch for it.
        write_durably(folder / STATS, (json.dumps(_stats(listing, made, seconds), indent=1) + "\n").encode())
        write_manifest(
            folder,
            files=files,
            rows=rows,
            columns=labels.columns,
            shards=shards,
            encode=options,
            source={"path": printable(os.fsencode(flags.src)), "files": len(listing.files), "listing": digest},
            bad=len(made.bad),
            skipped=dict(sorted(listing.skipped.items())),
        )
    return _result(flags, seconds, done="converted")


# ------------------------------------------------------------------------------------------------------------ decode


@dataclass
class Made:
    shards: ShardWriter
    chosen: list[int] = field(default_factory=list)  # sample id -> place in listing.files
    bad: list[dict] = field(default_factory=list)
    kept: int = 0
    jpeg_bytes: int = 0


def _decode(flags: Convert, listing: Listing, labels: Labels, folder: Path) -> Made:
    """Decode everything, write what is good in order, list what is bad."""
    width = max(6, *(len(str(len(classes) - 1)) for classes in labels.columns.values()), 0)
    made = Made(ShardWriter(folder, shard_bytes=flags.shard_mb << 20, label_width=width))
    for path, why in listing.unreadable:
        made.bad.append({"path": printable(path) + "/", "reason": f"cannot be read: {why}", "bytes": 0})
    allowed = tolerated(flags.max_bad, len(listing.files))
    tasks = [range(at, min(at + TASK, len(listing.files))) for at in range(0, len(listing.files), TASK)]
    paths = [[os.path.join(listing.root, listing.files[place].path) for place in task] for task in tasks]
    source_bytes = sum(one.size for one in listing.files)
    progress = Progress("images", total_bytes=source_bytes, total_images=len(listing.files), quiet=flags.quiet)
    results = ordered_map(
        try_picture,
        paths,
        encoding_of(flags),
        workers=flags.workers or len(os.sched_getaffinity(0)),
        stall_seconds=flags.stall_timeout,
        describe=printable,
    )
    done_bytes = 0
    try:
        with contextlib.closing(results), progress.show():
            for task, answers in zip(tasks, results, strict=True):
                for place, answer in zip(task, answers, strict=True):
                    source = listing.files[place]
                    done_bytes += source.size
                    if isinstance(answer, str):
                        made.bad.append({"path": printable(source.path), "reason": answer, "bytes": source.size})
                    # Past the limit the rest is still checked, so that the list is whole, but no longer written.
                    elif len(made.bad) <= allowed:
                        label = int(labels.table[place, 0]) if labels.columns else -1
                        made.shards.add(answer.jpeg, label=label, height=answer.height, width=answer.width)
                        made.chosen.append(place)
                        made.kept += answer.kept
                        made.jpeg_bytes += len(answer.jpeg)
                progress.at(images=task.stop, done_bytes=done_bytes, bad=len(made.bad))
            made.shards.close()
    except BaseException:
        made.shards.abandon()
        raise
    made.bad.sort(key=lambda row: row["path"])
    return made


def tolerated(share: float, count: int) -> int:
    """How many bad files of `count` a conversion survives: the share, but a few always, unless it is 0."""
    return max(10, math.ceil(share * count)) if share else 0


def _check_bad(flags: Convert, listing: Listing, made: Made, complaint: Path) -> None:
    allowed = tolerated(flags.max_bad, len(listing.files))
    if made.chosen and len(made.bad) <= allowed:
        return
    write_durably(complaint, _bad_lines(made.bad))
    example = f"e.g. {made.bad[0]['path']} {made.bad[0]['reason']}"
    if len(made.bad) >= len(listing.files):
        others = sum(listing.skipped.values())
        looked = f"looked at {len(listing.files) + others} files: {len(made.bad)} bad, {example}"
        raise DataError(f"{flags.src} has no readable images ({looked}). See {complaint}")
    raise DataError(
        f"{flags.src} has {len(made.bad):,} bad files of {len(listing.files):,}, {example}; "
        f"--max-bad {flags.max_bad:g} tolerates {allowed:,}. See {complaint}"
    )


def _bad_lines(bad: list[dict]) -> bytes:
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


def _earlier(flags: Convert, options: dict, digest: str) -> dict | None:
    """The result of an earlier conversion if DST is just what is asked for; None if DST may be written.

    Raises UsageError: DST is something else.
    """
    if not flags.dst.exists() or (flags.dst.is_dir() and not any(flags.dst.iterdir())):
        return None
    if not (flags.dst / MANIFEST).is_file():
        raise UsageError(f"{flags.dst} exists and is not a store. Choose another DST, or remove it yourself.")
    if flags.overwrite:
        return None
    ask = "Choose another DST, or --overwrite replaces it."
    try:
        manifest = Store.open(flags.dst).manifest
        before, listing, bad = manifest["encode"], manifest["source"]["listing"], manifest["bad"]
    except (DataError, KeyError, TypeError) as error:
        raise UsageError(f"{flags.dst} is a damaged store: {error} {ask}") from None
    if listing != digest:
        raise UsageError(f"{flags.dst} is a store of other files, or {flags.src} has changed since. {ask}")
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in options.items() if before.get(name) != value]
    if changed:
        raise UsageError(f"{flags.dst} was made with other settings ({'; '.join(changed)}). {ask}")
    if bad > tolerated(flags.max_bad, manifest["source"]["files"]):
        raise UsageError(f"{flags.dst} was made without {bad} bad files, more than --max-bad {flags.max_bad:g}. {ask}")
    return _result(flags, 0.0, done="nothing to do")


def _check_disk(flags: Convert, listing: Listing, backends: list[str]) -> None:
    # A stored picture is rarely larger than its source, and hardly ever than 0.4 bytes a pixel; tar adds 2 kB.
    largest = flags.max_side**2 * 0.4 * (3 if flags.quality > 95 else 1)
    pictures = sum(min(1.2 * one.size, largest) + 1024 for one in listing.files)
    need = (pictures + 2048 * len(listing.files)) + (pictures if "ffcv" in backends else 0) + (32 << 20)
    place = flags.dst.absolute().parent
    while not place.exists():
        place = place.parent
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
    heights, widths = ([row[at] for row in made.shards.rows] for at in (3, 4))
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(len(listing.files) / seconds, 1),
        "source_bytes": sum(one.size for one in listing.files),
        "jpeg_bytes": made.jpeg_bytes,
        "kept": made.kept,
        "encoded": len(made.chosen) - made.kept,
        "mean_height": round(float(np.mean(heights)), 1),
        "mean_width": round(float(np.mean(widths)), 1),
    }


def _result(flags: Convert, seconds: float, *, done: str) -> dict:
    store = Store.open(flags.dst)
    manifest = store.manifest
    return {
        "store": str(flags.dst),
        "done": done,
        "images": store.count,
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "seconds": round(seconds, 2),
        "bad": manifest["bad"],
        "skipped": manifest["skipped"],
        "columns": {name: len(classes) for name, classes in store.columns.items()},
        "backends": manifest["encode"]["backends"],
        "fingerprint": store.fingerprint,
    }
