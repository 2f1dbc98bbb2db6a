"""Numbers that the host has drawn for a batch, on their way to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """The same numbers on the device, without a wait for what it is at.

    From ordinary memory CUDA does not wait for copies of some 64 KB at most: these go by way of page-locked memory.
    """
    here = torch.from_numpy(numbers)
    return (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)
