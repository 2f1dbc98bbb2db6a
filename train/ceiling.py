"""The fastest that this device multiplies matrices, which is what a step's arithmetic is measured against."""

from __future__ import annotations

import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 4096, 8192)}
SECONDS = 0.3  # for each size
LONGEST = 1.0  # seconds that one product may take: a CPU without bf16 units would multiply the largest for a minute


def gemm_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of the best of a few square products, 2 n^3 each, of random numbers.

    From small to large, for as long as the next is foretold to take less than `LONGEST`. Zeros would run up to an
    eighth faster. On a GPU fp32 is multiplied as torch is set to (without TF32 by default).
    """
    best = 0.0
    for side in SIDES.get(device.type, SIDES["cpu"]):
        if best and 2 * side**3 / best > LONGEST:
            break
        one, other = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
        out = one @ other
        _settle(device)
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            start, times = time.perf_counter(), 4 if device.type == "cuda" else 1
            for _ in range(times):
                torch.mm(one, other, out=out)
            _settle(device)
            best = max(best, times * 2 * side**3 / (time.perf_counter() - start))
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
