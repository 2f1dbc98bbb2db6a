"""Whole runs on a small store: records, budgets, exact resume, and every way to be stopped or refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.errors import DataError, NumericsError, ResourceError, UsageError
from pipeline.store import Store
from tests.conftest import COUNT, PYTHON
from tests.images import make_folder
from tools import convert
from train import checkpoint, evaluate, loop
from train.command import run
from train.journal import duration
from train.json_files import read_rows
from train.ledger import ASIDE
from train.loop import evaluation_steps
from train.pretrain import main
from train.schedule import learning_rate, warmup_steps

SIZES = (
    "--model.side 32 --model.patch 8 --model.width 32 --model.depth 2 --model.heads 2 --model.decoder-width 32 "
    "--model.decoder-depth 1 --model.decoder-heads 2 --batch 16 --watch.log-every 2 --quiet --device cpu"
).split()


def flags(preset: str, data: Path, out: Path, *more: str) -> list[str]:
    small = [] if preset.startswith(("mae", "mixedae")) else ["--method.head-hidden", "32", "--method.head-out", "16"]
    small += ["--method.queue", "32"] if preset.startswith(("mocov2", "clsa")) else []
    return ["--preset", preset, "--data", str(data), "--out", str(out), "--loader", "dali", *SIZES, *small, *more]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step:09d}" / "model.safetensors")


def moments(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step:09d}" / "optim.safetensors")


def timeless(rows: list[dict]) -> list[dict]:
    untimed = ("images_per_second", "train_seconds", "data_wait", "spent")
    return [{name: value for name, value in row.items() if name not in untimed} for row in rows]


# COUNT / 16 = 6 steps an epoch: inside, at the edge, in the second. Of the others what they remember: a queue that has
# gone round, momentum copies that move at a rate of the step; noise of another epoch; an exit's own blocks; labels.
@pytest.mark.parametrize(("preset", "stop"), [
    *itertools.product(("mae-tiny", "daae-tiny"), (2, 6, 9)), ("mocov2-tiny", 5), ("byol-tiny", 6),
    ("can-tiny", 7), ("selfcon-tiny", 5), ("clsa-tiny", 7), ("simclr-tiny", 7), ("supcon-tiny", 5), ("mocov3-tiny", 6),
])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(store_path, tmp_path, preset, stop):
    assert main(flags(preset, store_path, tmp_path / "whole", "--steps", "10")) == 0
    command = flags(preset, store_path, tmp_path / "parts", "--steps", "10")
    assert main([*command, "--limit-steps", str(stop)]) == 0
    assert read_json(tmp_path / "parts" / "status.json")["state"] == "paused"
    assert main(command) == 0
    for kind in (weights, moments):
        whole, parts = kind(tmp_path / "whole", 10), kind(tmp_path / "parts", 10)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    one, other = (timeless(read_rows(tmp_path / run / "metrics.jsonl")) for run in ("whole", "parts"))
    shared = {row["step"] for row in one} & {row["step"] for row in other}
    assert {2, 4, 6, 8, 10} <= {row["step"] for row in one}
    assert [row for row in one if row["step"] in shared and row["step"] > stop + 1] == [
        row for row in other if row["step"] in shared and row["step"] > stop + 1
    ]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_folder_holds_what_it_promises(store_path, tmp_path, capsys):
    out = tmp_path / "run"
    tests = ["--tests", str(store_path), "--label", "class"]
    assert main(flags("daae-tiny", store_path, out, "--epochs", "2", "--evaluations", "2", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["state"] == "done"
    assert result["steps"] == result["step"] == 2 * (COUNT // 16)
    assert result["images"] == 12 * 16
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(row["loss"] == pytest.approx(row["reconstruct"] + row["contrast"], rel=1e-5) for row in rows)
    assert rows[-1]["train_seconds"] == pytest.approx(result["train_seconds"], abs=0.01)
    assert all(0 <= row["data_wait"] < 1 and row["images_per_second"] > 0 for row in rows)
    ledger = read_json(out / "ledger.json")
    on_the_clock = sum(seconds for part, seconds in ledger["spent"].items() if part not in ASIDE)
    assert on_the_clock == pytest.approx(ledger["train_seconds"], abs=0.01)
    assert min(ledger["spent"][part] for part in ASIDE) > 0
    assert rows[0]["spent"]["start-up"] == ledger["spent"]["start-up"]
    assert (ledger["images"], ledger["ranks"], ledger["mfu"]) == (192, 1, None)  # too short a run for a ceiling
    scores = read_rows(out / "evaluations.jsonl")
    assert [row["step"] for row in scores] == [6, 12]
    assert all(0 <= row["leading"] <= 1 for row in scores)
    assert set(scores[0]["scores"]) == {"held-out"}
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["loader"], config["precision"] in ("fp32", "bf16"), config["device"]) == ("dali", True, "cpu")
    assert config["budget"] == {"epochs": 2.0, "steps": 12, "seconds": None}
    env = read_json(out / "env.json")
    assert env["versions"]["torch"] == torch.__version__.split("+")[0] or env["versions"]["torch"] == torch.__version__
    assert len(env["data"]) == 16
    from PIL import Image

    with Image.open(out / "media" / "gallery.png") as gallery:
        assert gallery.size == (8 * 36 + 4, 4 * 36 + 4)
    # the saved configuration is fit to be fed back
    again = tmp_path / "again"
    assert main(["--config", str(out / "config.yaml"), "--out", str(again), "--quiet"]) == 0
    whole, other = weights(out, 12), weights(again, 12)
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    # a finished run has nothing to do
    before = (out / "checkpoints").stat().st_mtime_ns
    assert main(flags("daae-tiny", store_path, out, "--epochs", "2")) == 0
    assert (out / "checkpoints").stat().st_mtime_ns == before
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(UsageError, match="is the training set itself"):
        main(flags("daae-tiny", store_path, tmp_path / "b", "--steps", "2", "--evaluations", "1", *tests))


def test_seconds_become_steps_once_and_the_schedule_follows_them(store_path, tmp_path):
    out = tmp_path / "run"
    command = flags("mae-tiny", store_path, out, "--seconds", "3")
    assert main([*command, "--limit-steps", "3"]) == 0
    frozen = yaml.safe_load((out / "config.yaml").read_text())["budget"]
    assert frozen["seconds"] == 3
    assert frozen["steps"] > 3  # fewer, and the schedule would have no shape
    assert main(command) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["budget"] == frozen
    assert read_json(out / "status.json")["step"] == frozen["steps"]
    rows = read_rows(out / "metrics.jsonl")
    assert rows[-1]["lr"] < 0.2 * max(row["lr"] for row in rows)


def test_schedule_is_maes():
    from train.config import Optim

    optim = Optim(batch=4096, base_lr=1.5e-4, warmup_epochs=40, warmup_share=1.0, min_lr=1e-6)
    per_epoch, steps = 312, 312 * 800
    warmup = warmup_steps(optim, steps, per_epoch)
    assert warmup == 40 * 312
    assert learning_rate(optim, 0, steps, warmup) == 0
    assert learning_rate(optim, 20 * 312, steps, warmup) == pytest.approx(1.2e-3)
    assert learning_rate(optim, 40 * 312, steps, warmup) == pytest.approx(2.4e-3)
    assert learning_rate(optim, 420 * 312, steps, warmup) == pytest.approx((2.4e-3 + 1e-6) / 2, rel=1e-6)
    assert learning_rate(optim, steps, steps, warmup) == pytest.approx(1e-6)
    assert warmup_steps(Optim(warmup_share=0.05), 1000, 312) == 50


def test_evaluations_are_spread_and_end_with_the_run():
    assert evaluation_steps(100, 4) == {25, 50, 75, 100}
    assert evaluation_steps(3, 5) >= {1, 2, 3}
    assert evaluation_steps(100, 0) == set()
    assert duration(90061) == "1 d 1 h"
    assert duration(125) == "2 min 5 s"
    assert duration(-5) == "0 s"


def test_accumulation_equals_the_whole_batch(store_path, tmp_path):
    for parts in ("1", "2"):
        more = ("--steps", "3", "--accum_iter", parts, "--lr", "1e-3", "--precision", "fp32")
        main(flags("mae-tiny", store_path, tmp_path / parts, *more))
    one, two = weights(tmp_path / "1", 3), weights(tmp_path / "2", 3)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 2e-5


def test_unlabelled_images_train_without_scores(unlabelled_path, tmp_path):
    out = tmp_path / "run"
    assert main(flags("mae-tiny", unlabelled_path, out, "--steps", "2", "--evaluations", "1")) == 0
    assert not (out / "evaluations.jsonl").exists()
    assert "no evaluation during training" in (out / "train.log").read_text()
    from train.evaluate import main as evaluate

    with pytest.raises(DataError, match="has no labels"):
        evaluate([str(out)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--lr", "5e-4"], r"optim.lr: 0.001 -> 0.0005"),
        (["--seed", "1"], r"seed: 0 -> 1"),
        (["--steps", "9"], r"budget.steps: 4 -> 9"),
        (["--method.mask-ratio", "0.5"], r"method.mask_ratio: 0.75 -> 0.5"),
        (["--no-resume"], r"holds a run already"),
    ],
)
def test_a_folder_of_another_configuration_is_refused(store_path, tmp_path, change, words):
    out = tmp_path / "run"
    assert main(flags("mae-tiny", store_path, out, "--steps", "4", "--limit-steps", "2")) == 0
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(UsageError, match=words):
        main([*flags("mae-tiny", store_path, out, "--steps", "4"), *change])
    assert sorted(path.name for path in out.rglob("*")) == before


def test_a_folder_that_is_no_run_is_left_alone(store_path, tmp_path):
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(UsageError, match="holds files that are no run"):
        main(flags("mae-tiny", store_path, tmp_path, "--steps", "2"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_starts_anew(store_path, tmp_path):
    out = tmp_path / "run"
    main(flags("mae-tiny", store_path, out, "--steps", "4"))
    assert main(flags("mae-tiny", store_path, out, "--steps", "2", "--overwrite")) == 0
    assert [path.name for path in checkpoint.list_steps(out / "checkpoints")] == ["step_000000002"]
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [2]


def test_a_data_set_changed_between_stop_and_resume_is_refused_with_both_counts(tmp_path):
    images, data = tmp_path / "images", tmp_path / "store"
    make_folder(images, 40, 40)
    convert.main([str(images), str(data), "--backends", "dali", "--quiet"])
    command = flags("mae-tiny", data, tmp_path / "run", "--steps", "6")
    assert main([*command, "--limit-steps", "2"]) == 0
    shutil.rmtree(data)
    make_folder(images, 1, 40, first=40)
    convert.main([str(images), str(data), "--backends", "dali", "--quiet"])
    with pytest.raises(DataError, match=r"data set changed since step 2 \(40 -> 41 images"):
        main(command)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (["--batch", "500"], DataError, "fewer than one batch of 500"),
        (["--device", "cuda:9"], ResourceError, "CUDA devices"),
        (["--device", "toaster"], UsageError, "is no device"),
        (["--method.mask-ratio", "0.999"], UsageError, "mask ratio"),
        (["--batch", "0"], UsageError, "--batch 0 and --accum-iter 1: both are at least 1"),
        (["--batch", "16", "--optim.accumulate", "3"], UsageError, "--batch 16 cannot be cut into 3 equal parts"),
        (["--speed.ahead", "0"], UsageError, "--speed.ahead is at least 1"),
        (["--speed.hw-decoder-load", "1.5"], UsageError, "at most 1"),
        (["--watch.log-every", "0"], UsageError, "--watch.log-every is at least 1"),
        (["--data", "/nowhere"], DataError, "is not a folder"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(store_path, tmp_path, more, error, words):
    with pytest.raises(error, match=words):
        main([*flags("mae-tiny", store_path, tmp_path / "run", "--steps", "2"), *more])
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_manifest_ends_with_code_3_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert run(main, flags("mae-tiny", tmp_path / "images", tmp_path / "run", "--steps", "2")) == 3
    assert "no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_nobody_expected_is_code_1_with_the_traceback_in_the_log(store_path, tmp_path, monkeypatch):
    def strange(*_, **__):
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(loop.Stepper, "__call__", strange)
    with pytest.raises(ZeroDivisionError):
        main(flags("mae-tiny", store_path, tmp_path / "run", "--steps", "2"))
    assert read_json(tmp_path / "run" / "status.json")["code"] == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "ZeroDivisionError: seven" in log


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew(store_path, tmp_path):
    out = tmp_path / "run"
    command = flags("mae-tiny", store_path, out, "--steps", "6")
    main([*command, "--limit-steps", "2"])
    (weights,) = (out / "checkpoints").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    before = read_rows(out / "metrics.jsonl")
    with pytest.raises(DataError, match=r"every checkpoint in .* is damaged"):
        main(command)
    assert read_rows(out / "metrics.jsonl") == before


def test_missing_data_and_out():
    with pytest.raises(UsageError, match="--data"):
        main(["--preset", "mae-tiny", "--out", "x"])
    with pytest.raises(UsageError, match="--out"):
        main(["--preset", "mae-tiny", "--data", "x"])


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(store_path, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(NumericsError, match=r"the gradient was not finite for \d+ steps in a row"):
        main(flags("daae-tiny", store_path, out, "--steps", "12", "--lr", "1e30"))
    (capture,) = (out / "debug").iterdir()
    assert len(read_json(capture)["ids"]) == 16
    assert any(each["not_finite"] for each in read_json(capture)["gradients"].values())
    assert checkpoint.list_steps(out / "checkpoints") == []
    assert read_json(out / "status.json")["code"] == 4


def test_flipped_bits_fall_back_to_the_checkpoint_before(store_path, tmp_path, capsys):
    out = tmp_path / "run"
    command = flags("mae-tiny", store_path, out, "--steps", "6")
    main([*command, "--limit-steps", "2"])
    main([*command, "--limit-steps", "2"])
    newest = out / "checkpoints" / "step_000000004" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        main([*command, "--resume", str(newest.parent)])
    assert main([word for word in command if word != "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "step_000000004 is damaged (model.safetensors" in said
    assert "at step 2 of 6" in said


def test_a_damaged_last_checkpoint_is_made_again(store_path, tmp_path):
    out = tmp_path / "run"
    command = flags("mae-tiny", store_path, out, "--steps", "4", "--watch.checkpoint-minutes", "0")
    main(command)
    whole = {name: value.clone() for name, value in weights(out, 4).items()}  # else they are the file, mapped
    last = out / "checkpoints" / "step_000000004" / "model.safetensors"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 4
    last.write_bytes(data)
    main(command)
    assert checkpoint.verify(last.parent).step == 4
    assert all(torch.equal(whole[name], value) for name, value in weights(out, 4).items())


def test_full_disk_keeps_the_old_checkpoint(store_path, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = flags("mae-tiny", store_path, out, "--steps", "6")
    main([*command, "--limit-steps", "2"])

    def no_space(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(ResourceError, match="disk is full"):
        main(command)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000000002"]
    assert checkpoint.verify(out / "checkpoints" / "step_000000002").step == 2


def start(*argv: str) -> subprocess.Popen:
    words = [word for word in argv if word != "--quiet"]
    return subprocess.Popen(
        [PYTHON, "-m", "train.pretrain", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for_rows(out: Path, process: subprocess.Popen, limit: float = 90) -> None:
    until = time.monotonic() + limit
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_signal_saves_and_the_same_command_goes_on(store_path, tmp_path, number):
    out = tmp_path / "run"
    command = flags("mae-tiny", store_path, out, "--steps", "3000")
    process = start(*command)
    wait_for_rows(out, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Run the same command again" in said
    assert "Traceback" not in said
    status = read_json(out / "status.json")
    assert (status["state"], status["code"]) == ("preempted", 75)
    saved = checkpoint.list_steps(out / "checkpoints")
    assert [path.name for path in saved] == [f"step_{status['step']:09d}"]
    assert main([*command, "--limit-steps", "1"]) == 0
    assert read_json(out / "status.json")["step"] == status["step"] + 1
    steps = [row["step"] for row in read_rows(out / "metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_kill_9_loses_no_step_before_the_checkpoint_and_a_second_run_is_locked_out(store_path, tmp_path):
    out = tmp_path / "run"
    command = flags("mae-tiny", store_path, out, "--steps", "3000")
    assert main([*command, "--limit-steps", "4"]) == 0
    process = start(*command)
    until = time.monotonic() + 90
    while max(row["step"] for row in read_rows(out / "metrics.jsonl")) <= 6:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(UsageError, match=rf"in use by process {process.pid}"):
        main(command)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert main([*command, "--limit-steps", "2"]) == 0
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [2, 4, 6]


def test_no_pickle_is_ever_loaded():
    root = Path(__file__).parents[1]
    for file in [path for name in ("pipeline", "model", "train", "tools") for path in (root / name).rglob("*.py")]:
        text = file.read_text()
        assert "torch.load(" not in text, file
        assert "import pickle" not in text, file


def test_a_run_goes_from_score_to_score_beside_baselines_that_are_scored_once(store_path, tmp_path):
    command = [*flags("mae-tiny", store_path, tmp_path / "a", "--steps", "6", "--evaluations", "3"), "--until-score"]
    for turn in (1, 2, 3):
        assert main(command) == 0
        assert [row["step"] for row in read_rows(tmp_path / "a" / "evaluations.jsonl")] == [2, 4, 6][:turn]
        state = read_json(tmp_path / "a" / "status.json")
        assert (state["state"], state["step"]) == ("done" if turn == 3 else "paused", 2 * turn)
    # In parts or in one go: the same weights, the same scores.
    assert main(flags("mae-tiny", store_path, tmp_path / "b", "--steps", "6", "--evaluations", "3")) == 0
    one, other = weights(tmp_path / "a", 6), weights(tmp_path / "b", 6)
    assert all(torch.equal(one[name], other[name]) for name in one)
    evaluation = read_json(tmp_path / "a" / "evaluation.json")
    assert {**evaluation, "train_seconds": 0} == {
        **read_json(tmp_path / "b" / "evaluation.json"), "train_seconds": 0
    }  # fmt: skip
    assert set(evaluation["scores"]["held-out"]) == {"class", *Store.open(store_path).columns}
    # The last score is what `daae evaluate` says of the same checkpoint.
    assert evaluate.main([str(tmp_path / "a"), "--device", "cpu", "--json"]) == 0
    assert read_json(tmp_path / "a" / "evaluation.json") == evaluation


def test_baselines_of_a_twin_are_taken_and_those_of_a_stranger_are_not(store_path, tmp_path):
    more = ("--steps", "2", "--evaluations", "1")
    assert main(flags("mae-tiny", store_path, tmp_path / "a", *more)) == 0
    known = read_json(tmp_path / "a" / "baselines.json")
    known["scores"]["pixels"]["leading"]["value"] = 0.125  # no score of 96 pictures: a fifth of them is asked
    (tmp_path / "a" / "baselines.json").write_text(json.dumps(known))
    taken = ("--baselines", str(tmp_path / "a"))
    strangers = {"seed": ("--seed", "1"), "width": ("--model.width", "64")}
    for name, words in {"twin": (), **strangers}.items():
        assert main(flags("daae-tiny", store_path, tmp_path / name, *more, *taken, *words)) == 0
        value = read_json(tmp_path / name / "evaluation.json")["baselines"]["pixels"]["leading"]["value"]
        assert (value == 0.125) == (name == "twin")
