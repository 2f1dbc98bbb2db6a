"""What a run leaves to the program: its device, the precision there, and the decoder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from typing import TYPE_CHECKING

import torch

from pipeline.errors import ResourceError, UsageError
from pipeline.limits import memory_limit
from pipeline.loader import choose_backend
from train.ranks import wanted

if TYPE_CHECKING:
    from pipeline.store import Store
    from train.config import Run


def resolve(run: Run, store: Store | None) -> Run:
    """The run with every "auto" settled; without a store, the loader's stays."""
    device = choose_device(run.device)
    if run.speed.compile:
        check_compiler(device)
    loader = choose_backend(device) if run.loader == "auto" and store is not None else run.loader
    return dataclasses.replace(
        run, device=str(device), precision=choose_precision(run.precision, device), loader=loader
    )


def choose_device(wish: str) -> torch.device:
    """The device, which from here on is also that of whoever names none: Triton's kernels, new streams. Raises what
    find_device() raises."""
    device = find_device(wish)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def find_device(wish: str) -> torch.device:
    """The device, and nothing is done with it yet.

    Raises ResourceError where a GPU is asked for and there is none: on every process of a machine, if for one.
    """
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = wanted()
    # Also where a run's own config.yaml, fed back, names the GPU of one process.
    if wish.partition(":")[0] == "cuda" and ranks.local_count > 1:
        if 0 < (count := torch.cuda.device_count()) < ranks.local_count:
            raise ResourceError(
                f"{ranks.local_count} processes want a GPU each, and this machine has {count}. Use --gpus {count}, or "
                "--device cpu."
            )
        wish = f"cuda:{ranks.local}"
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise UsageError(f"--device {wish} is no device. Use cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ResourceError(
            f"--device {wish}: this machine has {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {wish} is not supported. Use cpu, cuda or cuda:N.")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def check_compiler(device: torch.device) -> None:
    """Raises ResourceError where torch.compile would find no compiler: of C for Triton on a GPU, of C++ on a CPU."""
    if device.type == "cuda":
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX") or "g++"]
    if not any(shutil.which(name.split()[0]) for name in names):
        raise ResourceError(
            f"--compile needs {' or '.join(names)}, and there is none. Install it (apt install g++ python3-dev), or "
            "leave --compile out."
        )


def choose_precision(wish: str, device: torch.device) -> str:
    """bf16 where the device has units for it; on a CPU without AMX it is three times slower than fp32.

    Raises ResourceError where it is asked for on a GPU that has none: there it would be emulated.
    """
    can = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if wish == "bf16" and not can:
        raise ResourceError(f"--precision bf16: {device} has no units for it. Use --precision fp16, or leave it out.")
    if wish != "auto":
        return wish
    if device.type == "cuda":
        return "bf16" if can else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(device: torch.device, precision: str):
    """The context in which losses and features are computed."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return "CPU"


def memory_gb(device: torch.device) -> tuple[float, float]:
    """The most that this process has had so far, and what there is: of the device, of the machine, or what the control
    group allows; GB."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, whole / 1e9
    import psutil

    peak, whole = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        peak = max([peak, *(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))])
    return peak / 1e9, min(whole, memory_limit() or whole) / 1e9
