"""The training loop: loader -> views -> objective -> step. It knows no method.

Everything random is a function of (seed, epoch, sample id), everything scheduled a function of the step, so a
checkpoint needs only weights, moments and counters, and a resumed run on a CPU is equal to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.network import Network
from model.objectives import Outcome
from pipeline import native
from pipeline.errors import DataError, NumericsError, Preempted, UsageError
from pipeline.limits import usable_cores
from pipeline.loader import Loader
from pipeline.staging import claimed, write_whole
from pipeline.store import Store
from train import checkpoint, folder
from train.clock import Clock
from train.command import exit_code
from train.config import Budget, Run
from train.data import check_data, open_data
from train.device import device_name, memory_gb, resolve
from train.journal import Journal, duration, environment, read_rows
from train.optim import make_optimizer
from train.pace import seconds_per_step, steps_for
from train.schedule import learning_rate, warmup_steps
from train.step import train_step

if TYPE_CHECKING:
    from train.pretrain import Controls


def pretrain(wish: Run, controls: Controls) -> dict:
    """Run, or go on with, what `wish` describes. Returns the result for stdout."""
    assert wish.data is not None
    assert wish.out is not None
    store = Store.open(wish.data)
    run = resolve(wish, store)
    check_data(run, store)  # before the folder is made: what cannot run leaves nothing behind
    with claimed(wish.out, "run", (folder.CONFIG,), overwrite=controls.overwrite) as out, Stop() as stop:
        folder.check_same_run(out, wish, allow_resume=not controls.no_resume)
        journal = Journal(out, quiet=controls.quiet)
        try:
            return _pretrain(run, controls, store, journal, stop)
        except Preempted as error:
            journal.status(state="preempted", code=error.code, reason=str(error))
            raise
        except BaseException as error:
            code = exit_code(error)
            journal.status(state="failed", code=code, reason=f"{type(error).__name__}: {error}")
            if code == 1:
                journal.keep(traceback.format_exc())
            raise
        finally:
            journal.close()


def _pretrain(run: Run, controls: Controls, store: Store, journal: Journal, stop: Stop) -> dict:
    out, device = journal.out, torch.device(run.device)
    point = folder.resume_point(out, controls.resume, store.fingerprint, store.count, journal.say)
    saved = folder.saved_settings(out)
    if saved is not None:
        # What was settled when the run began stays: the steps that its seconds came to, precision and decoder.
        run = dataclasses.replace(
            run, budget=Budget(**saved["budget"]), precision=saved["precision"], loader=saved["loader"]
        )
    loader = open_data(run, store)
    if run.speed.workers > (cores := max(1, int(usable_cores()))):
        journal.say(f"--workers {run.speed.workers}, but this process may use {cores} cores: only a slow disk gains.")
    if (why := native.why_not()) is not None:
        journal.say(f"Pillow decodes, several times slower than our decoder: {why}.")
    try:
        if run.budget.steps is None:
            try:
                with stop.at_once():
                    run = dataclasses.replace(run, budget=freeze_budget(run, loader, journal))
            except CutShort:
                raise Preempted(f"stopped by {stop.name} before the first step. Run the same command again.") from None
        folder.write_settings(out, run)
        name = device_name(device)
        facts = {**environment(name), "data": store.fingerprint, "images": store.count}
        write_whole(out / "env.json", json.dumps(facts, indent=1))
        trainer = Trainer(run, store, loader, device, journal, stop, controls.baselines)
        if point is not None:
            trainer.load(point)
            journal.say(f"resumed {out} at step {point.step:,} of {trainer.steps:,}.")
        else:
            journal.say(f"{run.preset}: {trainer.steps:,} steps of {run.optim.batch} images from {run.data} on {name}.")
        journal.rewind(trainer.step)
        trainer.train(controls.limit_steps, until_score=controls.until_score)
        return trainer.finish()
    finally:
        loader.close()


def freeze_budget(run: Run, loader: Loader, journal: Journal) -> Budget:
    """Turn a wish for epochs or seconds into steps, once; from then on the schedule is a function of the step."""
    wish = run.budget
    if wish.epochs is not None and wish.seconds is None:
        return dataclasses.replace(wish, steps=max(1, int(wish.epochs * loader.batches)))
    if wish.seconds is None:
        raise UsageError("how long? Give one of --epochs, --steps and --seconds.")
    (pace,) = seconds_per_step([(run, loader)], wish.seconds)
    budget = steps_for(wish, pace)
    journal.say(f"calibrated: {pace * 1000:.0f} ms a step, so {wish.seconds:g} s are {budget.steps:,} steps.")
    return budget


BASELINE_SCORES = "baselines.json"


class Trainer:
    """One run's weights, clock and records, from its first or a resumed step to its last."""

    def __init__(
        self,
        run: Run,
        store: Store,
        loader: Loader,
        device: torch.device,
        journal: Journal,
        stop: Stop,
        baselines: Path | None,
    ):
        assert run.budget.steps is not None
        self.run, self.store, self.loader, self.device = run, store, loader, device
        self.journal, self.stop, self.steps = journal, stop, run.budget.steps
        self.network = Network(run.method, run.model, run.seed).to(device)
        self.optimizer = make_optimizer(self.network, run.optim, device)
        self.warmup = warmup_steps(run.optim, self.steps, loader.batches)
        self.clock, self.step = Clock(), 0
        self.sums: dict[str, Tensor] = {}
        self.saved, self.saved_at, self.logged = False, time.monotonic(), (0, 0.0)
        self.exam = self._prepare_exam() if run.watch.evaluations else None
        self.baselines_from = baselines
        self.baselines: dict = {}
        if run.speed.compile:
            self.network.compile(dynamic=False)

    def _prepare_exam(self):
        """Labels are never needed to train: without them there is a notice and no score."""
        from train.evaluate import Exam

        assert self.run.data is not None
        try:
            return Exam.prepare(self.run.data, self.run.watch.tests, self.run.watch.label)
        except DataError as error:
            self.journal.say(f"no evaluation during training: {error}")
            return None

    def load(self, point: checkpoint.Checkpoint) -> None:
        self.network.load_state_dict(point.weights())
        checkpoint.load_optimizer(self.network, self.optimizer, point.moments())
        self.clock.load(point.state["clock"])
        self.step = point.step
        self.saved, self.logged = True, (self.step, self.clock.train_seconds)

    def train(self, limit: int | None, *, until_score: bool) -> None:
        run, clock = self.run, self.clock
        last = self.steps if limit is None else min(self.steps, self.step + limit)
        evaluate_at = evaluation_steps(self.steps, run.watch.evaluations) if self.exam is not None else set()
        self.journal.status(state="running", code=None, reason="", step=self.step, steps=self.steps)
        self.network.train()
        if self.exam is not None:
            self.or_stop(self.score_baselines)
        scored = {row["step"] for row in read_rows(self.journal.out / "evaluations.jsonl")}
        if self.step in evaluate_at - scored:
            self.or_stop(self.evaluate)
        if until_score:
            last = min([last, *(step for step in evaluate_at if step > self.step)])
        while self.step < last:
            epoch, start = divmod(self.step, self.loader.batches)
            clock.start()
            asked = time.perf_counter()
            for batch in self.loader.epoch(epoch, start):
                clock.wait_seconds += time.perf_counter() - asked
                lr = learning_rate(run.optim, self.step, self.steps, self.warmup)
                self.add(train_step(run, self.network, self.optimizer, batch, self.device, lr))
                self.step += 1
                clock.images += len(batch.id)
                evaluate = self.step in evaluate_at
                if self.step % run.watch.log_every == 0 or self.step == last or evaluate or self.stop.asked:
                    clock.pause(self.device)
                    self.log(lr)
                    if self.stop.asked and self.step < self.steps:
                        self.preempted()
                    if evaluate:
                        self.or_stop(self.evaluate)
                    if time.monotonic() - self.saved_at > run.watch.checkpoint_minutes * 60:
                        self.save()
                    clock.start()
                if self.step == last:
                    break
                asked = time.perf_counter()
            clock.pause(self.device)

    def add(self, outcomes: list[Outcome]) -> None:
        """Sum on the device; a row reads the sums once."""
        for outcome in outcomes:
            terms = {name: term.detach() for name, term in outcome.terms.items()}
            terms["loss"] = torch.stack(list(terms.values())).sum()
            for name, value in {**terms, **outcome.watched}.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def log(self, lr: float) -> None:
        before, seconds_before = self.logged
        steps = self.step - before
        if steps == 0:
            return
        parts = steps * self.run.optim.accumulate
        means = {name: value.item() / parts for name, value in self.sums.items()}
        self.sums.clear()
        if not all(math.isfinite(value) for value in means.values()):
            raise NumericsError(
                f"loss not finite between steps {before:,} and {self.step:,}: "
                + ", ".join(f"{name} {value:g}" for name, value in means.items())
                + f". The last checkpoint is in {folder.checkpoints(self.journal.out)}. "
                "Try --precision fp32, a lower --lr or --clip-grad 1.0."
            )
        clock = self.clock
        rate = steps * self.run.optim.batch / max(1e-9, clock.train_seconds - seconds_before)
        self.logged = (self.step, clock.train_seconds)
        epochs = self.step / self.loader.batches
        wait = clock.wait_seconds / max(1e-9, clock.train_seconds)
        self.journal.row("metrics", {
            "step": self.step, "epoch": round(epochs, 4), "lr": lr, **means, "images": clock.images,
            "images_per_second": round(rate, 1), "train_seconds": round(clock.train_seconds, 3),
            "data_wait": round(wait, 4),
        })  # fmt: skip
        used, total = memory_gb(self.device)
        saved = f"ckpt {duration(time.monotonic() - self.saved_at)} ago" if self.saved else "no ckpt yet"
        left = (self.steps - self.step) * clock.train_seconds / max(1, self.step)
        self.journal.progress(self.step, self.steps, (
            f"ep {epochs:.1f}/{self.steps / self.loader.batches:.1f}  step {self.step:,}  loss {means['loss']:.4f}  "
            f"img/s {rate:,.0f}  data-wait {wait:.0%}  mem {used:.1f}/{total:.0f} GB  "
            f"{saved}  ETA {duration(left)}"
        ))  # fmt: skip
        self.journal.status(step=self.step, train_seconds=round(clock.train_seconds, 1))

    def score_baselines(self) -> None:
        """What the scores will stand beside: taken once, before the first of them, or from a run that has the same."""
        from train.evaluate import score_baselines

        assert self.exam is not None
        path = self.journal.out / BASELINE_SCORES
        # What the scores depend on: with another seed or encoder they would be another network's.
        key = {
            "seed": self.run.seed, "model": dataclasses.asdict(self.run.model), "precision": self.run.precision,
            "label": self.exam.leading, "bank": self.exam.bank.fingerprint,
            "tests": {name: store.fingerprint for name, store in self.exam.tests.items()},
        }  # fmt: skip
        for known in (path, self.baselines_from and self.baselines_from / BASELINE_SCORES):
            found = folder.read_json(known) if known else {}
            if found.get("key") == key:
                self.baselines = found["scores"]
        if not self.baselines:
            self.baselines = score_baselines(self.exam, self.run, self.device)
        write_whole(path, json.dumps({"key": key, "scores": self.baselines}))

    def evaluate(self) -> None:
        """Off the clock. The encoder comes back in training mode. A score cut off by a signal is made up on resume."""
        from train.evaluate import EVALUATION, score_network, sentence

        assert self.exam is not None
        final = self.step == self.steps
        result = score_network(self.network, self.exam, self.run, self.device, final=final)
        leading = result["leading"] and result["leading"]["value"]
        seconds = round(self.clock.train_seconds, 3)
        at = {"step": self.step, "train_seconds": seconds, "images": self.clock.images}
        result = {"step": self.step, "train_seconds": seconds, **result, "baselines": self.baselines}
        result["sentence"] = sentence(result)
        if final:
            write_whole(self.journal.out / EVALUATION, json.dumps(result, indent=1))
        self.journal.row("evaluations", {**at, "leading": leading, "scores": result["scores"]})
        self.journal.say(f"step {self.step:,}, {seconds:.0f} s: {result['sentence']}")

    def save(self) -> None:
        state = {
            "step": self.step, "steps": self.steps, "clock": self.clock.state(), "preset": self.run.preset,
            "objective": self.run.objective, "data": self.store.fingerprint, "images_in_store": self.store.count,
        }  # fmt: skip
        where = folder.checkpoints(self.journal.out)
        path = checkpoint.save(where, self.network, self.optimizer, state, self.run.watch.keep_checkpoints)
        self.saved, self.saved_at = True, time.monotonic()
        self.journal.status(last_checkpoint=path.name)

    def save_once(self) -> None:
        """A step that is saved is never saved again: for a moment there would be none of it."""
        if not (folder.checkpoints(self.journal.out) / f"step_{self.step:09d}").exists():
            self.save()

    def or_stop(self, work: Callable[[], None]) -> None:
        """Do what a signal may cut off between two steps, since a resumed run makes up for it."""
        try:
            with self.stop.at_once():
                work()
        except CutShort:
            self.preempted()

    def preempted(self) -> None:
        self.save_once()
        raise Preempted(
            f"stopped by {self.stop.name} at step {self.step:,} of {self.steps:,}; checkpoint saved. "
            "Run the same command again to go on."
        )

    def finish(self) -> dict:
        self.save_once()
        done = self.step >= self.steps
        if done:
            from train.gallery import draw_gallery

            draw_gallery(self.journal.out, self.network, self.run, self.store, self.device)
        self.journal.status(state="done" if done else "paused", code=0, reason="", step=self.step)
        seconds = self.clock.train_seconds
        what = "finished" if done else f"paused at step {self.step:,} of {self.steps:,}"
        return {
            "out": str(self.journal.out), "state": "done" if done else "paused", "step": self.step, "steps": self.steps,
            "train_seconds": round(seconds, 3), "images": self.clock.images,
            "sentence": f"{self.journal.out} {what}: {self.step:,} steps, {self.clock.images:,} images, "
            f"{duration(seconds)} of training.",
        }  # fmt: skip


def evaluation_steps(steps: int, count: int) -> set[int]:
    """`count` steps spread evenly, the last one included."""
    return {max(1, round(steps * place / count)) for place in range(1, count + 1)} if count else set()


class CutShort(Exception):
    """A signal came during work that need not be finished."""


class Stop:
    """SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C ask the loop to save and end; a second one ends it at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.asked, self.name, self._before, self._at_once = False, "", {}, False

    def __enter__(self) -> Stop:
        # Who ignores SIGHUP (nohup) wants the work to go on.
        caught = [each for each in self.SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in caught}
        return self

    def _ask(self, number: int, _frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.name = True, signal.Signals(number).name
        print(f"{self.name}: finishing this step, then saving. Once more to stop without.", file=sys.stderr, flush=True)
        if self._at_once:
            raise CutShort

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises CutShort where it strikes: for work that may be lost, between two steps."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
