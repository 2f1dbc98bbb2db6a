"""The shards of a checkpoint of divided weights (train/divided.py), read in any process: tensors by KIND/NAME."""

from __future__ import annotations

# torch.distributed.checkpoint documents names that it does not list.
# pyright: reportPrivateImportUsage=false
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pipeline.errors import DataError


def read_whole(shards: Path, kind: str) -> dict[str, Tensor]:
    """Whole tensors of one kind by name, on the CPU, in any process."""
    found = {
        key: torch.empty_like(each, device="cpu") for key, each in outline(shards).items() if key.startswith(f"{kind}/")
    }
    read(found, shards)
    return {key.removeprefix(f"{kind}/"): value for key, value in found.items()}


def outline(shards: Path) -> dict[str, Tensor]:
    """What is saved there, as tensors without values."""
    saved = HuggingFaceStorageReader(str(shards)).read_metadata().state_dict_metadata
    return {
        key: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
        for key, each in saved.items()
        if isinstance(each, TensorStorageMetadata)
    }


def read(places: dict[str, Tensor], shards: Path) -> None:
    """Fill tensors, whole or divided, with what is saved under their keys. Raises DataError where one is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(places, storage_reader=HuggingFaceStorageReader(str(shards)), no_dist=True)
        except CheckpointException as error:
            why, _ = next(iter(error.failures.values()))
            raise DataError(f"{shards} does not fit the run: {why}") from None
