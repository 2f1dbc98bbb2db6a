"""What limits a run, judged from what was measured: one sentence with the setting to change and the gain to expect.

An image passes through stages: storage, decoding, cutting the views, the copy to a GPU, then the training step. The
loader's stages up to the copy follow one another in the same threads, so their seconds add up; the copy and the step
run beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from train.timing import Stage

ROUNDS = 5
BALANCED = 0.10  # loader and step this close to one another: neither is the bottleneck
FREE_RIDE = 0.85  # together at least this share of the step alone: the loader costs the step nothing to speak of
OURS = ("ffcv", "shards")  # loaders that decode by our decoder, or by Pillow in its place
Part = Literal["storage", "decode", "cut", "copy"]
Limit = Literal["balanced", "storage", "decode", "cut", "copy", "loader", "step"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a profile finds: enough for `verdict` to judge by."""

    preset: str
    device: str
    device_name: str
    precision: str
    can_bf16: bool  # the device has units for it
    compiled: bool
    batch: int  # images per timed step
    run_batch: int  # and per step of the run
    workers: int
    cores: float  # that this process may use
    threads: int  # of torch
    images: int  # in the store
    stored_side: float  # mean of the longer sides in it, pixels
    view_side: int  # of the largest view, pixels
    backend: str  # the loader that the run would take; of those in `loader` and `both`
    parts: dict[Part, Stage]  # of that loader, each alone; those that it has
    views: Stage  # colour, normalisation, patches, masks, on the device: a part of the step
    loader: dict[str, Stage]
    step: Stage
    both: dict[str, Stage]
    limits: dict[str, float] = field(default_factory=dict)  # of the machine, see stages.LIMITS
    memory_gb: float = 0.0  # peak, of the GPU or of this process
    other_cores: float = 0.0  # taken by other processes while the machine had none to spare
    warm_up_seconds: dict[str, float] = field(default_factory=dict)
    rounds: int = ROUNDS
    no_decoder: str | None = None  # why Pillow decodes where our decoder would

    @property
    def images_per_second(self) -> float:
        """What a run may reckon with."""
        return self.both[self.backend].rate

    @property
    def loader_rate(self) -> float:
        """Images/s of the loader alone: what it reaches beside the step it reaches alone too, whatever a round says."""
        return max(self.loader[self.backend].rate, self.images_per_second)

    @property
    def step_rate(self) -> float:
        """Images/s of the step alone. Beside other busy processes a round of it alone may even be the slower one."""
        return max(self.step.rate, self.images_per_second)

    @property
    def seconds_per_epoch(self) -> float:
        whole = self.images // self.run_batch * self.run_batch
        return (whole or self.images) / self.images_per_second

    def share(self, stage: Stage) -> float:
        """Of the time that an image takes in a run; stages that run beside one another sum to more than 1."""
        return stage.seconds_per_image * self.images_per_second


def limit(measured: Measured) -> Limit:
    """Which stage a run waits for."""
    loader, step = measured.loader_rate, measured.step_rate
    if max(loader, step) <= (1 + BALANCED) * min(loader, step):
        return "balanced"
    return "step" if step < loader else _slowest_part(measured)


def _slowest_part(measured: Measured) -> Part | Literal["loader"]:
    """Which part of the loader takes the most of its time; "loader" where its parts are not known."""
    seconds: dict[Part, float] = {name: stage.seconds_per_image for name, stage in measured.parts.items()}
    copy = seconds.pop("copy", 0.0)
    if copy and copy > (sum(seconds.values()) or 0.8 / measured.loader_rate):
        return "copy"
    if not seconds:
        return "loader"
    slowest = max(seconds, key=lambda name: seconds[name])
    # DALI's decoding cannot be looked into: what storage leaves is its own.
    known = seconds[slowest] * measured.loader_rate
    return slowest if len(seconds) > 1 or known > 0.5 else "loader"


def decoder_facts(no_decoder: str | None) -> dict[str, str | None]:
    """What the record of a timing says. no_decoder: why the compiled one is not there (native.why_not)."""
    return {"decoder": "region" if no_decoder is None else "pillow", "no_decoder": no_decoder}


def pillow_note(why: str) -> str:
    return f"Pillow decodes, several times slower than our decoder: {why.rstrip('.')}."


def verdict(measured: Measured) -> str:
    """What limits the run, by how much, and the setting to change with the gain to expect at most."""
    sentence = _verdict(measured)
    if measured.no_decoder is None or measured.backend not in OURS or not _loading_costs(measured):
        return sentence
    return (
        f"{sentence} Pillow decodes here: install libjpeg's headers (libjpeg-dev) and run `make setup`, which brings a "
        "decoder several times as fast."
    )


def _loading_costs(measured: Measured) -> bool:
    """Whether a run waits for the loader, or the loader takes its cores."""
    loader, step, limited = measured.loader_rate, measured.step_rate, limit(measured)
    if limited == "balanced":
        return measured.images_per_second < FREE_RIDE * min(loader, step)
    return limited != "step" or (measured.device == "cpu" and measured.images_per_second < FREE_RIDE * step)


