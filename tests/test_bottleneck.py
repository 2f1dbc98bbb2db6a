"""The verdict: on figures made by hand, and on stages that take their time in truth."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pipeline.shard_loader
from pipeline.decoder import CHANGED
from pipeline.errors import DataError, StalledError
from pipeline.loader import Loader
from tests.conftest import PYTHON, needs_compiler
from tests.images import make_folder
from tests.slow_disk import slow_disk
from tools import convert
from tools.profile import Profile, profile
from tools.profiling import stages
from tools.profiling.bottleneck import Limit, Measured, limit, verdict
from train.timing import Sample, Spread, Stage, summarise


def stage(rate: float, cpu_ms: float = 1.0, wait: float = 0.0) -> Stage:
    return Stage(Spread(rate, 0.97 * rate, 1.02 * rate), cpu_ms, wait)


def measured(loader: Stage, step: Stage, both: Stage, **facts) -> Measured:
    """A machine with two cores and a store of pictures as large as the views, unless the facts say otherwise."""
    backend = facts.setdefault("backend", "ffcv")
    others = facts.pop("others", {})
    defaults = {
        "preset": "mae-tiny", "device": "cpu", "device_name": "a CPU", "precision": "bf16", "can_bf16": True,
        "compiled": False, "batch": 128, "run_batch": 128, "workers": 1, "cores": 2, "threads": 2, "images": 10_000,
        "stored_side": 64.0, "view_side": 64, "parts": {}, "views": stage(50_000, 0.02),
    }  # fmt: skip
    return Measured(
        **(defaults | facts),
        step=step,
        loader={backend: loader} | {name: each[0] for name, each in others.items()},
        both={backend: both} | {name: each[1] for name, each in others.items()},
    )


GPU = {"device": "cuda:0", "workers": 8, "cores": 8, "threads": 8, "view_side": 224, "stored_side": 390.0}


def test_a_step_far_slower_than_the_loader():
    found = measured(stage(2300, 0.4), stage(118, 16), stage(117, 16.4, 0.01))
    assert verdict(found) == (
        "The step limits this run: 118 images/s against the loader's 2,300 (data-wait 1 %). "
        "A faster loader gains nothing; use a GPU or a smaller --model.depth or --model.width "
        "(at most 19x, then the loader limits)."
    )
    # fp32 where the device could do bf16 is a setting to change; where it could not, it is not.
    assert "use a GPU, --precision bf16 or a smaller" in verdict(replace(found, precision="fp32"))
    assert "bf16" not in verdict(replace(found, precision="fp32", can_bf16=False))
    assert "all 2 cores (torch has 1 of them: see OMP_NUM_THREADS), a GPU or" in verdict(replace(found, threads=1))


def test_a_step_on_a_gpu_wants_compiling_first():
    found = measured(stage(6000, 1.0), stage(2300, 0.3), stage(2290, 1.3, 0.0), **GPU)
    assert "use --compile or a smaller" in verdict(found)
    assert "(at most 2.6x, then" in verdict(found)
    assert "--compile" not in verdict(replace(found, compiled=True))
    assert "a GPU" not in verdict(found)


def test_a_decoder_with_idle_cores_wants_workers():
    found = measured(stage(1000, 1.0), stage(4000, 0.3), stage(980, 1.3, 0.75), **(GPU | {"workers": 1}))
    assert verdict(found) == (
        "The loader limits this run: 1,000 images/s against the step's 4,000 (data-wait 75 %). "
        "Raise --workers from 1 to 8 (up to 4.1x)."
    )


def test_workers_promise_no_more_than_the_cores_can_do():
    # 2 cores have 2000 ms a second: 0.9 ms of loading and 0.6 of training allow 1,333 images/s, not twice 1,000.
    found = measured(stage(1000, 0.9), stage(3300, 0.6), stage(900, 1.5, 0.6))
    assert "Raise --workers from 1 to 2 (up to 1.5x)." in verdict(found)


def test_pictures_stored_larger_than_needed_want_a_smaller_side():
    few_cores = GPU | {"workers": 2, "cores": 2, "stored_side": 500.0}
    found = measured(stage(1100, 1.75), stage(4000, 0.3), stage(1080, 2.0, 0.7), **few_cores)
    assert verdict(found).endswith("Convert again with --max-side 400 (up to 1.6x).")
    assert "--max-side" not in verdict(replace(found, stored_side=400.0))


def test_the_two_best_remedies_come_largest_first():
    found = measured(
        stage(1000, 3.5), stage(9000, 0.3), stage(1000, 3.8, 0.9), **(GPU | {"workers": 4, "stored_side": 1000.0}),
        others={"dali": (stage(1500, 1.0), stage(1500, 1.3, 0.8))},
    )  # fmt: skip
    # Of three (6.2x by size, 2x by workers, 1.5x by DALI) the third is left out.
    ending = "Convert again with --max-side 400 (up to 6.2x), or raise --workers from 4 to 8 (up to 2.0x)."
    assert verdict(found).endswith(ending)


def test_a_faster_backend_is_named_with_its_measured_gain():
    found = measured(
        stage(1000, 8.0), stage(9000, 0.3), stage(990, 8.3, 0.9), **(GPU | {"stored_side": 300.0}),
        others={"dali": (stage(1900, 1.0), stage(1890, 1.3, 0.8))},
    )  # fmt: skip
    assert verdict(found).endswith("Pass --loader dali (up to 1.9x).")


def test_a_loader_that_mostly_reads_wants_another_disk():
    parts = {"storage": stage(320), "decode": stage(9000), "cut": stage(9000)}
    found = measured(stage(300, 1.0), stage(3000, 0.3), stage(298, 1.3, 0.9), **GPU, parts=parts)
    assert limit(found) == "storage"
    words = verdict(found)
    assert "Reading from storage takes 94 % of its time. Put the store on a local disk or into memory" in words
    assert words.endswith("(up to 10x).")  # what the step can take
    # DALI's decoding cannot be looked into, but that its reading is slow can be told all the same.
    of_dali = {"backend": "dali", "parts": {"storage": stage(320)}}
    assert limit(measured(stage(300, 1.0), stage(3000, 0.3), stage(298, 1.3, 0.9), **GPU, **of_dali)) == "storage"
    of_dali["parts"] = {"storage": stage(5000)}
    assert limit(measured(stage(300, 1.0), stage(3000, 0.3), stage(298, 1.3, 0.9), **GPU, **of_dali)) == "loader"


@pytest.mark.parametrize(
    ("part", "words"), [("decode", "Decoding takes 70 %"), ("cut", "Cutting the views takes 70 %")]
)
def test_the_slowest_part_of_the_loader_is_named_with_what_makes_it_faster(part: str, words: str):
    parts = {"storage": stage(20_000), "decode": stage(6000), "cut": stage(6000)} | {part: stage(1000 / 0.7)}
    found = measured(stage(1000, 1.0), stage(4000, 0.3), stage(980, 1.3, 0.7), **(GPU | {"workers": 1}), parts=parts)
    assert limit(found) == part
    assert f"{words} of its time. Raise --workers from 1 to 8 (up to 4.1x)." in verdict(found)


def test_a_slow_copy_to_the_gpu_is_told_from_slow_decoding():
    parts = {"storage": stage(50_000), "decode": stage(9000), "cut": stage(20_000), "copy": stage(3100)}
    large = GPU | {"stored_side": 500.0}
    found = measured(stage(3000, 2.0), stage(9000, 0.3), stage(2950, 2.3, 0.7), **large, parts=parts)
    assert limit(found) == "copy"
    # What is copied are crops: how large the pictures are stored changes nothing.
    words = verdict(found)
    assert "It is the copy to the GPU, which manages 3,100 images/s alone. Use --loader dali," in words
    assert words.endswith("or a smaller --model.side.")
    # It runs beside the decoding of the next batch: as long as it is shorter than all of that it costs nothing.
    parts["copy"] = stage(30_000)
    assert limit(replace(found, parts=parts)) == "decode"


def test_nothing_left_to_change_says_more_cores():
    found = measured(stage(1000, 8.0), stage(3000, 0.3), stage(990, 8.3, 0.7), **(GPU | {"stored_side": 224.0}))
    assert verdict(found).endswith("More cores gain up to 3.0x.")


@pytest.mark.parametrize("rate", [2150.0, 2300.0, 2500.0])
def test_equal_rates_are_balanced(rate: float):
    found = measured(stage(rate, 0.4), stage(2300, 0.3), stage(2200, 0.7, 0.1), **GPU)
    words = verdict(found)
    assert words.startswith("Balanced: loader and step are within 10 %")
    assert words.endswith("Speeding up only one of them gains nothing.")


@pytest.mark.parametrize(("rate", "who"), [(2000.0, "The loader"), (2600.0, "The step")])
def test_beyond_ten_percent_one_of_them_limits(rate: float, who: str):
    assert verdict(measured(stage(rate, 4.0), stage(2300, 0.3), stage(2000, 4.3), **GPU)).startswith(f"{who} limits")


def test_on_a_cpu_a_faster_loader_can_still_cost_the_step():
    found = measured(
        stage(900, 2.0), stage(400, 5.0), stage(285, 7.0, 0.05),
        others={"dali": (stage(1200, 0.8), stage(340, 5.8, 0.03))},
    )  # fmt: skip
    assert verdict(found) == (
        "The step limits this run, and the loader takes cores from it: 285 images/s together, 400 without loading "
        "(data-wait 5 %). Pass --loader dali (up to 1.2x)."
    )
    alone = replace(found, loader={"ffcv": found.loader["ffcv"]}, both={"ffcv": found.both["ffcv"]})
    assert verdict(alone).endswith("Use a GPU, or more cores.")
    shared = measured(stage(410, 5.0), stage(400, 5.0), stage(200, 10.0, 0.4))
    assert "since they share 2 cores" in verdict(shared)


def test_pillow_in_the_decoders_place_is_a_thing_to_change():
    facts = GPU | {"workers": 1, "no_decoder": "no C compiler (cc, gcc or clang)"}
    found = measured(stage(1000, 1.0), stage(4000, 0.3), stage(980, 1.3, 0.75), **facts)
    ending = "Pillow decodes here: install libjpeg's headers (libjpeg-dev) and run `make setup`, which brings a decoder"
    assert verdict(found).endswith(f"Raise --workers from 1 to 8 (up to 4.1x). {ending} several times as fast.")
    assert "Pillow" not in verdict(replace(found, no_decoder=None))
    of_dali = replace(found, backend="dali", loader={"dali": stage(1000, 1.0)}, both={"dali": stage(980, 1.3, 0.75)})
    assert "Pillow" not in verdict(of_dali)
    beside = measured(stage(900, 2.0), stage(400, 5.0), stage(285, 7.0, 0.05), no_decoder="no C compiler")
    assert "run `make setup`" in verdict(beside)
    assert "Pillow" not in verdict(measured(stage(2300, 0.4), stage(118, 16), stage(117, 16.4), no_decoder="none"))


def test_a_round_that_was_disturbed_does_not_contradict_another():
    """Together they cannot be faster than either is alone: the higher rate stands, whichever round it is from."""
    found = measured(stage(1569, 0.6), stage(7, 138.0), stage(42, 22.9, 0.01), other_cores=1.1)
    assert verdict(found).startswith("The step limits this run: 42 images/s against the loader's 1,569")
    found = measured(stage(300, 3.0), stage(2000, 0.3), stage(500, 3.3, 0.8), **GPU)
    assert verdict(found).startswith("The loader limits this run: 500 images/s against the step's 2,000")


def test_an_epoch_counts_whole_batches_of_the_run():
    found = measured(stage(2300), stage(100), stage(100.0), images=1000, batch=64, run_batch=300)
    assert found.seconds_per_epoch == pytest.approx(9.0)


def test_a_stage_is_the_median_of_its_rounds():
    rounds = [Sample(100, 1.0, 0.5, 0.0), Sample(100, 2.0, 0.6, 1.0), Sample(300, 1.0, 0.3, 0.1)]
    stage = summarise(rounds)
    assert (stage.images_per_second.min, stage.rate, stage.images_per_second.max) == (50, 100, 300)
    assert stage.cpu_ms_per_image == pytest.approx(5.0)
    assert stage.data_wait == pytest.approx(0.1)
    assert stage.cores == pytest.approx(0.5)


# --- stages that take their time --------------------------------------------------------------------------------------


class StagedDecoder:
    """Takes as long as it is told, and leaves the pictures as they were."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def decode(self, samples, where, outs) -> np.ndarray:
        each = self.seconds["storage"] if (samples["file"] >= 0).any() else 0.0
        each += self.seconds["decode"] if where else 0.0
        each += self.seconds["cut"] if any(out.shape[1] for out in outs) else 0.0
        time.sleep(len(samples) * each)
        return np.empty(0, np.int64)

    def doing(self) -> tuple[str, None]:
        return "sleeping", None

    def close(self) -> None: ...


