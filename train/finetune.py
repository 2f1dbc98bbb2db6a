"""`daae finetune`: a checkpoint's encoder and a new head trained on labels, end to end, by evaluation/tuner.py.

The recipe is MAE's (He et al. 2021, appendix A.1 and main_finetune.py), every number of it a flag. What differs:
pictures are resized by an antialiased triangle where MAE takes a cubic, and one device trains, with --accum-iter.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pipeline.errors import UsageError
from train.command import parse, run
from train.config import Optim

if TYPE_CHECKING:
    from model.shape import Shape

RESULT = "finetune.json"  # in the folder of a fine-tuning: what came out
ALIASES = {
    "--accum-iter": "--accumulate", "--blr": "--base-lr", "--reprob": "--erase", "--data-path": "--data",
    "--output-dir": "--out",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result of a fine-tuning; None is settled by the encoder's size."""

    epochs: float | None = None
    """Passes over the labelled images; default: 100, for ViT-L and ViT-H 50."""
    batch: int = 1024
    """Images per optimizer step."""
    base_lr: float | None = None
    """Learning rate of the head per 256 images; default: 5e-4, for ViT-L and ViT-H 1e-3."""
    lr: float | None = None
    """Peak learning rate of the head itself; overrides base-lr."""
    min_lr: float = 1e-6
    warmup_epochs: float = 5.0
    """Linear warm-up, in epochs, but never more than warmup-share of the run."""
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float | None = None
    """Each layer's share of the next one's rate; default: 0.65, for ViT-L and ViT-H 0.75."""
    drop_path: float | None = None
    """Probability that the last block is left out for an image, falling to 0 at the first; default: 0.1, ViT-L 0.2,
    ViT-H 0.3."""
    clip_grad: float | None = None
    """Largest gradient norm; none by default, as MAE."""
    smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup: float = 0.8
    """Beta parameter of mixup; 0: none."""
    cutmix: float = 1.0
    """Beta parameter of CutMix; 0: none."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    switch_prob: float = 0.5
    """Probability that it is CutMix, where there are both."""
    magnitude: float = 9.0
    """Of RandAugment, from 0 to 10; 0: none."""
    magnitude_std: float = 0.5
    erase: float = 0.25
    """Probability that a rectangle of an image is replaced by noise."""
    area: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the image."""
    seed: int = 0
    """Of the head, order, crops and everything above."""
    accumulate: int = 1
    """Parts that a batch is cut into to fit memory."""
    from_scratch: bool = False
    """Start from the untrained encoder, as the run's seed draws it: what the same recipe does without pre-training."""

    def of_size(self, shape: Shape) -> Recipe:
        """With MAE's numbers for an encoder of this size where none are given; smaller ones take ViT-B's."""
        size = next(numbers for width, numbers in reversed(SIZES.items()) if shape.width >= width)
        return dataclasses.replace(
            self, **{name: number for name, number in size.items() if getattr(self, name) is None}
        )

    def optim(self) -> Optim:
        """Raises UsageError."""
        assert self.base_lr is not None
        optim = Optim(
            batch=self.batch, base_lr=self.base_lr, lr=self.lr, min_lr=self.min_lr, warmup_epochs=self.warmup_epochs,
            warmup_share=self.warmup_share, weight_decay=self.weight_decay, betas=self.betas, clip_grad=self.clip_grad,
            accumulate=self.accumulate, layer_decay=self.layer_decay or 1.0,
        )  # fmt: skip
        optim.check()
        return optim

    def check(self) -> None:
        """Raises UsageError. Of a recipe that is settled."""
        assert self.epochs is not None
        assert self.layer_decay is not None
        if self.epochs <= 0 or not 0 < self.layer_decay <= 1 or min(self.mixup, self.cutmix) < 0:
            raise UsageError(
                "--epochs is above 0, --layer-decay above 0 and at most 1, --mixup and --cutmix at least 0."
            )
        for name in ("drop_path", "smoothing", "mix_prob", "switch_prob", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')} is a probability, not {getattr(self, name):g}.")
        if self.drop_path == 1:
            raise UsageError("--drop-path 1 would leave the last block out for good.")
        if not 0 <= self.magnitude <= 10:
            raise UsageError(f"--magnitude is from 0 to 10, not {self.magnitude:g}.")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UsageError(f"--area wants two shares of the image, the smaller first, not {self.area}.")
        if self.mixes and self.batch % 2:
            raise UsageError(
                f"--batch {self.batch} is odd, and mixup and CutMix pair images. --mixup 0 --cutmix 0 do not."
            )
        self.optim()

    @property
    def mixes(self) -> bool:
        return max(self.mixup, self.cutmix) > 0 and self.mix_prob > 0


# From which width on: MAE's FINETUNE.md.
SIZES = {
    0: {"epochs": 100.0, "base_lr": 5e-4, "layer_decay": 0.65, "drop_path": 0.1},
    1024: {"epochs": 50.0, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2},
    1280: {"epochs": 50.0, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.3},
}


@dataclass(frozen=True, kw_only=True)
class Finetune(Recipe):
    """Train a run's encoder and a new head on labels, end to end, by MAE's recipe. The same command resumes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `daae pretrain`."""
    out: Path
    """Folder of the fine-tuning; an unfinished one in it is resumed."""
    data: Path | None = None
    """Store with labels to train on; default: the run's own."""
    tests: tuple[Path, ...] = ()
    """Stores to score on; default: the run's own, or else a fifth of --data held out."""
    fold: int = 0
    """Without tests: which fifth of --data is held out, from 0 to 4."""
    overlap: bool = False
    """Tests may hold pictures that are trained on with their labels, as the run's own may where that was declared."""
    label: str | None = None
    """Label column; default: the run's own, or the first."""
    checkpoint: str | None = None
    """Step of the run's checkpoint, or its folder; default: the newest that verifies."""
    loader: Literal["auto", "ffcv", "shards", "dali", "resident"] = "auto"
    """What reads and decodes."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: str = "auto"
    workers: int = 0
    """Decoding threads; 0 chooses."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    limit_steps: int | None = None
    """Stop with a checkpoint after this many steps of this call; the schedule stays that of the whole run."""
    overwrite: bool = False
    """Delete what --out holds and start anew."""
    quiet: bool = False
    """No progress; errors are still said."""
    json: bool = False
    """Print the result as one JSON object."""

    def recipe(self) -> Recipe:
        return Recipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)})


def main(argv: list[str]) -> int:
    flags = parse(Finetune, argv, prog="daae finetune", aliases=ALIASES)
    for name, lowest in (("workers", 0), ("log_every", 1), ("checkpoint_minutes", 0)):
        if getattr(flags, name) < lowest:
            raise UsageError(f"--{name.replace('_', '-')} is at least {lowest}, not {getattr(flags, name)}.")
    from train.evaluation.tuner import finetune

    result = finetune(flags)
    print(json.dumps(result) if flags.json else result["sentence"])
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
