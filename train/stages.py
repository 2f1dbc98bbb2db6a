"""A run in parts: smaller pictures or batches at its beginning, decided before the first step.

Source: progressive resizing as in fastai's and FFCV's ImageNet recipes; batch ramps after Smith et al. 2018. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from train.config import Run

SIZES = ("side", "batch")


@dataclass(frozen=True)
class Stage:
    """Steps that are alike."""

    first: int  # its first step
    last: int  # the step behind its last
    run: Run  # as it is meanwhile: model.side, optim.batch and optim.lr are the stage's
    epoch: int  # number of its first epoch: no two stages share an order or a crop
    batches: int  # steps an epoch

    def place(self, step: int) -> tuple[int, int]:
        """Epoch, and how many of its batches come before this step."""
        epoch, start = divmod(step - self.first, self.batches)
        return self.epoch + epoch, start

    def epochs(self, step: int) -> float:
        return self.epoch + (step - self.first) / self.batches


def parse_stages(text: str) -> list[tuple[float, dict[str, int]]]:
    """ "0.5:side=160 0.8:side=192,batch=2048" -> up to which share of the steps, and what is other than configured.

    Raises UsageError.
    """
    found: list[tuple[float, dict[str, int]]] = []
    for word in text.split():
        try:
            until, _, sizes = word.partition(":")
            pairs = [pair.split("=") for pair in sizes.split(",")]
            changed = {name: int(value) for name, value in pairs}
            if not set(changed) <= set(SIZES) or not (found[-1][0] if found else 0) < float(until) <= 1:
                raise ValueError
            if min(changed.values()) < 1:
                raise ValueError
        except ValueError:
            raise UsageError(
                f"--optim.stages {word}: SHARE:side=PIXELS,batch=IMAGES, shares of the steps growing up to 1, "
                "for example 0.7:side=160."
            ) from None
        found.append((float(until), changed))
    return found


def parts_of(run: Run) -> list[tuple[float, Run]]:
    """Share of the steps of every part, and the run as it is meanwhile. Without stages, one part."""
    if not run.optim.stages:
        return [(1.0, run)]
    parts, before = [], 0.0
    for until, changed in parse_stages(run.optim.stages):
        parts.append((until - before, _meanwhile(run, **changed)))
        before = until
    return [*parts, (1 - before, _meanwhile(run))] if before < 1 else parts


def _meanwhile(run: Run, side: int | None = None, batch: int | None = None) -> Run:
    """The rate follows the batch, as the rule lr = blr B / 256 has it."""
    optim, batch = run.optim, batch or run.optim.batch
    return replace(
        run, model=replace(run.model, side=side or run.model.side),
        optim=replace(optim, stages="", batch=batch, lr=optim.peak_lr() * batch / optim.batch),
    )  # fmt: skip


def lay_out(run: Run, steps: int, images: int) -> list[Stage]:
    """The stages of a run of so many steps over a store of so many images; those without a step are left out."""
    stages, share, first, epoch = [], 0.0, 0, 0
    for part, meanwhile in parts_of(run):
        share += part
        last, batches = round(share * steps), images // meanwhile.optim.batch
        if last > first:
            stages.append(Stage(first, last, meanwhile, epoch, batches))
            epoch += -(-(last - first) // batches)
            first = last
    return stages


def images_per_step(run: Run) -> float:
    """Mean over the steps."""
    return sum(share * part.optim.batch for share, part in parts_of(run))


def steps_of(run: Run, epochs: float, images: int) -> int:
    """How many steps so many passes over the images come to; what is left over of a pass is dropped."""
    if not run.optim.stages:
        return max(1, int(epochs * (images // run.optim.batch)))
    return max(1, int(epochs * images / images_per_step(run)))


def macs_per_image(run: Run) -> float:
    """Multiply-accumulates of an image in trained-forward units, mean over the images of the run."""
    parts = [(share * part.optim.batch, run.method.macs(part.model)) for share, part in parts_of(run)]
    return sum(weight * macs for weight, macs in parts) / images_per_step(run)
