"""Numbers on their way from the host to the device: what is drawn for a batch, and what never changes."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """The same numbers on the device, without a wait for what it is at.

    A copy from pageable memory makes the host wait once it exceeds about 64 KB; one from page-locked memory never does.
    """
    here = torch.from_numpy(numbers)
    return (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)


@functools.cache
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that never change, sent to a device once: sent each time, a step would wait for them.

    Every caller is given the same tensor, so nobody may write to it.
    """
    return torch.tensor(values, device=device, dtype=dtype)
