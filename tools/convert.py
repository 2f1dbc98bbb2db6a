"""`daae convert SRC DST`: check every picture of a source once, and write a store that loads fast."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.errors import UsageError
from pipeline.staging import terminable
from train.command import parse, run


@dataclass(frozen=True)
class Convert:
    """Turn images, in a folder of any depth, archives or tables, with or without labels, into a store that loads fast.

    The same command goes on where a killed one stopped."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder of images; tar or zip archive, also one that holds tar archives (ImageNet); WebDataset shards; Parquet
    files; Hugging Face data set on disk. Archives may be URLs (s3://, https://), and several: a folder, or a pattern
    with *. Labels come from labels.csv (path,column,...) or else from sub-folder names."""
    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = None
    """The store to make; --plan needs none."""
    kind: Literal["auto", "folder", "archive", "webdataset", "parquet", "hf"] = "auto"
    """What SRC is, where looking at it gives the wrong answer."""
    list: Path | None = None
    """Take only what this file names: a path in SRC on each line, or `path label` or `path,label`."""
    columns: str = ""
    """Parquet and Hugging Face: the picture's column, or picture and label as IMAGE,LABEL. Default: found by type."""
    devkit: Path | None = None
    """ImageNet's ILSVRC2012_devkit_t12.tar.gz, for the labels of its validation set. Default: the one beside SRC."""
    max_side: int = 500
    """Shrink pictures whose longer side is larger, in pixels."""
    quality: int = 90
    """JPEG quality, with 4:2:0 chroma. Pictures of at most 128 pixels are stored with 95 and 4:4:4."""
    backends: Literal["both", "ffcv", "dali"] = "both"
    """both: tar shards and an FFCV file. dali: shards only. ffcv: the FFCV file only."""
    max_bad: float = 0.001
    """Share of bad files that is tolerated; 10 files always are. 0 tolerates none."""
    max_pixels: float = 100e6
    """A picture of more pixels is not decoded, but listed as bad."""
    min_side: int = 8
    """A picture whose shorter side is smaller is listed as bad."""
    workers: int | None = None
    """Decoding processes. Default: one per core that this process may use."""
    shard_mb: int = 128
    """Size of a tar shard in MiB."""
    overwrite: bool = False
    """Replace DST if it is another store."""
    plan: bool = False
    """Convert nothing: print what size, time and loading speed to expect of this choice and of others."""
    json: bool = False
    """Print one JSON object instead of the sentence."""
    quiet: bool = False
    """No progress."""
    stall_timeout: float = 300.0
    """Give up when nothing has moved for so many seconds."""


def main(argv: list[str]) -> int:
    flags = parse(Convert, argv, prog="daae convert")
    _check_flags(flags)
    # numpy and Pillow only now: --help and a wrong flag answer without them.
    if flags.plan:
        from tools.plan import plan, table

        with terminable(f"looking at {flags.src}"):
            planned = plan(flags)
        print(json.dumps(planned) if flags.json else table(flags, planned))
        return 0
    from tools.conversion import convert

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
    if flags.dst is None or "://" in flags.src:
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
