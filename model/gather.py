"""What a loss or a norm needs of the whole batch when several processes hold a part each.

Each process has as many rows. Alone, everything here is the identity. Gradients are those of the mean over processes
of their losses, which is what DistributedDataParallel makes of them: a row that another process' loss has used gets
that gradient back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.precise import exact


def place() -> tuple[int, int]:
    """This process' number, and how many there are: (0, 1) alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(rows: Tensor) -> Tensor:
    """(B, …) of each of R processes -> (R B, …) on every one, in the order of their numbers."""
    return rows if place()[1] == 1 else _Gather.apply(rows)  # pyright: ignore[reportReturnType]


def total(values: Tensor) -> Tensor:
    """Sum over the processes, the same on every one."""
    return values if place()[1] == 1 else _Total.apply(values)  # pyright: ignore[reportReturnType]


def largest_of_all(values: Tensor) -> Tensor:
    """The largest over the processes, the same on every one; a constant, no gradient flows."""
    values = values.detach()
    if place()[1] > 1:
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, count = place()
        parts = [torch.empty_like(rows) for _ in range(count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        mine, count = place()
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)  # what the losses of all processes ask of these rows
        return gradient.chunk(count)[mine]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the batches of all processes, on any device; torch's SyncBatchNorm refuses CPUs.

    (B, C) -> (B, C). gathered: False keeps every process to its own rows, as MoCo does on purpose. Alone, and in
    evaluation mode, it is nn.BatchNorm1d, and its state is the same.
    """

    def __init__(self, width: int, *, affine: bool = True, gathered: bool = True):
        super().__init__(width, affine=affine)
        self.gathered = gathered

    def forward(self, input: Tensor) -> Tensor:
        _, count = place()
        if count == 1 or not self.gathered or not self.training:
            return super().forward(input)
        # In two passes, mean and then spread about it: a difference of squares would cancel.
        rows = exact(input)
        number = count * len(rows)
        mean = total(rows.sum(dim=0)) / number
        centred = rows - mean
        variance = total(centred.square().sum(dim=0)) / number
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * number / (number - 1))
        normal = centred / (variance + self.eps).sqrt()
        if self.affine:
            normal = normal * self.weight + self.bias
        return normal.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
