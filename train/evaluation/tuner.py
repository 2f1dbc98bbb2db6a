"""The loop of `daae finetune`: loader -> augmented, mixed images -> classifier -> step.

Everything random is a function of (seed, epoch, sample id) or of (seed, step), as in pre-training, so that a resumed
run on a CPU is equal to the bit. Checkpoints, records, signals and exit codes are those of pre-training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from model.classifier import Classifier
from model.network import Network
from pipeline.augment import erase, rand_augment
from pipeline.errors import NumericsError, Preempted, ResourceError, UsageError
from pipeline.limits import out_of_memory
from pipeline.loader import Backend, Loader, choose_backend, open_loader
from pipeline.sampling import View, branch_scales, key
from pipeline.staging import claimed, write_whole
from pipeline.store import Store
from pipeline.transfer import to_device
from pipeline.views import Batch, Patches, check_views, normalise, patchify
from train import checkpoint, folder
from train.clock import Clock
from train.command import plain
from train.config import Run
from train.device import autocast, choose_device, choose_precision, device_name
from train.evaluation.cache import weights_digest
from train.evaluation.exam import FIFTHS, Exam, mean_score, percent
from train.evaluation.features import one_pass
from train.evaluation.featurise import centre_share
from train.evaluation.probes import accuracy
from train.finetune import RESULT, Finetune, Recipe
from train.journal import Journal, duration, environment
from train.optim import make_optimizer, set_rate
from train.schedule import learning_rate, warmup_steps
from train.step import Refused, patience, update
from train.stop import CutShort, Stop

SETTINGS = "finetune.yaml"
VIEW = "finetune"


def finetune(flags: Finetune) -> dict:
    """Train, or go on, and score. Returns the result for stdout. Raises what it ends with; see README's exit codes."""
    run = folder.run_settings(flags.run)
    data = flags.data or run.data
    assert data is not None
    overlap = flags.overlap or run.watch.overlap
    tests = flags.tests or run.watch.tests
    if not 0 <= flags.fold < FIFTHS or (flags.fold and tests):
        raise UsageError(
            f"--fold {flags.fold}: one of 0 to {FIFTHS - 1} fifths of --data, and none where there are tests."
        )
    exam = Exam.prepare(data, tests, flags.label or run.watch.label, overlap, fold=flags.fold)
    recipe = flags.recipe().of_size(run.model)
    recipe.check()
    device = choose_device(flags.device)
    precision = choose_precision(flags.precision, device)
    classifier, start = starting_point(flags, run, recipe, len(exam.bank.columns[exam.leading]))
    backend = choose_backend(device) if flags.loader == "auto" else flags.loader
    settings = {
        **plain(recipe), "start": weights_digest(classifier.encoder), "label": exam.leading, "fold": flags.fold,
        "held_out": bool(exam.held_out), "device": str(device), "precision": precision, "loader": backend,
    }  # fmt: skip
    with (
        Stop(quiet=flags.quiet) as stop,
        training_loader(flags, recipe, run, exam, device, backend) as loader,
        claimed(flags.out, "fine-tuning", (SETTINGS,), overwrite=flags.overwrite) as out,
    ):
        folder.check_same_run(out, settings, allow_resume=True, name=SETTINGS)
        journal = Journal(out, quiet=flags.quiet)
        with journal.reporting():
            tuner = Tuner(flags, recipe, run, exam, loader, classifier.to(device), precision, journal, stop)
            point = folder.resume_point(out, None, exam.bank.fingerprint, exam.bank.count, journal.say)
            write_whole(out / SETTINGS, yaml.safe_dump(settings, sort_keys=False))
            write_whole(out / "env.json", json.dumps(environment(device_name(device)), indent=1))
            if point is not None:
                tuner.load(point)
                journal.say(f"resumed {out} at step {point.step:,} of {tuner.steps:,}.")
            else:
                journal.say(
                    f"{tuner.steps:,} steps of {recipe.batch} images from {exam.bank.root}, starting at {start}."
                )
            journal.rewind(tuner.step)
            tuner.train(flags.limit_steps)
            return {"out": str(out), "start": start, **tuner.finish()}