def draw(kind: Limit, seed: int) -> dict[str, float]:
    """Seconds of an image in each stage, of which `kind` is the one that a run waits for."""
    dice = random.Random(f"{kind} {seed}")
    # Where two have to come out equal the stages are longer, so that what lies between them counts for nothing.
    low, high = (2e-3, 5e-3) if kind == "balanced" else (0.6e-3, 2e-3)
    seconds = {part: dice.uniform(low, high) for part in ("storage", "decode", "cut")}
    if kind in seconds:
        seconds[kind] = dice.uniform(1.5, 4.0) * max(value for part, value in seconds.items() if part != kind)
    seconds["copy"] = sum(seconds.values()) * (dice.uniform(1.5, 3.0) if kind == "copy" else dice.uniform(0.05, 0.3))
    loader = sum(seconds.values())
    share = {"step": dice.uniform(1.3, 4.0), "balanced": dice.uniform(0.98, 1.05)}.get(kind, dice.uniform(0.2, 0.8))
    return seconds | {"step": share * loader}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("kind", ["storage", "decode", "cut", "copy", "step", "balanced"])
def test_the_stage_that_is_slow_is_named(kind: Limit, seed: int, store_path: Path, monkeypatch):
    seconds = draw(kind, seed)

    def send(images, device):
        time.sleep(seconds["copy"] * len(next(iter(images.values()))))
        return images

    monkeypatch.setattr(pipeline.shard_loader, "open_decoder", lambda workers: StagedDecoder(seconds))
    monkeypatch.setattr(pipeline.shard_loader, "send", send)
    monkeypatch.setattr(stages, "send", send)
    monkeypatch.setattr(stages, "COPIES_TO", ("cpu",))
    monkeypatch.setattr(stages, "LIMIT_SECONDS", 0.01)
    monkeypatch.setattr(stages.Machine, "step", lambda self, batch: time.sleep(seconds["step"] * len(batch.id)))
    found = profile(Profile(data=store_path, loader="shards", batch=8, seconds=0.4, device="cpu", quiet=True))
    assert limit(found) == kind, (seconds, found)
    for part, stage_found in found.parts.items():
        if part != "cut":  # a difference of two timings
            assert 0.95 * seconds[part] < stage_found.seconds_per_image


