"""The work of `daae convert`, from a source of images to a finished store.

list the source, with labels -> pictures (decoding.py) -> shards, in order -> FFCV file -> manifest -> rename
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import DataError, ResourceError, UsageError
from pipeline.ffcv_writer import ffcv_missing
from pipeline.names import printable
from pipeline.pictures import FORMATS, Encoding
from pipeline.shards import write_file, write_manifest
from pipeline.sources.entries import Listing, Tell
from pipeline.sources.source import Choice, Reader, Source, open_source
from pipeline.sources.tables import Columns
from pipeline.staging import size_in_words, staging, write_durably
from pipeline.store import FORMAT, MANIFEST, Store
from pipeline.unfinished import Unfinished, fits, worth_keeping
from tools.converting.assembly import assemble
from tools.converting.decoding import Decoding, Made, encoding_of, note, shown, tolerated
from tools.converting.flags import Convert
from tools.converting.watchdog import WRITING, Watchdog

BAD_FILES, STATS = "bad_files.jsonl", "stats.json"
LOOKED_AT = 64  # pictures, for what raw ones will take
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
            note(flags, f"{printable(path)} {why}; what else is there is used.")
        reader = source.reader(unfinished.spool)
        mean = watchdog.do("looking at pictures", lambda: picture_bytes(flags, reader, listing, watchdog.tell))
        _check_disk(dst, listing, backends, mean, int(unfinished.done.rows["row"]["size"].sum()))
        complaint.unlink(missing_ok=True)
        made = Decoding(flags, listing, folder, unfinished, watchdog).run(reader)
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
            stats = _stats(listing, made, seconds, len(listing.files) - unfinished.done.next)
            write_durably(folder / STATS, (json.dumps(stats, indent=1) + "\n").encode())
            write_manifest(
                folder,
                files=whole.files | bad,
                index=whole.index,
                columns=listing.labels.columns,
                shards=whole.shards,
                encode=options,
                source={"path": shown(flags.src), "files": len(listing.files), "listing": digest},
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


def _keep(folder: Path, error: BaseException, watchdog: Watchdog) -> bool:
    kept = watchdog.hung or worth_keeping(folder, error)
    if kept and (watchdog.hung or not watchdog.quiet):
        print(
            f"note: the shards finished so far are kept in {folder}; the same command goes on there.", file=sys.stderr
        )
    return kept


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
        before = {"pixels": Encoding.pixels} | manifest["encode"]  # a store from before there was a choice
        listing, bad = manifest["source"]["listing"], manifest["bad"]
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


def picture_bytes(flags: Convert, reader: Reader, listing: Listing, tell: Tell) -> float:
    """About how many bytes a stored picture takes, on average."""
    sizes = listing.files.sizes
    if flags.pixels == "jpeg":
        # It is rarely larger than its source, and hardly ever than 0.4 bytes a pixel.
        largest = flags.max_side**2 * 0.4 * (3 if flags.quality > 95 else 1)
        return float(np.minimum(1.2 * sizes, largest).mean() + 1024)
    found = []
    for place in np.unique(np.linspace(0, len(sizes) - 1, LOOKED_AT).astype(int)).tolist():
        entry = listing.files[place]
        tell(entry.path, len(found))
        with contextlib.suppress(Exception):  # what is wrong with a picture is said when it is converted
            data = reader.read(entry, encoding_of(flags).max_bytes)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                shrunk = min(1.0, flags.max_side / max(image.size))
                found.append(3 * shrunk**2 * image.width * image.height)
    return float(np.mean(found)) if found else 3.0 * flags.max_side**2


def _check_disk(dst: Path, listing: Listing, backends: list[str], mean: float, done_bytes: int) -> None:
    """mean: bytes of a stored picture. done_bytes: of pictures that an earlier run has written already."""
    count = len(listing.files)
    pictures = mean * count
    # A shard has headers, padding and a label besides.
    need = (pictures + 2048 * count) + (pictures if "ffcv" in backends else 0) + (32 << 20) - done_bytes
    place = dst.absolute().parent
    free = shutil.disk_usage(place).free
    if free < need:
        once = ", or pass --backends dali, which keeps each picture once" if len(backends) > 1 else ""
        raise ResourceError(
            f"{place} has {size_in_words(free)} free, the store needs about {size_in_words(need)}. "
            f"Free some, choose another disk, or lower --max-side{once}."
        )


def _stats(listing: Listing, made: Made, seconds: float, here: int) -> dict:
    """seconds: of this run, which looked at `here` of the files; an earlier one may have done the others."""
    index = made.shards.index
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(here / seconds, 1),
        "source_bytes": int(listing.files.sizes.sum()),
        "picture_bytes": int(index["size"].sum()),
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