def starting_point(flags: Finetune, run: Run, recipe: Recipe, classes: int) -> tuple[Classifier, str]:
    """The classifier before its first step, and what its encoder is, in words."""
    network, words = Network(run.method, run.model, run.seed), "the untrained encoder"
    if not recipe.from_scratch:
        point = folder.chosen_checkpoint(flags.run, flags.checkpoint)
        network.load_state_dict(point.scored())
        words = f"step {point.step:,} of {flags.run}"
    return Classifier(network.encoder, classes, recipe.seed), words


@contextlib.contextmanager
def training_loader(
    flags: Finetune, recipe: Recipe, run: Run, exam: Exam, device: torch.device, backend: Backend
) -> Iterator[Loader]:
    """Batches of the samples that may train. Raises DataError where they are fewer than a batch."""
    views = {VIEW: View(side=run.model.side, area=recipe.area)}
    check_views(views, run.model.patch)
    ids, _ = exam.training(exam.leading)
    loader = open_loader(
        exam.bank, views, batch=recipe.batch, seed=recipe.seed, backend=backend, device=device,
        workers=flags.workers, label=exam.leading, only=ids,
    )  # fmt: skip
    with contextlib.closing(loader):
        yield loader


class Tuner:
    """One fine-tuning's weights, clock and records, from its first or a resumed step to its score."""

    def __init__(
        self,
        flags: Finetune,
        recipe: Recipe,
        run: Run,
        exam: Exam,
        loader: Loader,
        classifier: Classifier,
        precision: str,
        journal: Journal,
        stop: Stop,
    ):
        assert recipe.epochs is not None
        self.flags, self.recipe, self.shape, self.exam, self.loader = flags, recipe, run.model, exam, loader
        self.precision, self.journal, self.stop, self.device = precision, journal, stop, loader.device
        self.classes = len(exam.bank.columns[exam.leading])
        self.classifier, self.optim = classifier.train(), recipe.optim()
        self.optimizer = make_optimizer(classifier, self.optim, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.refused = Refused(self.device)
        self.mixup = make_mixup(recipe, self.classes)
        self.steps = max(1, int(recipe.epochs * loader.batches))
        self.warmup = warmup_steps(self.optim, self.steps, loader.batches)
        self.clock, self.step = Clock(), 0
        self.sums = torch.zeros(2, device=self.device)  # of losses and gradient norms since the last row
        self.logged, self.refused_before = (0, 0.0), 0
        self.saved_step: int | None = None  # the newest checkpoint that is sound
        self.saved_at = time.monotonic()

    def load(self, point: checkpoint.Checkpoint) -> None:
        self.classifier.load_state_dict(point.weights())
        checkpoint.load_optimizer(self.classifier, self.optimizer, point.moments())
        self.scaler.load_state_dict(point.state["scaler"])
        self.clock.load(point.state["clock"])
        self.step = self.saved_step = point.step
        self.logged = (point.step, self.clock.train_seconds)

    def train(self, limit: int | None) -> None:
        last = self.steps if limit is None else min(self.steps, self.step + limit)
        self.journal.status(state="running", code=None, reason="", step=self.step, steps=self.steps)
        while self.step < last:
            epoch, start = divmod(self.step, self.loader.batches)
            self.clock.start()
            with contextlib.closing(self.loader.epoch(epoch, start)) as batches:
                for batch in batches:
                    lr = learning_rate(self.optim, self.step, self.steps, self.warmup)
                    self.take_step(batch, lr)
                    self.step += 1
                    self.clock.images += len(batch.id)
                    if self.step % self.flags.log_every == 0 or self.step == last or self.stop.asked:
                        self.clock.pause(self.device)
                        self.log(lr)
                        if self.stop.asked and self.step < self.steps:
                            self.preempted(f"at step {self.step:,} of {self.steps:,}")
                        if time.monotonic() - self.saved_at > 60 * self.flags.checkpoint_minutes:
                            self.save_once()
                        if self.step < last:
                            self.clock.start()
                    if self.step == last:
                        break
            self.clock.pause(self.device)

    def take_step(self, batch: Batch, lr: float) -> None:
        """Raises ResourceError where the batch does not fit the memory."""
        parts = self.recipe.accumulate
        set_rate(self.optimizer, lr)
        pixels, target = self.augmented(batch)
        branches = self.branches(batch)
        cut = [pixels.chunk(parts), target.chunk(parts), [None] * parts if branches is None else branches.chunk(parts)]
        try:
            losses = []
            for some, shares, scales in zip(*cut, strict=True):
                with autocast(self.device, self.precision):
                    logits = self.classifier(Patches(patchify(some, self.shape.patch), self.shape.grid), scales)
                losses.append(F.cross_entropy(logits.float(), shares))
                self.scaler.scale(losses[-1] / parts).backward()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise ResourceError(
                f"a step of {len(batch.id) // parts:,} images does not fit {self.device}. Use --accum-iter {2 * parts}."
            ) from None
        norm = update(self.classifier, self.optimizer, self.scaler, self.refused, self.recipe.clip_grad)
        watched = torch.stack([torch.stack(losses).detach().mean(), norm])
        self.sums += torch.where(self.refused.finite, watched, 0.0)

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, S, S, 3) normalised pixels as the step sees them, and (B, C) shares of the classes."""
        recipe, images, ids = self.recipe, batch.images[VIEW], batch.id.numpy()
        if recipe.magnitude > 0:
            images = rand_augment(
                images, recipe.seed, batch.epoch, ids, magnitude=recipe.magnitude, deviation=recipe.magnitude_std
            )
        pixels = normalise(images.float().div_(255))
        noise = torch.Generator(self.device).manual_seed(key(recipe.seed, self.step, "erase"))
        pixels = erase(pixels, recipe.erase, recipe.seed, batch.epoch, ids, noise)
        if self.mixup is None:
            off = recipe.smoothing / self.classes
            return pixels, F.one_hot(batch.label, self.classes) * (1 - recipe.smoothing) + off
        with numpy_seeded(key(recipe.seed, self.step, "mix") % 2**32):
            mixed, target = self.mixup(pixels.permute(0, 3, 1, 2), batch.label)
        return mixed.permute(0, 2, 3, 1), target

    def branches(self, batch: Batch) -> Tensor | None:
        recipe = self.recipe
        if not recipe.drop_path:
            return None
        depth = self.classifier.encoder.depth
        scales = branch_scales(recipe.drop_path, depth, "drop path", recipe.seed, batch.epoch, batch.id.numpy())
        return to_device(scales, self.device)

    def log(self, lr: float) -> None:
        """A row of metrics.jsonl. Raises NumericsError where too many steps in a row were refused."""
        before, seconds_before = self.logged
        steps, clock = self.step - before, self.clock
        in_a_row, refused = self.refused.read()
        taken, self.refused_before = steps - (refused - self.refused_before), refused
        if in_a_row >= patience(self.precision):
            raise NumericsError(
                f"the gradient was not finite for {in_a_row:,} steps in a row at step {self.step:,}; none was taken. "
                "Try --precision fp32, a lower --lr or --clip-grad 1.0."
            )
        # Of steps that were not taken there is no loss, rather than one of 0.
        means = dict(zip(("loss", "grad_norm"), (self.sums / taken).tolist(), strict=True)) if taken else {}
        self.sums.zero_()
        rate = steps * self.recipe.batch / max(1e-9, clock.train_seconds - seconds_before)
        self.logged = (self.step, clock.train_seconds)
        epochs = self.step / self.loader.batches
        self.journal.row("metrics", {
            "step": self.step, "epoch": round(epochs, 4), "lr": lr, **means, "images": clock.images,
            "images_per_second": round(rate, 1), "train_seconds": round(clock.train_seconds, 3),
        })  # fmt: skip
        left = (self.steps - self.step) * clock.train_seconds / self.step
        self.journal.progress(self.step, self.steps, (
            f"ep {epochs:.1f}/{self.steps / self.loader.batches:.1f}  step {self.step:,}  "
            f"loss {means.get('loss', math.nan):.4f}  img/s {rate:,.0f}  ETA {duration(left)}"
        ))  # fmt: skip
        self.journal.status(step=self.step, train_seconds=round(clock.train_seconds, 1))

    def save_once(self) -> None:
        """A step that is saved is not saved again: for a moment there would be none of it."""
        where = folder.checkpoints(self.journal.out)
        if self.saved_step == self.step:
            return
        state = {
            "step": self.step, "steps": self.steps, "clock": self.clock.state(), "scaler": self.scaler.state_dict(),
            "data": self.exam.bank.fingerprint, "images_in_store": self.exam.bank.count,
        }  # fmt: skip
        path = checkpoint.save(where, checkpoint.tensors_of(self.classifier, self.optimizer), state, keep=2)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.journal.status(last_checkpoint=path.name)

    def preempted(self, where: str) -> NoReturn:
        self.save_once()
        raise Preempted(f"stopped by {self.stop.name} {where}; checkpoint saved. Run the same command again to go on.")

    def finish(self) -> dict:
        """Save, and at the end score, which a signal cuts off: it is made up by the next call."""
        self.save_once()
        if self.step < self.steps:
            self.journal.status(state="paused", code=0, reason="", step=self.step)
            return {
                "state": "paused", "step": self.step, "steps": self.steps,
                "sentence": f"{self.journal.out} paused at step {self.step:,} of {self.steps:,}.",
            }  # fmt: skip
        try:
            with self.stop.at_once():
                scores = {name: self.score(name, store) for name, store in self.exam.tests.items()}
        except CutShort:
            self.preempted("while scoring")
        result = self.result(scores)
        write_whole(self.journal.out / RESULT, json.dumps(result, indent=1))
        self.journal.status(state="done", code=0, reason="", step=self.step)
        return result

    def score(self, name: str, store: Store) -> dict:
        """Top-1 on a test set, from the central square of each picture."""
        ids, truth = self.exam.questions(name, self.exam.leading)
        view = View(side=self.shape.side, centre=centre_share(self.shape.side))
        answers = one_pass(
            self.classifier, lambda seen: self.classifier(seen).argmax(dim=1).cpu(), store, view,
            patch=self.shape.patch, device=self.device, backend=self.flags.loader, workers=self.flags.workers,
            precision_context=autocast(self.device, self.precision), only=ids,
        )  # fmt: skip
        with contextlib.closing(answers):
            predicted = torch.cat([torch.empty(0, dtype=torch.int64), *answers])
        return dataclasses.asdict(accuracy(predicted, truth))

    def result(self, scores: dict[str, dict]) -> dict:
        leading, recipe = mean_score(list(scores.values())), self.recipe
        how = "trained from scratch" if recipe.from_scratch else "fine-tuned end to end"
        where = f"{self.exam.leading}, mean of {' and '.join(scores)}"
        return {
            "state": "done", "step": self.step, "steps": self.steps, "epochs": recipe.epochs,
            "train_seconds": round(self.clock.train_seconds, 3), "images": self.clock.images,
            "label": self.exam.leading, "classes": self.classes, "from_scratch": recipe.from_scratch,
            "leading": leading, "scores": scores,
            "sentence": f"{how}, {recipe.epochs:g} epochs, on {where}: {percent(leading)}.",
        }  # fmt: skip


def make_mixup(recipe: Recipe, classes: int):
    """timm's Mixup, which mixes a batch with itself reversed, in place; None where nothing is mixed.

    Raises ResourceError where timm is missing. Sources: Zhang et al. 2017 (mixup), Yun et al. 2019 (CutMix).
    """
    if not recipe.mixes:
        return None
    try:
        from timm.data.mixup import Mixup
    except ImportError as error:
        raise ResourceError(
            f"mixup and CutMix need {error.name}, which is not installed. Run `make setup`, or --mixup 0 --cutmix 0."
        ) from None
    return Mixup(
        mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, prob=recipe.mix_prob, switch_prob=recipe.switch_prob,
        label_smoothing=recipe.smoothing, num_classes=classes,
    )  # fmt: skip


@contextlib.contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """timm draws from numpy's global generator, which inside begins at `seed` and is afterwards as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
