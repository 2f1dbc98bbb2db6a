"""Everything that decides a run, as frozen dataclasses; each field is a flag and a YAML key.

What decides the result is apart from what only decides the speed: two runs may be compared if they differ in `Speed`
and in what the comparison declares. No torch here: flags are parsed before anything slow is imported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.objectives import OBJECTIVES, Objective
from model.objectives.mae import MAE
from model.shape import Shape
from model.ways import parse_ways
from pipeline.errors import UsageError
from train.command import nearest, overlay, plain
from train.stages import parts_of


@dataclass(frozen=True, kw_only=True)
class Optim:
    """MAE's recipe and what may be tried beside it; its schedule is linear warm-up, then half a cosine down."""

    batch: int = 4096
    """Images per optimizer step, over all devices."""
    base_lr: float = 1.5e-4
    """Learning rate per 256 images, as papers quote it."""
    max_lr: float | None = None
    """What base-lr comes to at most, however large the batch."""
    lr: float | None = None
    """Peak learning rate itself; overrides base-lr."""
    min_lr: float = 0.0
    warmup_epochs: float = 40.0
    """Linear warm-up, in epochs, but never more than warmup-share of the run."""
    warmup_share: float = 0.05
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    """What weight-decay becomes by the end, along half a cosine; constant by default."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    """Largest gradient norm; none by default, as MAE."""
    accumulate: int = 1
    """Parts that a batch is cut into to fit memory. A contrastive loss sees only one part's negatives."""
    stages: str = ""
    """Parts of the run with smaller pictures or batches, as SHARE:side=PIXELS,batch=IMAGES up to a share of the steps:
    "0.7:side=160" trains seven tenths of the steps at 160 px; the rest is as configured. The rate follows the batch."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the blocks' matrices move along their momentum made orthogonal, everything else by AdamW."""
    layer_decay: float = 1.0
    """Each encoder block learns this much slower than the one behind it; 1: all alike."""
    ema: float = 0.0
    """Decay of a moving average of the encoder's weights, which is then what is scored and exported; 0: none."""

    def check(self) -> None:
        """Raises UsageError."""
        if self.batch < 1 or self.accumulate < 1:
            raise UsageError(f"--batch {self.batch} and --accum-iter {self.accumulate}: both are at least 1.")
        if self.batch % self.accumulate:
            raise UsageError(f"--batch {self.batch} cannot be cut into {self.accumulate} equal parts (--accum-iter).")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.ema < 1:
            raise UsageError("--optim.layer-decay lies above 0 and up to 1, --optim.ema from 0 to below 1.")

    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        scaled = self.base_lr * self.batch / 256
        return scaled if self.max_lr is None else min(scaled, self.max_lr)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a run is: exactly one of epochs, steps and seconds is the wish; steps is what it becomes."""

    epochs: float | None = None
    """Passes over the images."""
    steps: int | None = None
    seconds: float | None = None
    """Training seconds, without set-up, evaluation and checkpoints. Calibrated once and frozen as steps."""


@dataclass(frozen=True, kw_only=True)
class Inflation:
    """Generated images beside the real ones (AdaInf, Wang et al. 2024). They are trained on and never evaluated on."""

    data: Path | None = None
    """Store that `daae inflate` made from --data; without one, real images alone."""
    real_repeat: int = 10
    """How many times as often as a generated image a real one is drawn. An epoch is one pass over the real ones."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Evaluation, logging and checkpoints: off the training clock, without influence on the weights of a sound run."""

    tests: tuple[Path, ...] = ()
    """Stores with labelled images to score on; without any, a fifth of the labelled training images is held out."""
    label: str | None = None
    """Label column to score; default: the leading one of the store."""
    overlap: bool = False
    """Tests may hold pictures whose labels train the probe."""
    evaluations: int = 0
    """How many times to score during the run, the last one at its end."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    rollbacks: int = 0
    """How often a run may return to its last checkpoint after non-finite gradients; it then skips the batches since."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """May change seconds, and a result only by rounding."""

    workers: int = 0
    """Decoding threads; 0 chooses."""
    ahead: int = 2
    """Batches that are made and wait: enough to ride out a slow one."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs that DALI sends to the GPU's hardware decoder, where it has one."""
    compile: bool = False
    """torch.compile the loss."""
    graphs: bool = False
    """With --compile: one launch for all kernels of the loss (CUDA graphs), for small models on a GPU."""
    attention: str = "auto"
    """any (torch chooses), products, flash, efficient or cudnn; auto: measured for each length when the run begins."""
    recompute: bool = False
    """Keep no activations inside a block and compute them again in the backward pass: less memory, a third slower."""
    bf16_gradients: bool = False
    """Several processes average their gradients in bfloat16: half the bytes between them."""
    shard: bool = False
    """Weights, gradients and moments are divided among the processes, for models that do not fit otherwise."""
    stall_seconds: float = 300.0
    """How long to wait for a batch before the run stops with exit code 6."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pre-training run."""

    preset: str = "custom"
    """Where the other settings start from; `daae pretrain --list-presets` names them."""
    data: Path | None = None
    """Store made by `daae convert`."""
    out: Path | None = None
    """Run folder; an unfinished run in it is resumed."""
    objective: str = "mae"
    """Method, by the name of its file in model/objectives."""
    method: Objective = field(default_factory=MAE)
    model: Shape = field(default_factory=Shape)
    optim: Optim = field(default_factory=Optim)
    budget: Budget = field(default_factory=Budget)
    inflate: Inflation = field(default_factory=Inflation)
    watch: Watch = field(default_factory=Watch)
    speed: Speed = field(default_factory=Speed)
    seed: int = 0
    """Of weights, order, crops, colours and masks."""
    loader: Literal["auto", "ffcv", "shards", "dali", "resident"] = "auto"
    """What reads and decodes; not under speed, since two decoders differ by a few grey levels."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device multiplies it fast, fp16 on a GPU without, fp32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check(self) -> None:
        """What can be said before any data is looked at. Raises UsageError."""
        least = {
            "speed.workers": 0, "speed.ahead": 1, "watch.log_every": 1, "watch.evaluations": 0,
            "watch.keep_checkpoints": 1, "watch.checkpoint_minutes": 0, "watch.rollbacks": 0,
            "speed.hw_decoder_load": 0, "inflate.real_repeat": 1,
        }  # fmt: skip
        values = flat(as_values(self))
        for name, lowest in least.items():
            if values[name] < lowest:
                raise UsageError(f"--{name.replace('_', '-')} is at least {lowest}, not {values[name]}.")
        for _, part in parts_of(self):
            part.model.check()
            part.optim.check()
            self.method.check(part.optim.batch)
        if self.speed.shard and (self.optim.optimizer == "muon" or self.optim.ema):
            raise UsageError("--speed.shard divides weights; --optim.optimizer muon and --optim.ema want them whole.")
        if self.speed.graphs and not self.speed.compile:
            raise UsageError("--speed.graphs goes with --compile.")
        if self.speed.graphs and self.optim.accumulate > 1:
            raise UsageError(
                "--speed.graphs and --accum-iter: a part's gradients would be written over by the next one's."
            )
        if self.speed.attention != "auto":
            parse_ways(self.speed.attention)
        if self.speed.hw_decoder_load > 1 or self.speed.stall_seconds <= 0:
            raise UsageError("--speed.hw-decoder-load is at most 1, and --speed.stall-seconds above 0.")


# Flags of MAE's own script, and short forms of the settings that people change most.
ALIASES = {
    "--batch": "--optim.batch", "--lr": "--optim.lr", "--blr": "--optim.base-lr", "--min-lr": "--optim.min-lr",
    "--weight-decay": "--optim.weight-decay", "--weight-decay-end": "--optim.weight-decay-end",
    "--clip-grad": "--optim.clip-grad",
    "--warmup-epochs": "--optim.warmup-epochs", "--accum-iter": "--optim.accumulate",
    "--epochs": "--budget.epochs", "--steps": "--budget.steps", "--seconds": "--budget.seconds",
    "--mask-ratio": "--method.mask-ratio", "--norm-pix-loss": "--method.norm-pix", "--input-size": "--model.side",
    "--workers": "--speed.workers", "--num-workers": "--speed.workers", "--compile": "--speed.compile",
    "--no-compile": "--speed.no-compile", "--data-path": "--data", "--output-dir": "--out",
    "--tests": "--watch.tests", "--overlap": "--watch.overlap", "--label": "--watch.label",
    "--evaluations": "--watch.evaluations",
}  # fmt: skip

# What may differ between a run folder's configuration and the command that resumes it.
MAY_CHANGE = ("out", "speed", "watch", "preset", "data", "inflate.data")


@functools.cache
def typed(objective: str) -> type[Run]:
    """Run with its `method` known as this objective's own options, so that they become flags and keys."""
    if objective not in OBJECTIVES:
        raise UsageError(f"--objective {objective} is unknown.{nearest(objective, OBJECTIVES)}")
    method = OBJECTIVES[objective]
    # The string annotations of Run are resolved in this module; the method's own type goes in directly.
    return dataclasses.make_dataclass(
        "Run", [("method", method, field(default_factory=method))], bases=(Run,), frozen=True, kw_only=True,
        namespace={"__doc__": Run.__doc__, "__module__": __name__},
    )  # fmt: skip


