"""`daae inflate STORE OUT`: train a generator on a store's images and write what it draws as another store."""

from __future__ import annotations

import json
import sys

from pipeline.errors import UsageError
from tools.converting.flags import Inflate
from train.command import parse, run


def main(argv: list[str]) -> int:
    flags = parse(Inflate, argv, prog="daae inflate")
    _check_flags(flags)
    from tools.converting.inflation import inflate

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