def _verdict(measured: Measured) -> str:
    loader, step, both = measured.loader_rate, measured.step_rate, measured.both[measured.backend]
    wait, limited = f"data-wait {percent(both.data_wait)}", limit(measured)
    if limited == "balanced":
        together = f"{loader:,.0f} and {step:,.0f} images/s, {both.rate:,.0f} together"
        if _loading_costs(measured):
            return (
                f"Balanced: loader and step are within 10 % ({together}, since they share {measured.cores:g} cores). "
                f"{_advice(_cheaper_loading(measured)) or 'More cores help both'}."
            )
        return f"Balanced: loader and step are within 10 % ({together}). Speeding up only one of them gains nothing."
    if limited != "step":
        return (
            f"The loader limits this run: {loader:,.0f} images/s against the step's {step:,.0f} ({wait}). "
            f"{_of_the_loader(measured, limited)}."
        )
    if _loading_costs(measured):
        advice = _advice(_cheaper_loading(measured)) or "Use a GPU, or more cores"
        return (
            f"The step limits this run, and the loader takes cores from it: {both.rate:,.0f} images/s together, "
            f"{step:,.0f} without loading ({wait}). {advice}."
        )
    return (
        f"The step limits this run: {step:,.0f} images/s against the loader's {loader:,.0f} ({wait}). "
        f"A faster loader gains nothing; {_faster_step(measured)} (at most {times(loader / step)}, "
        "then the loader limits)."
    )


def _of_the_loader(measured: Measured, part: Limit) -> str:
    """Which part of it, and what to change."""
    remedies = _cheaper_loading(measured)
    if part == "loader":
        return _advice(remedies) or _more_cores(measured)
    stage = measured.parts[part]  # pyright: ignore[reportArgumentType]
    if part == "copy":
        others = [each for each in remedies if each[1] == "backend"]  # what is copied are crops, whatever is stored
        what = f"It is the copy to the GPU, which manages {stage.rate:,.0f} images/s alone"
        return f"{what}. {_advice(others) or 'Use --loader dali, which decodes on the GPU, or a smaller --model.side'}"
    share = percent(min(1.0, stage.seconds_per_image * measured.loader_rate))
    if part == "storage":
        rest = max(1e-9, 1 / measured.loader_rate - stage.seconds_per_image)
        gain = _together(measured, 1 / rest, measured.loader[measured.backend].cpu_ms_per_image)
        return (
            f"Reading from storage takes {share} of its time. Put the store on a local disk or into memory, such as "
            f"/dev/shm (up to {times(gain / measured.images_per_second)})"
        )
    what = "Decoding" if part == "decode" else "Cutting the views"
    return f"{what} takes {share} of its time. {_advice(remedies) or _more_cores(measured)}"


def _more_cores(measured: Measured) -> str:
    return f"More cores gain up to {times(measured.step_rate / measured.images_per_second)}"


Remedy = tuple[float, str, str]  # gain, kind, words


def _cheaper_loading(measured: Measured) -> list[Remedy]:
    """What would make loading faster or cheaper, with the gain of the whole run, largest first."""
    loader, now = measured.loader[measured.backend], measured.images_per_second
    cpu_ms, found = loader.cpu_ms_per_image, []
    for name, stage in measured.both.items():
        if name != measured.backend:
            found.append((stage.rate / now, "backend", f"pass --loader {name}"))
    workers = int(measured.cores)
    if workers > measured.workers and loader.rate < measured.step_rate:
        faster = _together(measured, loader.rate * workers / measured.workers, cpu_ms)
        found.append((faster / now, "workers", f"raise --workers from {measured.workers} to {workers}"))
    side = math.ceil(1.75 * measured.view_side / 16) * 16  # at 224: 400, which decodes 1.6 times as fast as 500
    if measured.stored_side > 1.1 * side:
        less = (measured.stored_side / side) ** 2  # decoding costs by the pixel
        faster = _together(measured, loader.rate * less, cpu_ms / less)
        found.append((faster / now, "side", f"convert again with --max-side {side}"))
    return sorted((one for one in found if one[0] >= 1 + BALANCED), reverse=True)


def _together(measured: Measured, loader_rate: float, cpu_ms: float) -> float:
    """Images/s of a run whose loader manages `loader_rate` alone at `cpu_ms` an image. On a CPU the two share cores."""
    rate = min(loader_rate, measured.step_rate)
    if measured.device == "cpu":
        step_ms = min(measured.step.cpu_ms_per_image, measured.both[measured.backend].cpu_ms_per_image)
        rate = min(rate, measured.cores * 1000 / (cpu_ms + step_ms))
    return rate


def _advice(remedies: list[Remedy]) -> str:
    """The two best as the beginning of a sentence; nothing where nothing helps."""
    best = [f"{words} (up to {times(gain)})" for gain, _, words in remedies[:2]]
    sentence = ", or ".join(best)
    return sentence[:1].upper() + sentence[1:]


def _faster_step(measured: Measured) -> str:
    ways = []
    if measured.device == "cpu":
        if measured.threads < int(measured.cores):
            ways.append(f"all {int(measured.cores)} cores (torch has {measured.threads} of them: see OMP_NUM_THREADS)")
        ways.append("a GPU")
    elif not measured.compiled:
        ways.append("--compile")
    if measured.precision == "fp32" and measured.can_bf16:
        ways.append("--precision bf16")
    ways.append("a smaller --model.depth or --model.width")
    return f"use {', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else f"use {ways[0]}"


def times(factor: float) -> str:
    return f"{factor:.1f}x" if factor < 9.95 else f"{factor:.0f}x"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
