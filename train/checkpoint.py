"""Checkpoints that are whole or not there: written aside, verified by digest, renamed; safetensors and JSON, no pickle.

checkpoints/step_000012000/
  model.safetensors   every weight and buffer of the network
  optim.safetensors   the optimizer's moments, by parameter name
  ema.safetensors     the average of the encoder's weights, where the run keeps one
  shards/             instead of these where a run divides its weights: what each process holds (train/divided.py)
  state.json          step, clock, configuration, fingerprint of the data
  manifest.json       size and sha256 of the others, written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import DataError, ResourceError
from pipeline.staging import is_full, sync, write_durably

FILES = ("model.safetensors", "optim.safetensors", "state.json")
SHARDS, AVERAGE = "shards", "ema.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def sharded(self) -> bool:
        return (self.path / SHARDS).is_dir()

    def weights(self) -> dict[str, Tensor]:
        return self._whole("model")

    def moments(self) -> dict[str, Tensor]:
        return self._whole("optim")

    def _whole(self, kind: str) -> dict[str, Tensor]:
        if self.sharded:
            from train.divided_files import read_whole

            return read_whole(self.path / SHARDS, kind)
        return _tensors(self.path / f"{kind}.safetensors")

    def average(self) -> dict[str, Tensor]:
        """Of the encoder's weights, by the names that they have in the network; empty where none is kept."""
        return _tensors(self.path / AVERAGE) if (self.path / AVERAGE).exists() else {}

    def scored(self) -> dict[str, Tensor]:
        """The weights that are scored and exported: the average's, where there is one, in place of the encoder's."""
        return {**self.weights(), **self.average()}


def tensors_of(
    network: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of a run's weights: kind ("model", "optim", perhaps "ema") -> name -> tensor.

    average: weights of the encoder by their names in the network, or None.
    """
    kinds = {"model": network.state_dict(), "optim": optimizer_tensors(network, optimizer)}
    return kinds if average is None else {**kinds, "ema": average}


def save(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int) -> Path:
    """Write step `state["step"]` under `folder` and prune older ones; returns its path.

    A crash at any instant leaves the previous checkpoint untouched and nothing that reads as a newer one.
    Raises ResourceError on a full disk, with the half-written folder removed.
    """
    with aside(folder, state, keep) as partial:
        for kind, values in tensors.items():
            save_file(_contiguous(values), partial / f"{kind}.safetensors")
    return place(folder, state["step"])


def place(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}"


@contextlib.contextmanager
def aside(folder: Path, state: dict, keep: int) -> Iterator[Path]:
    """A folder for the tensors of step `state["step"]`. When the block ends it gets state and manifest, and takes
    its place among the checkpoints; older ones are pruned. Raises ResourceError."""
    final = place(folder, state["step"])
    partial = folder / f".{final.name}.partial-{os.getpid()}"
    try:
        for leftover in folder.glob(".step_*.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        (partial / FILES[2]).write_text(json.dumps(state, indent=1))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in files:
            usual_mode(path)
            sync(path)
        manifest = json.dumps({path.relative_to(partial).as_posix(): _facts(path) for path in files}, indent=1)
        write_durably(partial / "manifest.json", manifest.encode())
        for inside in {path.parent for path in files}:
            sync(inside)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        raise refusal(final, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in list_steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def refusal(final: Path, error: BaseException) -> ResourceError:
    full = is_full(error) or "No space" in str(error)
    why = "the disk is full" if full else str(error)
    return ResourceError(
        f"checkpoint {final} could not be written: {why}. The previous one is untouched; "
        "make room and run the same command again."
    )


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
        # Whatever lies among the shards would be read with them.
        shards = [f"{SHARDS}/{each.name}" for each in (path / SHARDS).glob("*")]
        for name in sorted({*manifest, *(shards or FILES)}):
            if _facts(path / name) != manifest[name]:
                raise DataError(f"checkpoint {path} is damaged ({name}: size or sha256 differs).")
        return Checkpoint(path, json.loads((path / FILES[2]).read_text()))
    except (OSError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"checkpoint {path} is damaged ({type(error).__name__}: {error}).") from None


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: AdamW's `NAME/exp_avg`, `NAME/exp_avg_sq` and `NAME/step`, Muon's
    `NAME/momentum`."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    optimizer.state.clear()  # after a rollback a parameter may have moments that the checkpoint lacks
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = parameters[name]
        on_host = field == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameter][field] = value.to("cpu" if on_host else parameter.device)


def usual_mode(path: Path) -> None:
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
