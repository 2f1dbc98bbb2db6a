"""The work of `daae verify`.

digests of the files -> every picture read, summed and decoded in worker processes -> a store of those that are good
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.decoder import checksum_in_c, clean
from pipeline.errors import DataError, ResourceError
from pipeline.ffcv_writer import ffcv_missing
from pipeline.handles import Handles, steadily
from pipeline.limits import usable_cores
from pipeline.names import unprintable
from pipeline.ordered_map import ordered_map
from pipeline.shards import ShardWriter, write_file, write_manifest
from pipeline.sources.entries import Tell
from pipeline.staging import staging
from pipeline.store import FORMAT, MANIFEST, Store
from tools.converting.assembly import assemble
from tools.converting.conversion import BAD_FILES, bad_lines
from tools.converting.decoding import label_width
from tools.converting.flags import Verify
from tools.converting.watchdog import WRITING, Watchdog
from tools.progress import Progress

TASK = 64  # pictures that a worker takes at once
TABLES = ("index.npy", "labels.npy", "names.txt")  # what no other file of the store can replace
NEEDED = {"files", "shards", "columns", "count", "encode"}  # of a manifest


def verify(flags: Verify) -> dict:
    """Do what the flags say. Returns what `--json` prints.

    Raises DataError, ResourceError, StalledError, UsageError.
    """
    store = _open(flags.store)
    files = bad_files(flags, store)
    fixable = not any(one["file"] in TABLES for one in files)
    samples = bad_samples(flags, store) if fixable and not flags.quick else []
    result = {
        "store": str(flags.store),
        "count": store.count,
        "files": files,
        "samples": samples,
        "sound": not files and not samples,
        "fixable": fixable,
        "fixed": False,
    }
    if flags.fix and fixable and not result["sound"]:
        result |= {"fixed": True, "left": fix(flags, store, samples)}
    return result


def _open(root: Path) -> Store:
    """The store, also where files of it are missing or have another size: naming them is the task here."""
    try:
        return Store.open(root)
    except DataError:
        manifest = None
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads((root / MANIFEST).read_bytes())
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT and set(manifest) >= NEEDED:
            return Store(root, manifest)
        raise


# ------------------------------------------------------------------------------------------------------------- files


def bad_files(flags: Verify, store: Store) -> list[dict]:
    """Files that are missing or not what the manifest vouches for: name and problem."""
    facts = store.manifest["files"]
    watchdog = Watchdog(flags.stall_timeout, quiet=flags.quiet)
    progress = Progress("files", total_bytes=sum(fact["bytes"] for fact in facts.values()), quiet=flags.quiet)

    def look() -> list[dict]:
        done, problems, names = 0, [], sorted(facts)
        # Threads: hashing holds no lock of the interpreter. Daemons: one that hangs does not keep the process alive.
        with ThreadPool(_workers(flags)) as pool:
            found = pool.imap(lambda name: _file(store.root / name, facts[name], watchdog.tell), names)
            for name, problem in zip(names, found, strict=True):
                done += facts[name]["bytes"]
                progress.at(done_bytes=done)
                if problem is not None:
                    problems.append({"file": name, "problem": problem})
        return problems

    with progress.show():
        return watchdog.do(f"reading {store.root}", look)


def _file(path: Path, facts: dict, tell: Tell) -> str | None:
    """What is wrong with a file. Raises ResourceError where the disk or the machine fails, and not the file."""
    try:
        return steadily(path, lambda: _problem(path, facts, tell))
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _problem(path: Path, facts: dict, tell: Tell) -> str | None:
    tell(path.name, 0)
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"has {size:,} bytes, the manifest says {facts['bytes']:,}"
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
            tell(path.name, 0)
    return None if state.hexdigest() == facts["sha256"] else "is not what was written: its sha256 differs"


def _workers(flags: Verify) -> int:
    return flags.workers or max(1, int(usable_cores()))


# ----------------------------------------------------------------------------------------------------------- pictures


class SampleReader:
    """Reads the pictures of a store in one process; shards are opened when they are first needed."""

    def __init__(self, store: Store) -> None:
        self.store, self.shards = store, store.shards
        self._files = Handles()

    def read(self, sample: int) -> bytes:
        """As many of its bytes as there are. Raises OSError; ResourceError where the machine fails, not the shard."""
        row = self.store.index[sample]
        return self._files.read(self.shards[int(row["shard"])], int(row["size"]), int(row["offset"]))

    def close(self) -> None:
        self._files.close()


class Checker:
    """What a worker needs; it opens the store itself."""

    def __init__(self, root: Path, manifest: dict) -> None:
        self.root, self.manifest = root, manifest
        self.reader: SampleReader | None = None

    def problem(self, sample: int) -> str | None:
        if self.reader is None:
            self.reader = SampleReader(Store(self.root, self.manifest))
        row = self.reader.store.index[sample]
        try:
            data = self.reader.read(sample)
        except OSError as error:
            return f"its shard cannot be read: {error.strerror}"
        if len(data) < int(row["size"]):
            return "its shard ends before it does"
        if checksum_in_c(np.frombuffer(data, np.uint8)) != int(row["sum"]):
            return "its bytes are not those that were converted"
        if self.reader.store.raw:
            pixels = int(row["height"]) * int(row["width"])
            return None if len(data) == 3 * pixels else f"it has {len(data):,} bytes for {pixels:,} pixels"
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                if image.size != (int(row["width"]), int(row["height"])):
                    return (
                        f"it is {image.width} x {image.height} pixels, the index says {row['width']} x {row['height']}"
                    )
                image.load()
        # A damaged file makes Pillow raise almost anything.
        except Exception as error:
            return f"it cannot be decoded: {' '.join(str(error).split())}"
        return None if clean(data) else "its JPEG is damaged"


def check_sample(sample: int, checker: Checker) -> str | None:
    return checker.problem(sample)


def bad_samples(flags: Verify, store: Store) -> list[dict]:
    """Pictures that are not what was converted or do not decode: sample id, name and reason."""
    tasks = [range(at, min(at + TASK, store.count)) for at in range(0, store.count, TASK)]
    progress = Progress("pictures", total_images=store.count, quiet=flags.quiet)
    results = ordered_map(
        check_sample,
        tasks,
        Checker(store.root, store.manifest),
        workers=_workers(flags),
        stall_seconds=flags.stall_timeout,
        describe=lambda sample: f"sample {sample} of {store.root}",
        lost=lambda sample, how: f"the process that decoded it {how}",
    )
    bad = {}
    with contextlib.closing(results), progress.show():
        for task, answers in zip(tasks, results, strict=True):
            bad |= {sample: reason for sample, reason in zip(task, answers, strict=True) if reason is not None}
            progress.at(images=task.stop, bad=len(bad))
    found = []
    for sample, name in enumerate(_names(store) if bad else ()):
        if sample in bad:
            found.append({"sample": sample, "name": name, "reason": bad[sample]})
    return found


def _names(store: Store) -> Iterator[str]:
    with open(store.root / "names.txt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield line.removesuffix("\n")


# --------------------------------------------------------------------------------------------------------------- fix


def fix(flags: Verify, store: Store, samples: list[dict]) -> int:
    """Put a store without these samples in the place of this one. Returns how many are left.

    Shards, tables, FFCV file and manifest are all written anew, so files beside the pictures are right again as well.
    What the old manifest does not name is carried over as it is. Raises DataError where a picture that was good a
    moment ago is not any more.
    """
    with Watchdog(flags.stall_timeout, quiet=flags.quiet) as watchdog:
        return _fix(flags, store, samples, watchdog)


def _fix(flags: Verify, store: Store, samples: list[dict], watchdog: Watchdog) -> int:
    bad = {one["sample"] for one in samples}
    good = np.array([sample for sample in range(store.count) if sample not in bad], np.int64)
    if not len(good):
        raise DataError(f"{store.root} has no good picture left. Convert the images again.")
    manifest, labels, index = store.manifest, np.asarray(store.labels), np.asarray(store.index)
    encode = {**manifest["encode"], "backends": _backends(flags, store)}
    rejected = [{"path": one["name"], "reason": f"dropped: {one['reason']}", "bytes": int(index[one["sample"]]["size"])}
                for one in samples]  # fmt: skip
    with staging(store.root, replace=True, keep=lambda left, error: _left_alone(left, watchdog)) as folder:
        writer = ShardWriter(
            folder,
            shard_bytes=encode["shard_mb"] << 20,
            label_width=label_width(store.columns),
            raw=store.raw,
        )
        progress = Progress("writing", total_images=len(good), quiet=flags.quiet)

        def copy(some: list[int]) -> None:
            for sample in some:
                watchdog.tell(str(folder), writer.count)
                row = index[sample]
                label = int(labels[sample, 0]) if labels.shape[1] else -1
                data = _still_good(reader, sample, row)
                writer.add(data, label=label, height=int(row["height"]), width=int(row["width"]))

        with contextlib.closing(SampleReader(store)) as reader, progress.show():
            try:
                for at in range(0, len(good), TASK):
                    watchdog.do(WRITING, partial(copy, good[at : at + TASK].tolist()), writes=True)
                    progress.at(images=writer.count)
                watchdog.do(WRITING, writer.close, writes=True)
            except BaseException:
                if not watchdog.hung:
                    writer.abandon()
                raise
        names = list(_names(store))
        whole = assemble(
            folder,
            writer,
            labels[good],
            lambda: (unprintable(names[sample]) for sample in good),
            backends=encode["backends"],
            watchdog=watchdog,
        )

        def finish() -> None:
            watchdog.tell(str(folder), len(good))
            listed = sorted([*_listed(store.root / BAD_FILES), *rejected], key=lambda row: row["path"])
            files = whole.files | write_file(folder, BAD_FILES, bad_lines(listed))
            _carry(store.root, folder, {MANIFEST, *manifest["files"], *files})
            facts = ("columns", "source", "skipped", "generated")
            kept = {name: manifest[name] for name in facts if name in manifest}
            write_manifest(
                folder, files=files, index=whole.index, shards=whole.shards, encode=encode,
                bad=manifest["bad"] + len(rejected), **kept,
            )  # fmt: skip

        watchdog.do(WRITING, finish, writes=True)
    return len(good)


def _backends(flags: Verify, store: Store) -> list[str]:
    """What the store is written for: an FFCV file beside shards is left out where FFCV is not there.

    Raises ResourceError where nothing else is left.
    """
    backends, missing = store.manifest["encode"]["backends"], ffcv_missing()
    if "ffcv" not in backends or missing is None:
        return backends
    if "dali" not in backends:
        raise ResourceError(f"{store.root} is an FFCV file alone, and FFCV is not there: {missing}. Run `make setup`.")
    if not flags.quiet:
        print(f"note: FFCV is not there ({missing}); the store is left without an FFCV file.", file=sys.stderr)
    return ["dali"]


def _left_alone(folder: Path, watchdog: Watchdog) -> bool:
    """Whether the disk hangs, so that nobody can clean up."""
    if watchdog.hung:
        print(f"note: {folder} is left as it is; the next `daae verify --fix` removes it.", file=sys.stderr)
    return watchdog.hung


def _still_good(reader: SampleReader, sample: int, row: np.void) -> bytes:
    """A picture that was checked before, read once more. Raises DataError where it is another one now."""
    data = b""
    with contextlib.suppress(OSError):
        data = reader.read(sample)
    if len(data) != int(row["size"]) or checksum_in_c(np.frombuffer(data, np.uint8)) != int(row["sum"]):
        raise DataError(
            f"sample {sample} of {reader.store.root} was good a moment ago and is not any more. Nothing was changed; "
            "look at the disk and the memory of this machine."
        )
    return data


def _carry(root: Path, folder: Path, ours: set[str]) -> None:
    """Copy what lies in a store and is not `ours`: statistics, a generator and its sheet, a person's notes."""
    for path in root.iterdir():
        if path.name in ours:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True)
        elif path.is_symlink() or path.is_file():
            shutil.copy2(path, folder / path.name, follow_symlinks=False)


def _listed(path: Path) -> list[dict]:
    """What was rejected before; a list that is damaged itself gives what can be read of it."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("path"), str):
                rows.append(row)
    return rows
