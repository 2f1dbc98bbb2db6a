"""One optimizer step: a batch in, weights changed. The run, its rehearsal and the profiler all take this one."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import choose
from model.decoder import Decoder
from model.memory import MomentumCopy
from model.network import Network
from model.objectives import Outcome
from model.vit import Block, Encoder
from pipeline.errors import ResourceError
from pipeline.limits import out_of_memory
from pipeline.views import Batch, Patches, group_size, make_views
from train.config import Run
from train.device import autocast, memory_gb
from train.ledger import Ledger
from train.optim import make_optimizer, set_rate
from train.ranks import Ranks
from train.schedule import weight_decay
from train.stages import parts_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Stepper:
    """A network, its optimizer and what one step of training is. Nothing in a step reads a value from the device."""

    def __init__(
        self,
        run: Run,
        device: torch.device,
        *,
        ranks: Ranks | None = None,
        ledger: Ledger | None = None,
    ):
        """run: resolved. Every rank draws the same weights."""
        self.run, self.device = run, device
        self.now = run  # as it is at the stage under way: sides of the views, and the batch
        self.ranks = ranks or Ranks()
        self.ledger = ledger or Ledger(device)
        self.network = Network(run.method, run.model, run.seed).to(device)
        self.sharded = run.speed.shard and self.ranks.count > 1
        if self.sharded:
            from train.divided import shard

            shard(self.network, run, self.ranks)  # the optimizer is to hold what is left
        self.optimizer = make_optimizer(self.network, run.optim, device)
        self.refused = Refused(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.norm = torch.zeros((), device=device)  # of the last step's gradient, before it was clipped
        self.average = MomentumCopy(copy.deepcopy(self.network.encoder)) if run.optim.ema else None
        self.taken = 0  # steps of the run so far
        self.wrapped: nn.Module | None = None
        self.attention = ""  # how its steps attend: train.attention settles it

    def prepare(self, *, watched: bool = True) -> None:
        """Compile, and join the other ranks. After weights have been loaded, before the first step.

        watched: the ledger is to tell encoder and decoder apart.
        """
        network = self.network.train()
        blocks = [module for module in network.modules() if isinstance(module, Block)]
        if self.run.speed.recompute:
            for block in blocks:
                # Nothing in a block is drawn, so that no state of the generators has to be kept for it.
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
        compiled = self.run.speed.compile and self.ranks.count == 1
        if self.run.speed.compile:
            self._make_positions()
        if compiled:
            self.compile()
        elif self.run.speed.compile:
            # DDP averages gradients during the backward pass, which a single compiled graph would hold back to its end,
            # and FSDP gathers weights between blocks; so compile block by block. `optimize_ddp` would split graphs for
            # the same reason and is not needed.
            torch._dynamo.config.optimize_ddp = False  # pyright: ignore[reportAttributeAccessIssue]
            for block in blocks:
                block.compile(dynamic=False)
        if watched and not compiled:
            self.ledger.watch(network)
        self.wrapped = network
        if self.ranks.count > 1 and not self.sharded:
            # Buffers need no broadcast: each rank computes the same, or (batch norms kept apart) rank 0's are saved.
            data_parallel = nn.parallel.DistributedDataParallel
            newer = "forward_sync_buffers" in inspect.signature(data_parallel).parameters  # torch 2.15's name for it
            quiet: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
            self.wrapped = data_parallel(network, gradient_as_bucket_view=True, **quiet)
            if self.run.speed.bf16_gradients:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

                self.wrapped.register_comm_hook(None, bf16_compress_hook)

    def _make_positions(self) -> None:
        """Before a graph is traced, which would make the codes itself, on the CPU, and then be traced once more."""
        coders = [each.positions for each in self.network.modules() if isinstance(each, (Encoder, Decoder))]
        for _, part in parts_of(self.run):
            for view in part.method.views(part.model).values():
                for positions in coders:
                    positions(view.side // part.model.patch, self.device)

    def compile(self) -> None:
        """The whole loss as one graph of static shapes."""
        self.network.compile(dynamic=False, mode="reduce-overhead" if self.run.speed.graphs else None)

    def __call__(self, batch: Batch, lr: float, done: tuple[float, float] = (0.0, 0.0)) -> list[Outcome]:
        """Take the step; `batch` is this rank's share. What a step does not bear is refused: weights stay as they are
        where a gradient is not finite, on every rank alike, since gradients are averaged before they are looked at.

        done: share of the run's steps that are taken before this one, and after it; 0 where steps are only timed.
        Raises ResourceError where the batch does not fit the memory, with how many images would.
        """
        choose(self.attention)  # steps of other networks may be timed between its own
        with self.ledger("optimizer"):
            self.run.method.before_step(self.network, done[0], self.taken)
            for group in self.optimizer.param_groups:
                if group["decayed"]:
                    group["weight_decay"] = weight_decay(self.run.optim, done[0])
        outcomes = None
        try:
            outcomes = self._step(batch, lr, self.run.optim.accumulate)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if outcomes is None:  # only out here are the tensors gone that the error's frames held
            raise self._too_large(len(batch.id))
        with self.ledger("optimizer"):
            self.run.method.after_step(self.network, done[1])
            self.taken += 1
            if self.average is not None:
                # Over few steps a slow average would still be mostly the untrained weights.
                slow = min(self.run.optim.ema, (1 + self.taken) / (10 + self.taken))
                self.average.follow(self.network.encoder, slow)
        return outcomes

    def _step(self, batch: Batch, lr: float, parts: int) -> list[Outcome]:
        set_rate(self.optimizer, lr)
        outcomes = self.backward(batch, parts)
        with self.ledger("optimizer"):
            self.run.method.before_update(self.network, self.taken)
            self.norm = update(self.network, self.optimizer, self.scaler, self.refused, self.run.optim.clip_grad)
        return outcomes

    def backward(self, batch: Batch, parts: int) -> list[Outcome]:
        """Add the batch's gradients to those there are, in so many parts; in fp16 they are times the scaler's scale."""
        assert self.wrapped is not None
        ledger, outcomes = self.ledger, []
        for number, part in enumerate(cut(batch, parts)):
            with self._alone_but_for(number == parts - 1):
                with ledger("views"):
                    views = views_of(self.now, part)
                with ledger("losses"), autocast(self.device, self.run.precision):
                    if self.run.speed.graphs:
                        torch.compiler.cudagraph_mark_step_begin()
                    outcome = self.wrapped(views, part.label)
                    loss = torch.stack(list(outcome.terms.values())).sum() / parts
                with ledger("backward"):
                    self.scaler.scale(loss).backward()
            outcomes.append(copied(outcome) if self.run.speed.graphs else outcome)
        return outcomes

    def _too_large(self, size: int) -> ResourceError:
        """What to say where a batch of `size` does not fit: how much would, found by trying."""
        parts, ranks = self.run.optim.accumulate, self.ranks.count
        peak, whole = memory_gb(self.device)
        said = f"a step of {size // parts:,} images does not fit {self.device} (peak {peak:.1f} of {whole:.1f} GB)."
        most = self._most(size // parts) if ranks == 1 else 0  # other ranks could not follow the trials
        group = group_size(self.run.method.views(self.run.model))
        fewer = next((n for n in range(parts + 1, size + 1) if size % (n * group) == 0 and size // n <= most), None)
        if fewer is None:
            if ranks == 1 and most == 0:
                return ResourceError(
                    f"{said} No smaller one does either: weights, gradients and the optimizer's state alone take too "
                    "much. Take a smaller encoder."
                )
            return ResourceError(f"{said} Use --accum-iter {2 * parts}, or --batch {size * ranks // 2} or less.")
        return ResourceError(f"{said} {most:,} do: use --accum-iter {fewer}, or --batch {most * parts}.")

    def _most(self, size: int) -> int:
        """The most images below `size` that a step bears, to an eighth; 0 if none. The optimizer is of no use after."""
        group = group_size(self.run.method.views(self.run.model))
        works, fails = 0, size // group
        while fails - works > max(1, works // 8):
            count = (works + fails) // 2 if works else fails // 2
            if count == 0:
                break
            self.optimizer.zero_grad(set_to_none=True)
            # The failed step may have made half of them, or unscaled its gradients.
            self.optimizer.state.clear()
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._step(noise(self.now, count * group, self.device), 0.0, 1)
                works = count
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                fails = count
        return works * group

    def average_weights(self) -> dict[str, Tensor] | None:
        if self.average is None:
            return None
        return {f"encoder.{name}": value for name, value in self.average.module.state_dict().items()}

    def load_average(self, weights: dict[str, Tensor]) -> None:
        """As `average_weights` gave them; nothing where there is no average."""
        if self.average is not None:
            self.average.module.load_state_dict({name.removeprefix("encoder."): each for name, each in weights.items()})

    @contextlib.contextmanager
    def scored(self, network: Network) -> Iterator[Network]:
        """This network, or a whole copy of it, as it is scored: with the average of the encoder's weights where there
        is one."""
        trained = network.encoder
        try:
            if self.average is not None:
                network.encoder = cast(Encoder, self.average.module)
            yield network
        finally:
            network.encoder = trained

    def _alone_but_for(self, last: bool) -> AbstractContextManager:
        """DistributedDataParallel averages gradients once a step, with the last part."""
        if last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()


class Refused:
    """Steps that were not taken, counted on the device and read when a row of metrics is written."""

    def __init__(self, device: torch.device, in_a_row: int = 0):
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # the last step was taken
        self._counts = torch.tensor([in_a_row, 0], device=device)  # in a row up to now; in all

    def count(self, finite: Tensor) -> None:
        self.finite = finite
        refused = (~finite).long()
        self._counts = torch.stack([(self._counts[0] + 1) * refused, self._counts[1] + refused])

    def read(self) -> tuple[int, int]:
        """How many in a row up to the last step, and how many in all."""
        in_a_row, total = self._counts.tolist()
        return in_a_row, total


def copied(outcome: Outcome) -> Outcome:
    """In memory of its own: a CUDA graph writes what it returns to the same place at each step."""
    terms, watched = (
        {name: value.detach().clone() for name, value in each.items()} for each in (outcome.terms, outcome.watched)
    )
    return Outcome(terms, watched, None if outcome.features is None else outcome.features.clone())


def patience(precision: str) -> int:
    """Refused steps in a row after which there is no hope. fp16 searches its scale by such steps."""
    return 30 if precision == "fp16" else 3


def update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    refused: Refused,
    clip_grad: float | None,
) -> Tensor:
    """Take a step by the gradients there are, or refuse it where one is not finite. Returns their norm, unclipped."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([each.grad for each in network.parameters() if each.grad is not None])
    if hasattr(norm, "full_tensor"):  # of gradients that are divided among the processes
        norm = cast("DTensor", norm).full_tensor()
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), clip_grad, norm)
    refused.count(torch.isfinite(norm))
    # The fused optimizer leaves everything as it is where this is 1: nobody has to ask the device.
    optimizer.found_inf = 1.0 - refused.finite.float()  # pyright: ignore[reportAttributeAccessIssue]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def views_of(run: Run, batch: Batch) -> dict[str, Patches]:
    """What the run's objective sees of a batch."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    return make_views(batch, run.method.views(run.model), patch=run.model.patch, seed=run.seed, dtype=dtype)


def cut(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in equal parts, for gradient accumulation."""
    if parts == 1:
        yield batch
        return
    count = len(batch.id) // parts
    for at in range(0, count * parts, count):
        rows = slice(at, at + count)
        images = {name: image[rows] for name, image in batch.images.items()}
        yield Batch(images, batch.label[rows], batch.id[rows], batch.epoch)


def noise(run: Run, count: int, device: torch.device) -> Batch:
    """A batch of random pictures on the device: arithmetic on zeros would run faster than on anything real."""
    images = {
        name: torch.randint(256, (count, view.side, view.side, 3), dtype=torch.uint8, device=device)
        for name, view in run.method.views(run.model).items()
    }
    return Batch(images, torch.full((count,), -1, device=device), torch.arange(count), 0)
