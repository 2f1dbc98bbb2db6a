"""Flags, YAML and presets: what a person types becomes one configuration, or one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import DataError, UsageError
from pipeline.interpreter import ROOT, python
from tests.conftest import PYTHON
from tools import cli
from train import command
from train.command import coerce, overlay
from train.config import Optim, Run, as_values, differences, with_values
from train.help import opposite
from train.presets import PRESETS, open_preset
from train.pretrain import read_flags


def settings(*argv: str) -> Run:
    return read_flags(list(argv))[0]


def test_flags_beat_the_file_and_the_file_beats_the_preset(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("optim:\n  lr: 2e-3\n  batch: 64\nmethod: {temperature: 0.5}\n")
    run = settings("--preset", "daae-tiny", "--config", str(file), "--optim.batch", "32")
    assert run.optim.lr == 2e-3  # text to YAML 1.1, a number to us
    assert run.optim.batch == 32
    assert run.method.temperature == 0.5  # pyright: ignore[reportAttributeAccessIssue]
    assert run.model.width == 192
    sources = read_flags(["--preset", "daae-tiny", "--config", str(file), "--optim.batch", "32"])[2]
    assert sources["optim.batch"] == "flag"
    assert sources["optim.lr"] == str(file)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_survives_its_own_yaml(name):
    run = open_preset(name)
    again = with_values(Run(), yaml.safe_load(yaml.safe_dump(as_values(run))), "config.yaml")
    assert again == run
    assert differences(as_values(run), as_values(again)) == []
    run.model.check()
    assert PRESETS[name].__doc__


def test_maes_own_command_line_is_understood():
    run = settings(
        *"--model mae_vit_base_patch16 --batch_size 64 --accum_iter 2 --blr 1.5e-4 --min_lr 1e-6 --mask_ratio 0.8 "
        "--norm_pix_loss --warmup_epochs 5 --epochs 100 --input_size 224 --data_path d --output_dir o --seed 3 "
        "--num_workers 4".split()
    )
    assert run.preset == "mae-vitb16"
    assert (run.optim.batch, run.optim.accumulate) == (128, 2)
    assert run.optim.peak_lr() == pytest.approx(1.5e-4 * 128 / 256)
    assert (run.method.mask_ratio, run.method.norm_pix) == (0.8, True)  # pyright: ignore[reportAttributeAccessIssue]
    assert (run.budget.epochs, run.data, run.out, run.seed) == (100, Path("d"), Path("o"), 3)
    assert run.speed.workers == 4


def test_maes_batch_size_is_one_devices_share(monkeypatch):
    words = "--model mae_vit_base_patch16 --batch_size 512 --accum_iter 2".split()
    assert settings(*words).optim.batch == 1024
    assert settings(*words, "--gpus", "8").optim.batch == 8192
    monkeypatch.setenv("WORLD_SIZE", "16")  # as torchrun tells its processes, on two machines here
    assert settings(*words, "--gpus", "8").optim.batch == 16384


@pytest.mark.parametrize("words", [("--norm-pix-loss", "false"), ("--method.no-norm-pix",), ("--norm_pix_loss=no",)])
def test_booleans_in_every_spelling(words):
    assert settings("--preset", "mae-tiny", *words).method.norm_pix is False  # pyright: ignore[reportAttributeAccessIssue]


def test_a_wish_for_seconds_replaces_the_presets_epochs():
    budget = settings("--preset", "mae-tiny", "--seconds", "90").budget
    assert (budget.seconds, budget.epochs, budget.steps) == (90, None, None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epocs", "3"], "--epocs is unknown. Did you mean --epochs?"),
        (["--preset", "dae-tiny"], "--preset dae-tiny is unknown. Did you mean daae-tiny?"),
        (["--preset", "daae-tiny", "--method.temprature", "1"], "Did you mean --method.temperature?"),
        (["--preset", "mae-tiny", "--method.temperature", "1"], "--method.temperature is unknown"),
        (["--objective", "mea"], "--objective mea is unknown. Did you mean mae?"),
        (["--precision", "fp8"], "--precision wants {auto,bf16,fp16,fp32}, not 'fp8'"),
        (["--optim.batch", "many"], "--optim.batch wants INT, not 'many'"),
        (["--norm-pix-loss", "--mask-ratio"], "--mask-ratio wants FLOAT behind it"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
        (["--model", "resnet50"], "--model resnet50 is unknown"),
        (["--batch_size", "big"], "--batch_size wants a number"),
        (["--batch_size", "64", "--gpus", "all"], "--gpus wants a number, not 'all'"),
        (["--batch_size", "64", "--accum_iter", "two"], "--accum_iter wants a number, not 'two'"),
        (["--accum_iter", "two"], "--accum_iter wants INT, not 'two'"),
        (["--steps", "x"], "--steps wants INT, not 'x'"),
        (["--steps", "--seed"], "--steps wants INT behind it"),
        (["--loader", "dal"], "--loader wants {auto,ffcv,shards,dali,resident}, not 'dal'. Did you mean dali?"),
    ],
)
def test_a_wrong_flag_is_one_sentence_with_the_nearest_name(argv, words):
    with pytest.raises(UsageError) as caught:
        read_flags(argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "─" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", "lrr is unknown. Did you mean lr?"),
        ("sede: 1", "sede is unknown. Did you mean seed?"),
        ("optim: 3", "optim is a group of settings"),
        ("seed: {a: 1}", "seed wants INT"),
        ("seed: yes", "seed wants INT"),
        ("[1, 2]", "not a mapping"),
        ("a: [", "is not YAML"),
        ("objective: swin", "--objective swin is unknown"),
        ("model: {side: 64.5}", "side wants INT"),
    ],
)
def test_a_wrong_yaml_is_one_sentence(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_flags(["--preset", "daae-tiny", "--config", str(file)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_coerced_to_what_a_field_wants():
    assert coerce("1e-3", float, "x") == 1e-3
    assert coerce([0.2, 1], tuple[float, float], "x") == (0.2, 1.0)
    assert coerce(None, float | None, "x") is None
    assert coerce("3e2", int, "x") == 300
    assert overlay(Optim(), {"betas": [0.9, 0.999]}, "f").betas == (0.9, 0.999)
    with pytest.raises(UsageError, match="wants"):
        coerce([1, 2, 3], tuple[float, float], "x")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"not a multiple of --model\.patch"):
        settings("--preset", "mae-tiny", "--model.side", "60").model.check()
    with pytest.raises(UsageError, match="heads"):
        settings("--preset", "mae-tiny", "--model.heads", "5").model.check()


@pytest.mark.parametrize(
    "argv", [["--help"], ["convrt"], ["pretrain", "--epocs", "1"], *([name, "--help"] for name in cli.COMMANDS)]
)
def test_help_and_wrong_flags_import_nothing_slow(argv):
    code = (
        "import sys; from tools import cli\n"
        f"try: code = cli.main({argv!r})\n"
        "except SystemExit as stop: code = stop.code or 0\n"
        "slow = {'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "sys.exit(code)"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if "--help" in argv else 2), done.stderr
    assert ("usage: " in done.stdout) == ("--help" in argv)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("wish", "right"), [
    ("auto", True), ("products", True), ("12x50x64=flash 16x197x32=any", True), ("", True),
    ("fast", False), ("12x50=any", False), ("12x50x64=fast", False),
])  # fmt: skip
def test_ways_to_attend_are_checked_before_anything_starts(wish, right):
    run = settings("--preset", "mae-tiny", "--speed.attention", wish)
    if right:
        run.check()
    else:
        with pytest.raises(UsageError, match=r"--speed\.attention"):
            run.check()


def test_the_ways_that_flags_know_are_those_there_are():
    from model import attention, ways

    assert set(ways.WAYS) == set(attention.WAYS)


def test_help_names_each_flag_with_its_type_its_other_names_and_what_it_starts_from(capsys):
    from train.pretrain import main

    with pytest.raises(SystemExit) as stop:
        main(["--preset", "daae-tiny", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    run = open_preset("daae-tiny")
    for setting in command.settings(type(run)):
        assert setting.flag in shown or opposite(setting.flag) in shown, setting.flag
    words = " ".join(shown.split())
    assert "--optim.batch, --batch INT Images per optimizer step, over all devices. (128)" in words
    assert "--method.temperature FLOAT Of the contrastive softmax. (0.2)" in words
    assert "--method.no-norm-pix, --norm-pix-loss Predict each patch" in words
    assert "--loader {auto,ffcv,shards,dali,resident}" in words
    assert "--method.jitter FLOAT FLOAT FLOAT FLOAT Colour changes of the small view" in words


def test_print_config_can_be_fed_back(tmp_path, capsys):
    from train.pretrain import main

    def printed(*words: str) -> dict[str, tuple[Any, str]]:
        """Value and source of each setting."""
        assert main([*words, "--print-config"]) == 0
        found = {}
        for line in capsys.readouterr().out.splitlines():
            name, _, said = line.partition(": ")
            value, _, source = said.rpartition("  # ")
            found[name] = (json.loads(value), source)
        return found

    shown = printed("--preset", "daae-tiny", "--batch", "48", "--seconds", "90", "--no-compile")
    assert shown["optim.batch"] == (48, "flag")
    assert shown["speed.compile"] == (False, "flag")
    assert shown["method.temperature"] == (0.2, "daae-tiny")
    nested: dict[str, Any] = {}
    for name, (value, _) in shown.items():
        *group, leaf = name.split(".")
        (nested.setdefault(group[0], {}) if group else nested)[leaf] = value
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(nested))
    assert printed("--config", str(file)) == {name: (value, str(file)) for name, (value, _) in shown.items()}


def test_the_slides_recipes_print_their_plan_without_data(capsys):
    from train.pretrain import main

    plans = {}
    for name in ("mae-vitb16-in1k-1600", "daae-vitb16-in1k-600", "mae-vitb16-mini-800", "daae-vitb16-mini-550"):
        assert main(["--preset", name, "--dry-run", "--json", "--images-per-second", "5000"]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
    mae, daae = plans["mae-vitb16-in1k-1600"], plans["daae-vitb16-in1k-600"]
    assert mae["steps"] == 1600 * (1281167 // 4096)
    assert mae["peak_lr"] == daae["peak_lr"] == pytest.approx(2.4e-3)
    assert mae["gflop_per_image"] == pytest.approx(58.05, rel=1e-3)
    assert daae["hours"] == pytest.approx(600 * 312 * 4096 / 5000 / 3600, rel=0.01)
    assert plans["mae-vitb16-mini-800"]["images"] == 34745
    with pytest.raises(UsageError, match="--images"):
        main(["--preset", "mae-vitb16", "--dry-run"])


@pytest.mark.parametrize(("words", "error", "said"), [
    (["--batch", "4096"], DataError, "fewer than one batch of 4,096"),
    (["--batch", "16", "--gpus", "3"], UsageError, "cannot be shared out evenly among 3 processes"),
    (["--batch_size", "16", "--gpus", "8"], DataError, "fewer than one batch of 128"),
    (["--objective", "mocov2", "--batch", "16", "--method.queue", "112"], UsageError, "holds more keys than there are"),
    (["--gpus", "0"], UsageError, "--gpus is at least 1, not 0"),
])  # fmt: skip
def test_a_dry_run_is_refused_what_the_run_would_be(store_path, words, error, said):
    from train.pretrain import main

    with pytest.raises(error, match=said):
        main(["--preset", "mae-tiny", "--data", str(store_path), "--dry-run", "--images-per-second", "100", *words])


def test_what_lies_in_the_working_directory_stands_in_for_no_library(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["a folder of programs", *sys.path])
    done = subprocess.run(python("-m", "tools.cli", "methods"), capture_output=True, text=True, timeout=120)
    assert (done.returncode, "daae" in done.stdout) == (0, True), done.stderr
    monkeypatch.setattr(sys, "path", [ROOT, *sys.path])  # `python -m tools.cli` in a checkout that is not installed
    assert python("-m", "x") == [sys.executable, "-m", "x"]
