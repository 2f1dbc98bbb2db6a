"""Training of the generator behind `daae inflate`: loader -> loss -> AdamW, and a running mean of the weights.

Like a pre-training run it is a function of (seed, step), so that one that was stopped goes on to the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.flow import FlowNet, flow_loss
from model.memory import MomentumCopy
from pipeline.errors import NumericsError
from pipeline.loader import Loader, open_loader
from pipeline.sampling import View, key
from pipeline.store import Store
from pipeline.views import Batch
from train import checkpoint
from train.config import Optim
from train.device import autocast, choose_precision
from train.journal import Journal, duration
from train.optim import make_optimizer
from train.schedule import learning_rate

VIEW = "square"
MEAN_DECAY = 0.9999  # of the running mean in a long run; in a short one it spans a tenth of the steps taken
SAVE_SECONDS = 120.0
LOG_STEPS = 50
CALIBRATION_SHARE, CALIBRATION_SECONDS = 0.05, (1.0, 20.0)  # of the seconds wished for; at least, at most


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides a generator's weights beside the images: exactly one of steps and seconds, and the rest."""

    side: int
    width: int
    batch: int
    lr: float
    seed: int
    steps: int | None
    seconds: float | None


class Training:
    """A generator on its way, in a folder where it can be taken up again."""

    def __init__(self, recipe: Recipe, store: Store, folder: Path, device: torch.device, *, quiet: bool):
        """Raises what open_loader raises."""
        self.recipe, self.folder, self.device = recipe, folder, device
        # Images are few and small, and a scaler as fp16 needs it is not worth its lines.
        self.precision = "bf16" if choose_precision("auto", device) == "bf16" else "fp32"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.live = FlowNet(recipe.side, recipe.width)
        self.mean = MomentumCopy(copy.deepcopy(self.live))
        self.networks = nn.ModuleDict({"live": self.live, "mean": self.mean}).to(device)
        # The central square, mirrored or not: a crop would have the generator draw crops.
        view = View(side=recipe.side, area=(1.0, 1.0), aspect=(1.0, 1.0))
        self.batch = min(recipe.batch, store.count)
        self.loader: Loader = open_loader(store, {VIEW: view}, batch=self.batch, seed=recipe.seed, device=device)
        self.optim = Optim(batch=self.batch, lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.99))
        self.optimizer = make_optimizer(self.networks, self.optim, device)
        self.journal = Journal(folder, quiet=quiet)
        self.step, self.steps, self.seconds, self.saved = 0, recipe.steps or 0, 0.0, -math.inf

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, or measure how many steps the seconds are."""
        point = checkpoint.newest(self.folder, self.journal.say)
        if point is None:
            self.steps = self.recipe.steps or self.calibrate()
            self.save()  # what was measured once stays
        else:
            self.networks.load_state_dict(point.weights())
            checkpoint.load_optimizer(self.networks, self.optimizer, point.moments())
            self.step, self.steps, self.seconds = point.step, point.state["steps"], point.state["seconds"]
            self.journal.say(f"the generator goes on at step {self.step:,} of {self.steps:,}.")
        self.journal.rewind(self.step)

    def calibrate(self) -> int:
        """How many steps fit the seconds; weights and optimizer are left as they were."""
        assert self.recipe.seconds is not None
        least, most = CALIBRATION_SECONDS
        wanted = min(most, max(least, CALIBRATION_SHARE * self.recipe.seconds))
        weights = copy.deepcopy(self.networks.state_dict())
        with contextlib.closing(self.loader.epoch(0)) as batches:
            first = next(batches)
            self.take(first)  # allocates
            taken, start = 0, time.perf_counter()
            while time.perf_counter() - start < wanted or not taken:
                self.take(next(batches, first)).item()  # the device is waited for
                taken += 1
            pace = (time.perf_counter() - start) / taken
        self.networks.load_state_dict(weights)
        self.optimizer = make_optimizer(self.networks, self.optim, self.device)
        steps = max(1, round(self.recipe.seconds / pace))
        self.journal.say(f"{pace * 1000:,.0f} ms a step: {self.recipe.seconds:g} s are {steps:,} steps.")
        return steps

    def run(self, stopped: Callable[[], bool]) -> bool:
        """Train to the end, or save and return False once `stopped`. Raises NumericsError."""
        losses: list[Tensor] = []
        since = time.perf_counter() - self.seconds
        while self.step < self.steps:
            epoch, start = divmod(self.step, self.loader.batches)
            with contextlib.closing(self.loader.epoch(epoch, start)) as batches:
                for batch in batches:
                    losses.append(self.take(batch))
                    self.step += 1
                    done, asked = self.step == self.steps, stopped()
                    if done or self.step % LOG_STEPS == 0:
                        loss = torch.stack(losses).mean().item()  # waits for the device
                        self.seconds = time.perf_counter() - since
                        self.log(loss)
                        losses.clear()
                    if done or asked or time.monotonic() - self.saved > SAVE_SECONDS:
                        self.seconds = time.perf_counter() - since
                        self.save()
                    if done or asked:
                        return done
        return True

    def take(self, batch: Batch) -> Tensor:
        """One step. Returns its loss, on the device."""
        images = batch.images[VIEW].permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        draw = torch.Generator(self.device).manual_seed(key(self.recipe.seed, self.step, "flow"))
        noise = torch.randn(images.shape, generator=draw, device=self.device)
        # Times in the middle are the hard ones: logit-normal, as Esser et al. 2024 found best.
        when = torch.randn(len(images), generator=draw, device=self.device).sigmoid()
        with autocast(self.device, self.precision):
            loss = flow_loss(self.live, images, noise, when)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.live.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optim, self.step, max(1, self.steps), self.optim.warmup_share * self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keep = min(MEAN_DECAY, (1 + self.step) / (10 + self.step))
        self.mean.follow(self.live, keep)
        return loss.detach()

    def log(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise NumericsError(f"the generator's loss is not finite at step {self.step:,}. Try a lower --lr.")
        self.journal.row("metrics", {"step": self.step, "loss": round(loss, 5), "seconds": round(self.seconds, 2)})
        left = (self.steps - self.step) * self.seconds / self.step
        self.journal.progress(
            self.step, self.steps, f"generator: step {self.step:,} of {self.steps:,}  loss {loss:.4f}  "
            f"img/s {self.step * self.batch / self.seconds:,.0f}  ETA {duration(left)}"
        )  # fmt: skip

    def save(self) -> None:
        state = {"step": self.step, "steps": self.steps, "seconds": self.seconds}
        checkpoint.save(self.folder, checkpoint.tensors_of(self.networks, self.optimizer), state, keep=1)
        self.saved = time.monotonic()

    def close(self) -> None:
        self.journal.close()
        self.loader.close()
