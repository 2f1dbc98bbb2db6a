"""`daae convert SRC DST`: check every picture of a source once, and write a store that loads fast."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.staging import terminable
from tools.converting.flags import Convert
from train.command import parse, run


def main(argv: list[str]) -> int:
    flags = parse(Convert, argv, prog="daae convert")
    _check_flags(flags)
    # numpy and Pillow only now: --help and a wrong flag answer without them.
    if flags.plan:
        from tools.converting.plan import plan, table

        with terminable(f"looking at {flags.src}"):
            planned = plan(flags)
        print(json.dumps(planned) if flags.json else table(flags, planned))
        return 0
    from tools.converting.conversion import convert

    if flags.dst is None:
        raise UsageError("DST is missing: daae convert SRC DST.")
    with terminable(f"converting {flags.src}"):
        result = convert(flags, flags.dst)
    if flags.json:
        print(json.dumps(result))
    else:
        print(_sentence(flags.dst, result))
    return 0


def _check_flags(flags: Convert) -> None:
    for name, value, low, high in (
        ("max-side", flags.max_side, 8, 65535),
        ("quality", flags.quality, 1, 100),
        ("max-bad", flags.max_bad, 0, 1),
        ("max-pixels", flags.max_pixels, 64, 1e10),
        ("min-side", flags.min_side, 1, flags.max_side),
        ("workers", flags.workers or 1, 1, 4096),
        ("shard-mb", flags.shard_mb, 1, 1 << 20),
        ("stall-timeout", flags.stall_timeout, 1, 1e6),
    ):
        if not low <= value <= high:
            raise UsageError(f"--{name} is from {low:g} to {high:g}, not {value:g}.")
    if flags.workers == 0:
        raise UsageError("--workers is from 1 to 4096, not 0.")
    if flags.dst is None:
        return
    if re.match(r"\w[\w+.:-]*:/", str(flags.dst)):  # Path has made one slash of two
        url = str(flags.dst).replace(":/", "://", 1)
        raise UsageError(
            f"DST {url} is a URL, and a store is written to a disk. Give a folder, and copy it afterwards."
        )
    if "://" in flags.src:
        return
    src, dst = Path(flags.src).resolve(), flags.dst.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise UsageError(f"DST {flags.dst} and SRC {flags.src} lie inside each other. Choose a DST elsewhere.")


def _sentence(dst: Path, result: dict) -> str:
    if result["done"] == "nothing to do":
        return f"{dst} already holds these {result['images']:,} images: nothing to do."
    skipped = sum(result["skipped"].values())
    labels = ", ".join(f"{name} ({count})" for name, count in result["columns"].items()) or "none"
    bad = f"{result['bad']} bad (listed in {dst / 'bad_files.jsonl'})" if result["bad"] else "none bad"
    sentence = (
        f"Converted {result['images']:,} images into {dst}: {result['bytes'] / 1e6:,.1f} MB in "
        f"{result['seconds']:.1f} s; {bad}, {skipped} skipped; labels: {labels}."
    )
    if splits := " and ".join(result["splits"]):
        sentence += f"\n  The classes {splits} look like splits: convert each of these folders into a store of its own."
    return sentence


if __name__ == "__main__":
    sys.exit(run(main))
