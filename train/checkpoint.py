"""Checkpoints that are whole or not there: written aside, verified by digest, renamed; safetensors and JSON, no pickle.

checkpoints/step_000012000/
  model.safetensors   every weight and buffer of the network
  optim.safetensors   AdamW's moments, by parameter name
  state.json          step, clock, configuration, fingerprint of the data
  manifest.json       size and sha256 of the others, written last
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import DataError, ResourceError
from pipeline.staging import sync, write_durably

FILES = ("model.safetensors", "optim.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        return self.state["step"]

    def weights(self) -> dict[str, Tensor]:
        return _tensors(self.path / "model.safetensors")

    def moments(self) -> dict[str, Tensor]:
        return _tensors(self.path / "optim.safetensors")


def save(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep: int) -> Path:
    """Write step `state["step"]` under `folder` and prune older ones; returns its path.

    A crash at any instant leaves the previous checkpoint untouched and nothing that reads as a newer one.
    Raises ResourceError on a full disk, with the half-written folder removed.
    """
    final = folder / f"step_{state['step']:09d}"
    partial = folder / f".{final.name}.partial-{os.getpid()}"
    try:
        for leftover in folder.glob(".step_*.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_contiguous(network.state_dict()), partial / FILES[0])
        save_file(_contiguous(optimizer_tensors(network, optimizer)), partial / FILES[1])
        for name in FILES[:2]:
            share(partial / name)
        (partial / FILES[2]).write_text(json.dumps(state, indent=1))
        for name in FILES:
            sync(partial / name)
        manifest = json.dumps({name: _facts(partial / name) for name in FILES}, indent=1)
        write_durably(partial / "manifest.json", manifest.encode())
        sync(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
        why = "the disk is full" if full else str(error)
        raise ResourceError(
            f"checkpoint {final} could not be written: {why}. The previous one is untouched; "
            "make room and run the same command again."
        ) from None
    for old in list_steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_steps(folder: Path) -> list[Path]:
    """Finished checkpoint folders, oldest step first. What is newest is decided by the step, never by a file time."""
    return sorted(path for path in folder.glob("step_*") if (path / "manifest.json").is_file())


def newest(folder: Path, warn) -> Checkpoint | None:
    """The newest checkpoint that verifies; a damaged one is named through `warn` and the one before it taken."""
    for path in reversed(list_steps(folder)):
        try:
            return verify(path)
        except DataError as error:
            warn(str(error))
    return None


def verify(path: Path) -> Checkpoint:
    """Check every byte against the manifest. Raises DataError: one flipped bit loads silently from safetensors."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in FILES:
            if _facts(path / name) != manifest[name]:
                raise DataError(f"checkpoint {path} is damaged ({name}: size or sha256 differs).")
        return Checkpoint(path, json.loads((path / FILES[2]).read_text()))
    except (OSError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"checkpoint {path} is damaged ({type(error).__name__}: {error}).") from None


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = parameters[name]
        on_host = field == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameter][field] = value.to("cpu" if on_host else parameter.device)


def share(path: Path) -> None:
    """Give a file the mode that any other new file has; safetensors makes its files readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _facts(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _tensors(path: Path) -> dict[str, Tensor]:
    with contextlib.suppress(SafetensorError):
        return load_file(path)
    raise DataError(f"{path} is no safetensors file.")