def test_no_two_timings_read_the_same_epoch(store_path: Path, monkeypatch):
    """What the first has read from a slow disk the second would find in memory."""
    begun: list[int] = []
    epoch = Loader.epoch

    def recorded(self: Loader, number: int, start: int = 0):
        begun.append(number)
        return epoch(self, number, start)

    monkeypatch.setattr(Loader, "epoch", recorded)
    monkeypatch.setattr(stages, "LIMIT_SECONDS", 0.01)
    profile(Profile(data=store_path, loader="shards", batch=48, seconds=0.2, device="cpu", quiet=True))
    timed = [number for number in begun if number >= 10_000]  # those before warm up
    assert len(timed) == len(set(timed)) >= 2


class Refusing(StagedDecoder):
    """Makes the batches of the loader; where it only reads it finds other bytes."""

    def decode(self, samples, where, outs) -> np.ndarray:
        if where:
            return super().decode(samples, where, outs)
        samples["status"] = CHANGED
        return np.arange(len(samples))


def test_what_cannot_be_read_is_not_timed(store_path: Path, monkeypatch):
    seconds = dict.fromkeys(("storage", "decode", "cut"), 0.0)
    monkeypatch.setattr(pipeline.shard_loader, "open_decoder", lambda workers: Refusing(seconds))
    monkeypatch.setattr(stages.Machine, "step", lambda self, batch: time.sleep(0.002))
    with pytest.raises(DataError, match=r"sample \d+ of .*its bytes are not those that were converted"):
        profile(Profile(data=store_path, loader="shards", batch=8, seconds=0.2, device="cpu", quiet=True))


