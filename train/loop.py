"""The training loop: loader -> views -> objective -> step. It knows no method.

Everything random is a function of (seed, epoch, sample id), everything scheduled a function of the step, so a
checkpoint needs only weights, moments and counters, and a resumed run on a CPU is equal to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from model.network import Network
from pipeline import kernels, native
from pipeline.errors import NumericsError, Preempted, UsageError
from pipeline.inflated import Inflated
from pipeline.labelled import Labelled
from pipeline.limits import usable_cores
from pipeline.staging import claimed, write_whole
from pipeline.store import Store
from pipeline.views import Batch
from train import checkpoint, folder
from train.attention import settle_attention
from train.ceiling import gemm_flops
from train.clock import Clock, process_seconds
from train.config import Budget, Run, as_values, flat
from train.data import check_data, open_data, open_store
from train.device import choose_precision, device_name, memory_gb, resolve
from train.evaluation.scores import Scores
from train.journal import Journal, code_revision, duration, earlier_environments, environment
from train.json_files import read_object, read_rows
from train.ledger import PARTS, TRAINING, Ledger
from train.meters import Meters
from train.pace import seconds_per_step, steps_for
from train.ranks import Ranks, together, wanted
from train.schedule import learning_rate, warmup_steps
from train.stages import Stage, lay_out, macs_per_image, steps_of
from train.step import Refused, Stepper
from train.stop import CutShort, Stop

if TYPE_CHECKING:
    from train.pretrain import Controls


def pretrain(wish: Run, controls: Controls) -> dict:
    """Run, or go on with, what `wish` describes. Returns the result for stdout; every rank the same."""
    assert wish.out is not None
    store = open_store(wish)
    run = resolve(wish, store)
    # Before the folder is made: what cannot run leaves nothing behind.
    check_data(run, store, wanted().count)
    run.method.check(run.optim.batch, store.per_epoch)
    with together(torch.device(run.device), run.speed.stall_seconds) as ranks, Stop(quiet=not ranks.first) as stop:
        if run.speed.graphs and ranks.count > 1:
            raise UsageError("--speed.graphs is for one process: with several each block is compiled by itself.")
        places = ("out", "data", "inflate.data", "device")
        ranks.agree({
            **{name: value for name, value in flat(as_values(run)).items() if name not in places},
            "data": store.fingerprint, "code": code_revision(), "torch": torch.__version__,
            "--limit-steps": controls.limit_steps, "--until-score": controls.until_score,
        })  # fmt: skip
        with claimed_folder(wish, controls, ranks) as out:
            journal = Journal(out, quiet=controls.quiet, rank=ranks.rank)
            ranks.on_loss = lambda error: journal.status(state="failed", code=error.code, reason=str(error))
            with journal.reporting():
                return _pretrain(run, controls, store, journal, stop, ranks)


@contextlib.contextmanager
def claimed_folder(wish: Run, controls: Controls, ranks: Ranks) -> Iterator[Path]:
    """The run folder, which rank 0 claims for all."""
    assert wish.out is not None
    if not ranks.first:
        yield wish.out
        return
    with claimed(wish.out, "run", (folder.CONFIG,), overwrite=controls.overwrite) as out:
        folder.check_same_run(out, as_values(wish), allow_resume=not controls.no_resume)
        yield out


def _pretrain(run: Run, controls: Controls, store: Store, journal: Journal, stop: Stop, ranks: Ranks) -> dict:
    out, device = journal.out, torch.device(run.device)
    saved, point, before = None, None, ""
    if ranks.first:
        point = folder.resume_point(out, controls.resume, store.fingerprint, store.count, journal.say)
        saved, before = folder.saved_settings(out), read_object(out / "env.json").get("device", "")
    saved, point, before = ranks.share((saved, point, before))
    name = device_name(device)
    if saved is not None:
        run = as_settled(run, saved, device, moved=before != name)
    if run.speed.workers > (cores := max(1, int(usable_cores()))):
        journal.say(f"--workers {run.speed.workers}, but this process may use {cores} cores: only a slow disk gains.")
    if (why := native.why_not()) is not None:
        journal.say(f"Pillow decodes, several times slower than our decoder: {why}.")
    if device.type == "cuda" and (why := kernels.why_not(device)) is not None:
        journal.say(f"Plain torch cuts crops and patches, slower than kernels would: {why}.")
    if run.speed.shard and ranks.count == 1:
        journal.say("--speed.shard: one process has nothing to divide.")
    if run.budget.steps is None:
        try:
            # Of several processes none may leave alone: they agree on it between two turns.
            with stop.at_once() if ranks.count == 1 else contextlib.nullcontext():
                run = dataclasses.replace(run, budget=freeze_budget(run, store, journal, ranks, stop))
        except CutShort:
            who = stop.name or ELSEWHERE
            raise Preempted(f"stopped by {who} before the first step. Run the same command again.") from None
    with contextlib.closing(Trainer(run, store, device, journal, stop, controls.baselines, ranks)) as trainer:
        attention = settle_attention(trainer.stepper)
        if ranks.first:
            folder.write_settings(
                out, dataclasses.replace(run, speed=dataclasses.replace(run.speed, attention=attention))
            )
            write_facts(out / "env.json", name, store, ranks.count)
        for words in run.method.warnings(run.optim.batch // run.optim.accumulate, store.per_epoch):
            journal.say(words)
        if point is not None:
            trainer.resume(point)
            journal.say(f"resumed {out} at step {point.step:,} of {trainer.steps:,}.")
        else:
            where = name if ranks.count == 1 else f"{ranks.count} x {name}"
            share = f", {store.real_share:.0%} of them real" if isinstance(store, Inflated) else ""
            if isinstance(store, Labelled):
                share = f", the {store.per_epoch:,} of {store.count:,}{store.drawn}"
            journal.say(
                f"{run.preset}: {trainer.steps:,} steps of {run.optim.batch} images from {run.data}{share}, on {where}."
            )
        journal.rewind(trainer.step)
        trainer.stepper.prepare()
        trainer.train(controls.limit_steps, until_score=controls.until_score)
        return trainer.finish()


def as_settled(run: Run, saved: dict, device: torch.device, *, moved: bool) -> Run:
    """What was settled when the run began stays: the steps that its seconds came to, precision, decoder, attention.

    moved: to a device of another name, which may lack the kernels that were chosen: they are chosen anew. Raises
    ResourceError where it has no units for the precision.
    """
    speed = run.speed
    if speed.attention == "auto" and not moved:
        speed = dataclasses.replace(speed, attention=saved["speed"].get("attention") or "auto")
    precision = choose_precision(saved["precision"], device)
    return dataclasses.replace(
        run, budget=Budget(**saved["budget"]), precision=precision, loader=saved["loader"], speed=speed
    )


def write_facts(path: Path, device: str, store: Store, ranks: int) -> None:
    """What a result comes from: code, machine and data, and where an earlier part of the run had others, those too."""
    real = store.parts[0]
    facts = {**environment(device), "data": real.fingerprint, "images": real.count, "ranks": ranks}
    if before := earlier_environments(path, facts):
        facts["before"] = before
    if isinstance(store, Inflated):
        facts["inflated"] = {**store.artificial.manifest["generated"], "images": store.artificial.count}
    write_whole(path, json.dumps(facts, indent=1))


def freeze_budget(run: Run, store: Store, journal: Journal, ranks: Ranks, stop: Stop) -> Budget:
    """Turn a wish for epochs or seconds into steps, once; from then on the schedule is a function of the step."""
    wish = run.budget
    if wish.epochs is not None and wish.seconds is None:
        return dataclasses.replace(wish, steps=steps_of(run, wish.epochs, store.per_epoch))
    if wish.seconds is None:
        raise UsageError("how long? Give one of --epochs, --steps and --seconds.")
    (pace,) = seconds_per_step([(run, store)], wish.seconds, ranks, stop)
    budget = steps_for(wish, pace)
    journal.say(f"calibrated: {pace * 1000:.0f} ms a step, so {wish.seconds:g} s are {budget.steps:,} steps.")
    return budget


ELSEWHERE = "a signal at another rank"
WORTH_A_CEILING = 30.0  # seconds of training, below which measuring what the device can do would take longer


class Trainer:
    """One run's weights, clock and records, from its first or a resumed step to its last."""

    def __init__(
        self,
        run: Run,
        store: Store,
        device: torch.device,
        journal: Journal,
        stop: Stop,
        baselines: Path | None,
        ranks: Ranks,
    ):
        assert run.budget.steps is not None
        self.run, self.store, self.device = run, store, device
        self.journal, self.stop, self.ranks, self.steps = journal, stop, ranks, run.budget.steps
        self.stages = lay_out(run, self.steps, store.per_epoch)
        self.stage, self.loader = self.stages[0], open_data(self.stages[0].run, store, ranks)
        self.ledger = Ledger(device)
        self.stepper = Stepper(run, device, ranks=ranks, ledger=self.ledger)
        self.network, self.optimizer = self.stepper.network, self.stepper.optimizer
        self.first = ranks.first
        self.warmup = warmup_steps(run.optim, self.steps, store.per_epoch // run.optim.batch)
        self.clock, self.step = Clock(), 0
        self.shift, self.rollbacks = 0, 0  # batches left out so far, and how often the run went back
        self.batch: Batch | None = None  # of the last step, until the next is taken
        # While the rate warms up curves mean nothing yet.
        self.meters = Meters(self.stepper, journal, max(self.warmup, self.steps / 10))
        self.saved_step: int | None = None  # the newest checkpoint that is sound
        self.saved_at, self.logged = time.monotonic(), (0, 0, 0.0)  # step, images, seconds
        self.scores = Scores.prepare(run, device, journal, baselines) if run.watch.evaluations and ranks.first else None

    def resume(self, point: checkpoint.Checkpoint) -> None:
        self.load(point)
        self.shift, self.rollbacks = point.state.get("shift", 0), point.state.get("rollbacks", 0)
        self.stepper.refused = Refused(self.device, point.state.get("refused", 0))
        self.clock.load(point.state["clock"])
        self.ledger.load(point.state.get("ledger", {}))
        self.logged = (self.step, self.clock.images, self.clock.train_seconds)

    def load(self, point: checkpoint.Checkpoint) -> None:
        if self.stepper.sharded:
            from train import divided

            divided.load(self.network, self.optimizer, point)
        else:
            self.network.load_state_dict(point.weights())
            self.stepper.load_average(point.average())
            checkpoint.load_optimizer(self.network, self.optimizer, point.moments())
        self.stepper.scaler.load_state_dict(point.state.get("scaler", {}))
        self.step = self.stepper.taken = self.saved_step = point.step

    def train(self, limit: int | None, *, until_score: bool) -> None:
        run, clock, ranks, ledger = self.run, self.clock, self.ranks, self.ledger
        last = self.steps if limit is None else min(self.steps, self.step + limit)
        if self.step < last:
            ledger.add("start-up", process_seconds())
        scored = {row["step"] for row in read_rows(self.journal.out / "evaluations.jsonl")}
        # Rank 0 scores and the others wait; they only have to know when.
        scores, missed = ranks.share((self.scores is not None, self.step not in scored))
        evaluate_at = evaluation_steps(self.steps, run.watch.evaluations) if scores else set()
        self.journal.status(state="running", code=None, reason="", step=self.step, steps=self.steps)
        if scores:
            self.alone("baselines", self.take_baselines)
        if missed and self.step in evaluate_at:
            self.score()
        if until_score:
            last = min([last, *(step for step in evaluate_at if step > self.step)])
        while self.step < last:
            stage = self.enter_stage()
            clock.start()
            with contextlib.closing(self.loader.epoch(*stage.place(self.step + self.shift))) as batches:
                while self.step < min(last, stage.last):
                    with ledger("data wait"):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    self.batch = batch
                    lr = learning_rate(stage.run.optim, self.step, self.steps, self.warmup)
                    done = (self.step / self.steps, (self.step + 1) / self.steps)
                    with ranks.waiting("a step"):
                        self.meters.add(self.stepper(batch, lr, done))
                    self.step += 1
                    clock.images += stage.run.optim.batch
                    evaluate, stopped = self.step in evaluate_at, ranks.any(self.stop.asked)
                    if self.step % run.watch.log_every == 0 or self.step == last or evaluate or stopped:
                        clock.pause(self.device)
                        if not self.log(lr):
                            break
                        if stopped and self.step < self.steps:
                            self.preempted()
                        if evaluate:
                            self.score()
                        if self.for_all(time.monotonic() - self.saved_at > run.watch.checkpoint_minutes * 60):
                            self.save()
                        if self.step < last:
                            clock.start()
            clock.pause(self.device)

    def enter_stage(self) -> Stage:
        """The stage of the next step; another one's views or batch need another loader."""
        stage = next(each for each in self.stages if self.step < each.last)
        if stage is not self.stage:
            self.loader.close()
            self.stage, self.loader = stage, open_data(stage.run, self.store, self.ranks)
            part = stage.run
            self.journal.say(f"step {self.step:,}: from here {part.model.side} px, {part.optim.batch} images a step.")
        self.stepper.now = stage.run
        return stage

    def close(self) -> None:
        self.loader.close()

    def log(self, lr: float) -> bool:
        """Write a row; False where the run went back to a checkpoint instead."""
        before, images_before, seconds_before = self.logged
        steps = self.step - before
        if steps == 0:
            return True
        try:
            means = self.meters.means(self.step, steps, self.capture)
        except NumericsError as error:
            self.roll_back(error)
            return False
        clock = self.clock
        rate = (clock.images - images_before) / max(1e-9, clock.train_seconds - seconds_before)
        self.logged = (self.step, clock.images, clock.train_seconds)
        epochs = self.stage.epochs(self.step)
        spent = self.accounts()
        wait = spent.get("data wait", 0.0) / max(1e-9, clock.train_seconds)
        self.journal.row("metrics", {
            "step": self.step, "epoch": round(epochs, 4), "lr": lr, **means, "images": clock.images,
            "images_per_second": round(rate, 1), "train_seconds": round(clock.train_seconds, 3),
            "data_wait": round(wait, 4), "spent": spent,
        })  # fmt: skip
        used, total = memory_gb(self.device)
        there = self.saved_step is not None
        saved = f"ckpt {duration(time.monotonic() - self.saved_at)} ago" if there else "no ckpt yet"
        left = (self.steps - self.step) * clock.train_seconds / max(1, self.step)
        self.journal.progress(self.step, self.steps, (
            f"ep {epochs:.1f}/{self.stages[-1].epochs(self.steps):.1f}  step {self.step:,}  "
            f"loss {means.get('loss', math.nan):.4f}  "
            f"img/s {rate:,.0f}  data-wait {wait:.0%}  mem {used:.1f}/{total:.0f} GB  "
            f"{saved}  ETA {duration(left)}"
        ))  # fmt: skip
        self.journal.status(step=self.step, train_seconds=round(clock.train_seconds, 1))
        self.meters.listen(self.step, means)
        return True

    def roll_back(self, error: NumericsError) -> None:
        """Load the newest checkpoint and go on with the batches behind the last; every rank calls it.

        What is left out is a shift of the order of the data, kept in checkpoints: a run that is killed and resumed goes
        the same way, and the learning rate stays a function of the step. Clock and ledger go on, for the seconds are
        spent. Raises NumericsError where there is nothing to go back to, or no more wish to.
        """
        point, where = None, folder.checkpoints(self.journal.out)
        if self.first and self.rollbacks < self.run.watch.rollbacks:
            point = checkpoint.newest(where, self.journal.say)
        point = self.ranks.share(point)
        if point is None:
            raise NumericsError(
                f"{error} The last checkpoint is in {where}. Try --precision fp32, a lower --lr or --clip-grad 1.0."
            ) from None
        at, self.shift = self.step, self.shift + self.step - point.step
        self.rollbacks += 1
        with self.ledger.aside("checkpoint"):
            self.load(point)
        self.stepper.refused = Refused(self.device)
        self.meters.clear()
        self.logged = (self.step, self.clock.images, self.clock.train_seconds)
        self.journal.rewind(self.step)
        self.journal.say(
            f"{error} Back to step {self.step:,}, and on with the batches behind those of step {at:,} "
            f"(rollback {self.rollbacks} of {self.run.watch.rollbacks})."
        )

    def capture(self) -> Path:
        """What the last step was made of. It was not taken, so the weights are those that it met."""
        from train.capture import write_capture

        assert self.batch is not None
        return write_capture(self.journal.out, self.stepper, self.batch, self.step, self.ranks)

    def accounts(self) -> dict[str, float]:
        """Seconds by part up to now. What no part has of the training clock is "other"."""
        spent = self.ledger.read()
        spent["other"] = self.clock.train_seconds - sum(spent.get(part, 0.0) for part in TRAINING)
        return {part: round(spent[part], 3) for part in PARTS if part in spent}

    def balance(self) -> None:
        """ledger.json: what the run's seconds went into, and how near the machine's limit its steps were."""
        seconds, flop = self.clock.train_seconds, 6 * macs_per_image(self.run)
        flops = flop * self.clock.images / max(1e-9, seconds)
        # Only rank 0 writes it: FLOP/s per device against one device's ceiling.
        ceiling = gemm_flops(self.device, self.run.precision) if seconds > WORTH_A_CEILING else None
        write_whole(self.journal.out / "ledger.json", json.dumps({
            "train_seconds": round(seconds, 3), "images": self.clock.images,
            "images_per_second": round(self.clock.images / max(1e-9, seconds), 1),
            "spent": self.accounts(),
            "gflop_per_image": flop / 1e9, "tflops": flops / 1e12, "gemm_tflops": ceiling and ceiling / 1e12,
            "mfu": ceiling and flops / self.ranks.count / ceiling, "memory_gb": round(memory_gb(self.device)[0], 2),
            "ranks": self.ranks.count,
        }, indent=1))  # fmt: skip

    def take_baselines(self) -> None:
        assert self.scores is not None
        self.scores.take_baselines()

    def score(self) -> None:
        network = self.whole()
        # A name of its own for each try: after a rollback the same step is scored again.
        self.alone(f"score {self.step} {self.rollbacks}", lambda: self.evaluate(network))

    def evaluate(self, network: Network | None) -> None:
        """Off the clock. A score cut off by a signal is made up on resume."""
        assert self.scores is not None
        assert network is not None
        seconds = round(self.clock.train_seconds, 3)
        at = {"step": self.step, "train_seconds": seconds, "images": self.clock.images}
        with self.stepper.scored(network) as network:
            self.scores.take(network, at, final=self.step == self.steps)

    def whole(self) -> Network | None:
        """The network with whole weights: where they are divided, a copy on rank 0. Every rank calls it."""
        if not self.stepper.sharded:
            return self.network
        from train import divided

        weights = divided.gather(self.network.state_dict(), self.ranks)
        if not self.first:
            return None
        network = Network(self.run.method, self.run.model, self.run.seed).to(self.device)
        network.load_state_dict(weights)
        return network

    def for_all(self, answer: bool) -> bool:
        """Rank 0's answer, where the others have to do their part."""
        return self.ranks.share(answer) if self.stepper.sharded else answer and self.first

    def save(self) -> None:
        """By rank 0, or by every rank where weights are divided; the last checkpoint of a run is whole in any case."""
        state = {
            "step": self.step, "steps": self.steps, "shift": self.shift, "rollbacks": self.rollbacks,
            "refused": self.stepper.refused.read()[0],
            "clock": self.clock.state(), "ledger": self.ledger.read(),
            "preset": self.run.preset, "objective": self.run.objective, "data": self.store.fingerprint,
            "images_in_store": self.store.count, "scaler": self.stepper.scaler.state_dict(),
        }  # fmt: skip
        where = folder.checkpoints(self.journal.out)
        keep = self.run.watch.keep_checkpoints
        tensors = checkpoint.tensors_of(self.network, self.optimizer, self.stepper.average_weights())
        with self.ledger.aside("checkpoint"):
            if self.stepper.sharded:
                from train import divided

                path = divided.save(where, tensors, state, keep, self.ranks, whole=self.step == self.steps)
            else:
                path = checkpoint.save(where, tensors, state, keep)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.journal.status(last_checkpoint=path.name)

    def save_once(self) -> None:
        """A step that is saved is not saved again: for a moment there would be none of it. What lies in its place and
        was not resumed from is damaged, and is replaced."""
        if self.for_all(self.saved_step != self.step):
            self.save()

    def alone(self, occasion: str, work: Callable[[], None]) -> None:
        """Rank 0 does what needs one process, while the others wait. A signal cuts it off: it is made up on resume."""
        if not self.first:
            if self.ranks.hear(occasion) == "stopped":
                self.preempted()
            return
        try:
            with self.stop.at_once(), self.ledger.aside("evaluation"):
                work()
        except CutShort:
            self.ranks.tell(occasion, "stopped")
            self.preempted()
        self.ranks.tell(occasion, "done")

    def preempted(self) -> NoReturn:
        self.save_once()
        raise Preempted(
            f"stopped by {self.stop.name or ELSEWHERE} at step {self.step:,} of {self.steps:,}; checkpoint saved. "
            "Run the same command again to go on."
        )

    def finish(self) -> dict:
        self.save_once()
        done = self.step >= self.steps
        network = self.whole() if done else None
        if network is not None and self.first:
            from train.gallery import draw_gallery

            draw_gallery(self.journal.out, network, self.run, self.store, self.device)
            self.balance()
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
