"""`daae inflate STORE OUT`: train a generator on a store's images and write what it draws as another store."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.errors import UsageError
from train.command import parse, run


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


def main(argv: list[str]) -> int:
    flags = parse(Inflate, argv, prog="daae inflate")
    _check_flags(flags)
    from tools.inflation import inflate

    result = inflate(flags)
    print(json.dumps(result) if flags.json else _sentence(flags, result))
    return 0


def _check_flags(flags: Inflate) -> None:
    for name, value, low in (
        ("count", flags.count, 1), ("steps", 1 if flags.steps is None else flags.steps, 1), ("batch", flags.batch, 1),
        ("sampling-steps", flags.sampling_steps, 1), ("seconds", flags.seconds, 1), ("lr", flags.lr, 0),
    ):  # fmt: skip
        if value < low:
            raise UsageError(f"--{name} is at least {low}, not {value:g}.")
    for name, value, unit, most in (("side", flags.side, 16, 256), ("width", flags.width, 32, 1024)):
        if value % unit or not unit <= value <= most:
            raise UsageError(f"--{name} is a multiple of {unit} up to {most}, not {value}.")
    store, out = flags.store.resolve(), flags.out.resolve()
    if store == out or store in out.parents or out in store.parents:
        raise UsageError(f"OUT {flags.out} and STORE {flags.store} lie inside each other. Choose an OUT elsewhere.")


def _sentence(flags: Inflate, result: dict) -> str:
    if result["done"] == "nothing to do":
        return f"{flags.out} already holds these {result['images']:,} generated images: nothing to do."
    return (
        f"Generated {result['images']:,} images of {flags.side} px into {flags.out}: {result['steps']:,} training "
        f"steps, last loss {result['loss']:.4f}; {result['seconds']:,.0f} s in all. "
        f"Look at {flags.out / 'sheet.png'}, then: daae pretrain --data {flags.store} --inflate.data {flags.out}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
