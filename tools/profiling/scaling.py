"""An estimate, not a measurement: seconds of a step on many GPUs, from one GPU's rate and the bytes that travel.

    python -m tools.profiling.scaling --preset daae-vitb16-in1k-600 --images-per-second 5000 --per-gpu 512

compute    the batch of one GPU at its measured rate; the same on all of them (weak scaling)
gradients  averaged while the backward pass goes on, which is two thirds of a step: only what outlasts it counts
vectors    the contrastive heads' outputs, gathered between forward and backward; nothing hides them

A ring of N moves 2 (N - 1) / N of the gradients' bytes past its narrowest link (Patarasuk and Yuan 2009), and an
all-gather (N - 1) / N of what it ends up with; messages wait for as many hops as a tree is deep. The narrowest link is
the one between machines where there are several.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass

from pipeline.errors import UsageError
from train.command import parse, run

BUCKET = 25e6  # bytes that DistributedDataParallel averages at a time
BACKWARD = 2 / 3  # of a step's compute
HIDDEN = 0.9  # of the backward pass, beside which gradients can travel: the first bucket has to be full


@dataclass(frozen=True)
class Scaling:
    """Estimate a step on many GPUs from the measured rate of one."""

    images_per_second: float
    """Of one GPU, measured there by `daae profile --step`."""
    preset: str = "daae-vitb16-in1k-600"
    per_gpu: int = 512
    """Images of a step on each GPU."""
    gpus: tuple[int, ...] = (1, 8, 16, 32, 64)
    node: int = 8
    """GPUs of a machine."""
    link: float = 300.0
    """GB/s of a GPU to its neighbour in the machine, as an all-reduce sees it."""
    network: float = 40.0
    """GB/s of a GPU to another machine, as an all-reduce sees it."""
    latency: float = 20.0
    """Microseconds of a message from machine to machine, and of one in the machine."""
    bf16_gradients: bool = False
    """As --speed.bf16-gradients."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True)
class Step:
    """One row: seconds are of a step."""

    gpus: int
    compute: float
    gradients: float  # all of it, hidden or not
    vectors: float
    seconds: float
    images_per_second: float
    efficiency: float  # of so many single GPUs


def main(argv: list[str]) -> int:
    flags = parse(Scaling, argv, prog="python -m tools.profiling.scaling")
    if min(flags.images_per_second, flags.per_gpu, flags.node, flags.link, flags.network, *flags.gpus) <= 0:
        raise UsageError("--images-per-second, --per-gpu, --gpus, --node, --link and --network are above 0.")
    from train.plan import parameter_counts
    from train.presets import open_preset

    wish = open_preset(flags.preset)
    bytes_of_gradients = sum(parameter_counts(wish)) * (2 if flags.bf16_gradients else 4)
    width = getattr(wish.method, "head_out", 0)  # of the vectors that are contrasted, one of each of two views
    rows = [step(flags, count, bytes_of_gradients, 2 * 4 * width * flags.per_gpu) for count in flags.gpus]
    if flags.json:
        print(json.dumps({"estimate": True, **asdict(flags), "steps": [asdict(row) for row in rows]}))
        return 0
    size = f"{bytes_of_gradients / 1e6:,.0f} MB of gradients"
    print(f"Estimate for {flags.preset}: {size}, {flags.per_gpu} images a GPU.")
    print("GPUs   compute  gradients  vectors     step, ms   images/s  efficiency")
    for row in rows:
        parts = (1000 * each for each in (row.compute, row.gradients, row.vectors, row.seconds))
        print("{:4d} {:9.1f} {:10.1f} {:8.2f} {:12.1f}".format(row.gpus, *parts), end="")
        print(f" {row.images_per_second:10,.0f} {row.efficiency:10.0%}")
    return 0


def step(flags: Scaling, count: int, gradients: float, vectors: float) -> Step:
    """gradients: bytes of all of them. vectors: bytes of those that one GPU makes."""
    compute = flags.per_gpu / flags.images_per_second
    speed = 1e9 * (flags.link if count <= flags.node else flags.network)
    hops = 2 * math.ceil(math.log2(count)) * flags.latency * 1e-6  # up a tree and down again
    averaging = 2 * (count - 1) / count * gradients / speed + hops * -(-gradients // BUCKET)
    # Gathered there, and the gradients of all of them summed on the way back.
    gathering = 3 * (count - 1) * vectors / speed + 2 * hops if vectors else 0.0
    seconds = compute + max(0.0, averaging - HIDDEN * BACKWARD * compute) + gathering
    return Step(count, compute, averaging, gathering, seconds, count * flags.per_gpu / seconds, compute / seconds)


if __name__ == "__main__":
    sys.exit(run(main))
