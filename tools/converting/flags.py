"""Flags of the commands whose work fills a module of its own: command -> work -> flags, and nothing imports back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Convert:
    """Turn images, in a folder of any depth, archives or tables, with or without labels, into a store that loads fast.

    The same command goes on where a killed one stopped."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder of images; tar or zip archive, also one that holds tar archives (ImageNet); WebDataset shards; Parquet
    files; Hugging Face data set on disk. Archives and Parquet files may be URLs (s3://, https://), and several: a
    folder, or a pattern with *. Labels come from labels.csv (path,column,...) or else from sub-folder names."""
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
    pixels: Literal["jpeg", "raw"] = "jpeg"
    """raw: 3 bytes for each pixel that --max-side leaves: many times the space, no loss by JPEG, nothing to decode."""
    quality: int = 90
    """JPEG quality. Pictures of at most 128 pixels are stored with 95, and 4:4:4 chroma."""
    chroma: Literal["4:2:0", "4:4:4"] = "4:2:0"
    """Colour for 2 x 2 pixels, or for each: sharper edges of colour for more bytes and slower loading."""
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


@dataclass(frozen=True)
class Verify:
    """Check every file of a store by its digest, and every picture by its checksum and by decoding it."""

    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Made by `daae convert`."""
    quick: bool = False
    """Sizes and digests of the files only; no picture is decoded."""
    fix: bool = False
    """Write the store anew without what is bad. Sample ids move, so runs on the old store cannot go on."""
    workers: int | None = None
    """Decoding processes. Default: one per core that this process may use."""
    json: bool = False
    """Print one JSON object instead of sentences."""
    quiet: bool = False
    """No progress."""
    stall_timeout: float = 300.0
    """Give up when nothing has moved for so many seconds."""


@dataclass(frozen=True)
class Inflate:
    """Train a generator on a store's images, without their labels, and write what it draws as a store marked generated.

    `daae pretrain --inflate.data OUT` trains on both (AdaInf). The same command goes on where a stopped one was."""

    store: Annotated[Path, tyro.conf.Positional]
    """Store made by `daae convert`, of the images that are trained on and no others."""
    out: Annotated[Path, tyro.conf.Positional]
    """The store to make."""
    count: int = 10_000
    """Images to generate."""
    side: int = 64
    """Their side in pixels, a multiple of 16."""
    seconds: float = 2400.0
    """Training seconds of the generator, measured once and frozen as steps. Drawing comes on top."""
    steps: int | None = None
    """Training steps, instead of seconds."""
    width: int = 96
    """Channels of the generator where it is narrowest, a multiple of 32; a GPU has time for 192 and more."""
    batch: int = 64
    """Images per training step."""
    lr: float = 1e-3
    """Peak learning rate."""
    sampling_steps: int = 10
    """Steps from noise to image, of two looks at the network each."""
    seed: int = 0
    """Of weights, order, noise and what is drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace OUT if it is another store, or half made with other settings."""
    quiet: bool = False
    """No progress."""
    json: bool = False
    """Print one JSON object instead of the sentence."""