def test_a_read_that_hangs_is_given_up_and_a_slow_one_is_not():
    free = threading.Event()
    with pytest.raises(StalledError, match="nothing was read for 0 s while a tape was timed"):
        stages.watched(lambda got_on: free.wait(60), 0.4, "a tape was timed")
    free.set()

    def slowly(got_on: Callable[[], None]) -> int:
        for _ in range(6):
            time.sleep(0.5)
            got_on()
        return 7

    assert stages.watched(slowly, 2.0, "a tape was timed") == 7
    with pytest.raises(ZeroDivisionError):
        stages.watched(lambda got_on: 1 // 0, 2.0, "a tape was timed")


def real_profile(data: Path, *flags: str, env: dict[str, str] | None = None) -> dict:
    command = [PYTHON, "-m", "tools.profile", "--data", str(data), "--loader", "shards", "--seconds", "0.5"]
    command += ["--device", "cpu", "--json"]
    done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def small_model(tmp_path: Path) -> list[str]:
    """Flags for a step of well under a millisecond an image."""
    shape = "{side: 32, width: 32, depth: 1, heads: 2, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}"
    (tmp_path / "small.yaml").write_text(f"preset: mae-tiny\nmodel: {shape}\n")
    return ["--config", str(tmp_path / "small.yaml"), "--batch", "16"]


@pytest.mark.slow
@needs_compiler
def test_a_disk_that_is_slow_in_truth(unlabelled_path: Path, small_model: list[str]):
    found = real_profile(unlabelled_path, *small_model, env=slow_disk(milliseconds=20))
    assert found["limit"] == "storage"
    assert found["limits"]["read_cached"] < 130


@pytest.mark.slow
@needs_compiler
def test_pictures_that_are_large_in_truth(tmp_path: Path, small_model: list[str]):
    make_folder(tmp_path / "in", 16, 1200)
    words = [str(tmp_path / "in"), str(tmp_path / "store"), "--backends", "dali", "--max-side", "65535", "--quiet"]
    assert convert.main(words) == 0
    found = real_profile(tmp_path / "store", *small_model)
    assert found["limit"] == "decode"
    assert "onvert again with --max-side" in found["verdict"]


@pytest.mark.slow
def test_a_model_that_is_slow_in_truth(unlabelled_path: Path):
    assert real_profile(unlabelled_path, "--batch", "8")["limit"] == "step"
