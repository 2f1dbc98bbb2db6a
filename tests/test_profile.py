"""The verdict on staged numbers, and a short profile of the real thing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import ResourceError
from pipeline.store import Store
from tools import profile
from tools.profile import Machine, Measured, Sample, Spread, Stage, fit_batch, summarise, verdict
from train.command import run
from train.presets import open_preset


def stage(rate: float, cpu_ms: float = 1.0, wait: float = 0.0) -> Stage:
    return Stage(Spread(rate, 0.97 * rate, 1.02 * rate), cpu_ms, wait)


def measured(loader: Stage, step: Stage, both: Stage, **facts) -> Measured:
    """A machine with two cores and a store of pictures as large as the views, unless the facts say otherwise."""
    backend = facts.setdefault("backend", "ffcv")
    others = facts.pop("others", {})
    defaults = {
        "preset": "mae-tiny", "device": "cpu", "device_name": "a CPU", "precision": "bf16", "can_bf16": True,
        "compiled": False, "batch": 128, "run_batch": 128, "workers": 1, "cores": 2, "threads": 2, "images": 10_000,
        "stored_side": 64.0, "view_side": 64,
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


def test_threads_that_wait_mean_the_disk():
    # 8 workers, 300 images/s at 1 ms: 0.3 of 8 cores busy.
    found = measured(stage(300, 1.0), stage(3000, 0.3), stage(298, 1.3, 0.9), **GPU)
    words = verdict(found)
    assert "Its threads wait 96 % of the time for the disk. Put the store on a local disk" in words
    assert words.endswith("(up to 10x).")
    # Nor are they idle for want of data where other processes have the cores.
    assert "disk" not in verdict(replace(found, other_cores=5.0))
    # DALI decodes on the GPU: idle threads of the CPU say nothing there.
    assert "disk" not in verdict(
        replace(found, backend="dali", loader={"dali": found.loader["ffcv"]}, both={"dali": found.both["ffcv"]})
    )


def test_a_slow_copy_to_the_gpu_is_told_from_slow_decoding():
    found = measured(stage(3000, 2.0), stage(9000, 0.3), stage(2950, 2.3, 0.7), **(GPU | {"stored_side": 500.0}))
    found = replace(found, copy_images_per_second=3100.0)
    assert "It is the copy to the GPU, which manages 3,100 images/s alone. Convert again with --max-side" in verdict(
        found
    )
    assert "copy" not in verdict(replace(found, copy_images_per_second=30_000.0))


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


def machine(batch: int) -> Machine:
    """A real one, with a network so small that a step takes milliseconds."""
    wish = open_preset("daae-tiny")
    shape = replace(wish.model, side=32, width=32, depth=1, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
    optim = replace(wish.optim, batch=batch)
    return Machine(replace(wish, model=shape, optim=optim, precision="fp32"), torch.device("cpu"))


def test_the_batch_is_the_runs_unless_a_step_takes_too_long():
    assert fit_batch(machine(48), limit=60.0) == 48
    size = fit_batch(machine(1_000_000), limit=0.05)
    assert 16 <= size < 100_000  # a million would take many seconds


def test_the_batch_is_halved_until_it_fits_the_memory():
    class Small(Machine):
        def step(self, batch):
            if len(batch.id) > 100:
                raise ResourceError("a step of so many images does not fit")
            super().step(batch)

    small = Small(machine(4096).run, torch.device("cpu"))
    size = fit_batch(small, limit=60.0)
    assert 50 < size <= 100


def test_a_timed_step_trains_nothing():
    one = machine(16)
    before = {name: value.clone() for name, value in one.network.named_parameters()}
    batch = one.random_batch(16)
    sample = one.time(lambda: batch, one.step, 0.05)
    assert sample.images % 16 == 0
    assert sample.seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in one.network.named_parameters())


def test_a_real_profile_as_json(unlabelled_path: Path):
    command = [
        sys.executable,
        "-m",
        "tools.profile",
        "--data",
        str(unlabelled_path),
        "--loader",
        "dali",
        "--batch",
        "8",
    ]
    done = subprocess.run([*command, "--seconds", "0.6", "--json"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backend"] == "dali"
    assert found["batch"] == found["run_batch"] == 8
    assert found["images"] == 24
    assert list(found["loader"]) == list(found["both"]) == ["dali"]
    assert set(found["warm_up_seconds"]) == {"dali", "step"}
    rows = [found["loader"]["dali"], found["step"], found["both"]["dali"]]
    for row in rows:
        spread = row["images_per_second"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert row["cpu_ms_per_image"] > 0
        assert 0 <= row["data_wait"] <= 1
        # Images/s times CPU seconds an image is how many cores were busy: never more than there are.
        assert spread["min"] * row["cpu_ms_per_image"] / 1000 <= found["cores"] * 1.1
    assert found["images_per_second"] == rows[2]["images_per_second"]["median"]
    assert found["seconds_per_epoch"] == pytest.approx(24 / found["images_per_second"])
    assert found["memory_gb"] > 0.1
    assert found["verdict"] == verdict(from_json(found))


def from_json(found: dict) -> Measured:
    def stage_of(row: dict) -> Stage:
        return Stage(Spread(**row["images_per_second"]), row["cpu_ms_per_image"], row["data_wait"])

    values = {field.name: found[field.name] for field in dataclasses.fields(Measured)}
    for name in ("loader", "both"):
        values[name] = {backend: stage_of(row) for backend, row in found[name].items()}
    values["step"] = stage_of(found["step"])
    return Measured(**values)


def test_the_table_ends_in_the_verdict(
    unlabelled_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    flags = [
        "--data",
        str(unlabelled_path),
        "--loader",
        "dali",
        "--batch",
        "8",
        "--seconds",
        "0.3",
        "--preset",
        "daae-tiny",
    ]
    assert profile.main(flags) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    # The command is to be copied whole, and holds a path of any length.
    assert all(len(line) <= 80 for line in lines if " --data " not in line)
    assert lines[0].startswith("daae-tiny, batch 8")
    last = " ".join(text.rstrip().rsplit("\n\n", 1)[1].split())
    assert last.startswith(("The step limits", "The loader limits", "Balanced"))
    assert last.endswith(".")
    assert "--images-per-second" in text


def test_a_store_without_the_backend_is_refused(unlabelled_path: Path, capsys: pytest.CaptureFixture):
    assert Store.open(unlabelled_path).beton is None
    words = ["--data", str(unlabelled_path), "--loader", "ffcv", "--batch", "8", "--seconds", "0.2"]
    assert run(profile.main, words) == 2
    assert "was written without ffcv. Convert again with --backends both." in capsys.readouterr().err
    assert profile.usable_backends(Store.open(unlabelled_path)) == ["shards", "dali"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--preset", "mae-tinny"], 2, "Did you mean mae-tiny?"),
        (["--seconds", "0"], 2, "--seconds is from 0.1"),
        (["--workers", "-1"], 2, "--workers is at least 0"),
        (["--batch", "0"], 2, "--batch is at least 1"),
        (["--batch", "25", "--loader", "dali"], 3, "fewer than one batch of 25"),
        (["--device", "cuda:99"], 5, "--device cuda:99"),
        (["--device", "tpu"], 2, "is no device"),
    ],
)
def test_wrong_input_is_one_sentence(
    unlabelled_path: Path, flags: list[str], code: int, words: str, capsys: pytest.CaptureFixture
):
    assert run(profile.main, ["--data", str(unlabelled_path), *flags]) == code
    told = capsys.readouterr()
    assert words in told.err
    assert told.err.count("\n") <= 1
    assert told.out == ""


def test_a_config_file_is_profiled_as_the_run_it_describes(unlabelled_path: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("objective: daae\nmodel: {depth: 3}\nspeed: {workers: 2, compile: true}\n")
    flags = profile.Profile(data=unlabelled_path, config=tmp_path / "config.yaml", precision="fp32", batch=4)
    wish = profile.settings(flags)
    assert (wish.objective, wish.model.depth, wish.model.side) == ("daae", 3, 64)
    assert (wish.speed.workers, wish.speed.compile, wish.precision, wish.optim.batch) == (2, True, "fp32", 4)