def of_type(run: Run, cls: type[Run]) -> Run:
    """The same settings as another class of run; the method starts from its defaults where it is another one."""
    values = {each.name: getattr(run, each.name) for each in dataclasses.fields(run)}
    wanted = next(each.type for each in dataclasses.fields(cls) if each.name == "method")
    if not isinstance(wanted, type) or not isinstance(run.method, wanted):
        del values["method"]
    return cls(**values)


def with_values(run: Run, values: dict[str, Any], source: str) -> Run:
    """`run` with the nested settings of a YAML file laid over it; `objective` may change, and with it the options."""
    objective = values.get("objective", run.objective)
    start = of_type(dataclasses.replace(run, objective=objective), typed(objective))
    if "budget" in values:  # a wish for seconds replaces the preset's wish for epochs
        start = dataclasses.replace(start, budget=Budget())
    return overlay(start, values, source)


def as_values(run: Run) -> dict[str, Any]:
    """What config.yaml holds: nested, plain, and fit to be fed back."""
    return plain(run)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    result = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[prefix + name] = value
    return result


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of an earlier run, with the options that there were not yet: each at its default, which leaves a
    run as it was."""
    objective = str(settings.get("objective", Run.objective))
    known = flat(as_values(typed(objective)())) if objective in OBJECTIVES else {}
    return {**known, **settings}


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What a run folder's resolved settings and a new command disagree on, as "name: saved -> asked".

    A wish left open (None, "auto") agrees with whatever it was resolved to.
    """
    before, now = completed(flat(saved)), flat(asked)
    found = []
    for name in sorted(before.keys() | now.keys()):
        if {name, name.split(".")[0]} & {*MAY_CHANGE} or now.get(name) in (None, "auto"):
            continue
        if name == "device" and str(before[name]).partition(":")[0] == str(now[name]).partition(":")[0]:
            continue  # another GPU of the same kind of machine
        if before.get(name) != now.get(name):
            found.append(f"{name}: {before.get(name)} -> {now.get(name)}")
    return found
