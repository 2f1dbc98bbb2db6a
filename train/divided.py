"""Weights, gradients and moments divided among the processes (FSDP2), for models that do not fit a device otherwise.

Each process holds a part of every tensor (a DTensor); a block's weights are whole only while the block is computed.
A checkpoint is what each process holds, written by torch.distributed.checkpoint as safetensors, whose headers say where
in its tensor each part belongs: no pickle, and any number of processes reads it. Keys are KIND/NAME, as in
checkpoint.tensors_of.
"""

from __future__ import annotations

# torch.distributed.checkpoint documents names that it does not list.
# pyright: reportPrivateImportUsage=false
import contextlib
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.vit import Block
from train import checkpoint, divided_files
from train.config import Run
from train.ranks import Ranks


def shard(network: nn.Module, run: Run, ranks: Ranks) -> None:
    """Divide a network, which every rank has drawn whole, block by block. What lies in no block is one more part.

    Like DistributedDataParallel it averages gradients; unlike it, it does so for each part of an accumulated batch:
    gradients kept whole until the last would take the memory that is to be saved.
    """
    device = torch.device(run.device).type
    # A CPU's layer norm takes no bfloat16 weights beside float32 tokens.
    half = torch.bfloat16 if run.precision == "bf16" and device == "cuda" else None
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.bfloat16 if run.speed.bf16_gradients else half and torch.float32,
        cast_forward_inputs=False,
    )  # fmt: skip
    mesh = init_device_mesh(device, (ranks.count,))
    for module in [*(each for each in network.modules() if isinstance(each, Block)), network]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def full(tensor: Tensor) -> Tensor:
    """The whole of what each rank has a part of. Every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors on rank 0, on the CPU; nothing on the others. Every rank calls it."""
    found = {}
    with ranks.waiting("whole weights"):
        for name, value in tensors.items():
            whole = full(value)  # one at a time: together they may not fit a device
            if ranks.first:
                found[name] = whole.cpu()
    return found


def save(
    folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int, ranks: Ranks, *, whole: bool
) -> Path:
    """checkpoint.save, each rank writing what it holds, or rank 0 the whole. Every rank calls it.

    Raises ResourceError on every rank where one of them cannot write.
    """
    final = checkpoint.place(folder, state["step"])
    if whole:
        tensors = {kind: gather(values, ranks) for kind, values in tensors.items()}
        return checkpoint.save(folder, tensors, state, keep) if ranks.first else final
    flat = {f"{kind}/{name}": value for kind, values in tensors.items() for name, value in values.items()}
    with checkpoint.aside(folder, state, keep) if ranks.first else contextlib.nullcontext() as partial:
        writer = HuggingFaceStorageWriter(str(ranks.share(partial) / checkpoint.SHARDS), save_distributed=True)
        try:
            with ranks.waiting("a checkpoint"):
                dcp.save(flat, storage_writer=writer, process_group=ranks.side)
        except CheckpointException as error:
            why, _ = next(iter(error.failures.values()))
            raise checkpoint.refusal(final, why) from None
    return final


def load(network: nn.Module, optimizer: torch.optim.Optimizer, point: checkpoint.Checkpoint) -> None:
    """Into a divided network, from a checkpoint of either kind. Each rank reads by itself."""
    cast(FSDPModule, network).reshard()  # a forward pass without gradients has left some weights whole
    where = point.path / checkpoint.SHARDS
    if point.sharded:
        saved = divided_files.outline(where)
    else:
        kinds = {"model": point.weights(), "optim": point.moments()}
        saved = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}
    places = {**network.state_dict(prefix="model/"), **_room(network, optimizer, saved)}
    if point.sharded:
        divided_files.read(places, where)
        return
    for key, here in places.items():
        value = saved[key].to(here.device)
        if isinstance(here, DTensor):
            value = distribute_tensor(value, here.device_mesh, here.placements, src_data_rank=None)
        here.copy_(value)


def _room(network: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state, still zeros, by the keys of a checkpoint; moments are divided as their parameters are."""
    parameters, found = dict(network.named_parameters()), {}
    optimizer.state.clear()
    for key in (key for key in saved if key.startswith("optim/")):
        name, _, field = key.removeprefix("optim/").rpartition("/")
        parameter, like = parameters[name], saved[key]
        like = parameter if like.shape == parameter.shape else like
        found[key] = optimizer.state[parameter][field] = torch.zeros_like(like, device=parameter.device)
    return found
