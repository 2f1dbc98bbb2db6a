"""Short profiles of the real thing: the figures, the table, the picture, the search for better settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import native
from pipeline.errors import ResourceError
from pipeline.loader import open_loader
from pipeline.sampling import View
from pipeline.store import Store
from tests.conftest import needs_ffcv
from tests.images import make_folder
from tools import convert, profile
from tools.profiling import stages, tune
from tools.profiling.bottleneck import Measured, verdict
from tools.profiling.stages import usable_backends
from train import gallery
from train.command import run
from train.presets import open_preset
from train.rehearsal import Machine, fit_batch
from train.timing import Spread, Stage


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
    before = {name: value.clone() for name, value in one.stepper.network.named_parameters()}
    batch = one.random_batch(16)
    sample = one.time(lambda: batch, one.step, 0.05)
    assert sample.images % 16 == 0
    assert sample.seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in one.stepper.network.named_parameters())


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
        "--device",
        "cpu",
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
    assert found["decoder"] == ("region" if native.why_not() is None else "pillow")
    assert list(found["parts"]) == ["storage"]  # what DALI does inside cannot be told


def from_json(found: dict) -> Measured:
    def stage_of(row: dict) -> Stage:
        return Stage(Spread(**row["images_per_second"]), row["cpu_ms_per_image"], row["data_wait"])

    values = {field.name: found[field.name] for field in dataclasses.fields(Measured)}
    for name in ("loader", "both", "parts"):
        values[name] = {backend: stage_of(row) for backend, row in found[name].items()}
    values |= {name: stage_of(found[name]) for name in ("step", "views")}
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
    # The command is to be copied whole, and holds a path of any length; of the table nothing is cut.
    assert all(len(line) <= 80 for line in lines if " --data " not in line and " to " not in line)
    assert lines[0].startswith("daae-tiny, batch 8")
    last = " ".join(text.rstrip().rsplit("\n\n", 1)[1].split())
    assert last.startswith(("The step limits", "The loader limits", "Balanced"))
    assert last.endswith(".")
    assert "--images-per-second" in text


def test_pillow_in_the_decoders_place_is_said(
    unlabelled_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    why = "no C compiler (cc, gcc or clang)"
    monkeypatch.setattr(native, "_load", lambda: why)
    words = ["--data", str(unlabelled_path), "--loader", "shards", "--batch", "8", "--device", "cpu", "--quiet"]
    assert profile.main([*words, "--seconds", "0.3"]) == 0
    note = f"Pillow decodes, several times slower than our decoder: {why}."
    assert note in " ".join(capsys.readouterr().out.split())
    found = [*words, "--tune", str(tmp_path / "fast.yaml"), "--tune-seconds", "1"]
    assert profile.main(found) == 0
    assert note in capsys.readouterr().out
    assert profile.main([*found, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["decoder"], told["no_decoder"]) == ("pillow", why)


def test_a_store_without_the_backend_is_refused(unlabelled_path: Path, capsys: pytest.CaptureFixture):
    assert Store.open(unlabelled_path).beton is None
    words = ["--data", str(unlabelled_path), "--loader", "ffcv", "--batch", "8", "--seconds", "0.2"]
    assert run(profile.main, words) == 2
    assert "was written without ffcv. Convert again with --backends both." in capsys.readouterr().err
    assert usable_backends(Store.open(unlabelled_path)) == ["shards", "dali"]


def test_images_are_drawn_on_their_way_to_the_encoder(unlabelled_path: Path, tmp_path: Path):
    drawn = tmp_path / "views.png"
    words = ["--data", str(unlabelled_path), "--preset", "daae-tiny", "--device", "cpu", "--views", str(drawn)]
    assert run(profile.main, words) == 0
    wish = open_preset("daae-tiny")
    views, store = wish.method.views(wish.model), Store.open(unlabelled_path)
    with Image.open(drawn) as page:
        found = np.asarray(page.convert("RGB"))
    cell, columns = gallery.LEAST_CELL + gallery.GAP, 8
    # As stored; the masked view cut and seen; the small one cut and coloured.
    assert found.shape == (5 * cell + gallery.GAP, gallery.LABEL_WIDTH + columns * cell + gallery.GAP, 3)
    with contextlib.closing(open_loader(store, views, batch=columns, seed=0, backend="auto")) as loader:
        batch = gallery.first_batch(loader)
    for row, name in ((1, "holed"), (3, "small")):
        side = views[name].side
        for column, crop in enumerate(batch.images[name].numpy()):
            top, left = gallery.GAP + row * cell, gallery.LABEL_WIDTH + gallery.GAP + column * cell
            assert np.array_equal(found[top : top + side, left : left + side], crop)
    holes = (found[gallery.GAP + 2 * cell :][: wish.model.side] == 128).all(axis=2).mean()
    assert holes > 0.3  # three quarters of each view, which is two thirds of its cell wide


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--preset", "mae-tinny"], 2, "Did you mean mae-tiny?"),
        (["--seconds", "0"], 2, "--seconds is from 0.1"),
        (["--workers", "-1"], 2, "--workers is at least 0"),
        (["--batch", "0"], 2, "--batch is at least 1"),
        (["--tune", "/nowhere/fast.yaml"], 2, "there is no folder /nowhere"),
        (["--tune", "fast.yaml", "--tune-seconds", "inf"], 2, "--tune-seconds is from 0.1"),
        (["--peers", "--png", "bars.png"], 2, "pass one of them, without a picture"),
        (["--views", "views.png", "--peers"], 2, "pass one of them, without a picture"),
        (["--views", "views.jpg"], 2, "--views writes a .png file"),
        (["--peers", "--batch", "25"], 3, "fewer than one batch of 25"),
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
    config = tmp_path / "config.yaml"
    config.write_text("preset: daae-tiny\nmodel: {depth: 3}\nspeed: {workers: 2, compile: true}\n")
    wish = profile.settings(profile.Profile(data=unlabelled_path, config=config, precision="fp32", batch=4))
    assert (wish.preset, wish.objective, wish.model.depth, wish.model.side) == ("daae-tiny", "daae", 3, 64)
    assert (wish.speed.workers, wish.speed.compile, wish.precision, wish.optim.batch) == (2, True, "fp32", 4)
    other = profile.settings(profile.Profile(data=unlabelled_path, config=config, preset="mae-tiny"))
    assert (other.preset, other.objective, other.model.depth) == ("mae-tiny", "mae", 3)
    assert profile.settings(profile.Profile(data=unlabelled_path)).preset == "mae-tiny"


def test_the_picture_and_the_page_show_every_stage(
    unlabelled_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    html, png = tmp_path / "stages.html", tmp_path / "stages.png"
    words = [
        "--data",
        str(unlabelled_path),
        "--loader",
        "shards",
        "--batch",
        "8",
        "--seconds",
        "0.3",
        "--device",
        "cpu",
    ]
    assert profile.main([*words, "--html", str(html), "--png", str(png)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    text = html.read_text()
    for name in ("read and check", "decode", "cut the views", "loader shards", "device views", "step, views included"):
        assert name in text
        assert name in told
    assert "libjpeg-turbo, whole pictures, images/s a core" in text
    assert "http" not in text  # stands alone
    assert '<p class="answer">The step limits this run' in text
    with Image.open(png) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert image.width > 800
    assert {(0x3B, 0x82, 0xD6), (0xE0, 0x77, 0x2F)} <= colours  # the stages, and the one that limits
    assert run(profile.main, [*words, "--png", str(tmp_path / "stages.gif")]) == 2


def rates(monkeypatch: pytest.MonkeyPatch, rate: Callable[[tune.Candidate], float]) -> list[tune.Candidate]:
    """Candidates on four cores, of which each is as fast as it is told."""
    monkeypatch.setattr(tune, "rate_of", lambda machine, store, batch, one, seconds: rate(one))
    default = tune.Candidate("shards", 1, 2)
    return tune.candidates(default, ["ffcv", "shards"], 4, on_gpu=False)


def test_the_search_finds_the_fastest(monkeypatch: pytest.MonkeyPatch):
    tried = rates(monkeypatch, lambda one: 100 * one.workers + (50 if one.loader == "ffcv" else 0) + one.ahead)
    assert len(tried) == len({str(one.settings()) for one in tried}) == 2 * 3 * 2
    best = tune.search(None, None, 8, tried, 60.0, lambda _: None)
    assert best.settings() == {"loader": "ffcv", "speed": {"workers": 4, "ahead": 4}}
    assert len(best.rates) >= 3  # the better ones are measured again


def test_the_search_keeps_the_defaults_where_nothing_is_clearly_faster(monkeypatch: pytest.MonkeyPatch):
    tried = rates(monkeypatch, lambda one: 100 + one.workers / 4)
    assert tune.search(None, None, 8, tried, 60.0, lambda _: None) is tried[0]


def test_shares_of_the_hardware_decoder_are_tried_on_a_gpu_only():
    default = tune.Candidate("dali", 8, 2, 0.65)
    shares = {one.hw_decoder_load for one in tune.candidates(default, ["dali", "shards"], 8, on_gpu=True)}
    assert shares == {None, 0.5, 0.65, 0.8, 0.9}


def test_what_the_search_writes_configures_a_run(unlabelled_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    found = tmp_path / "fast.yaml"
    words = ["--data", str(unlabelled_path), "--batch", "8", "--loader", "shards", "--device", "cpu", "--quiet"]
    assert profile.main([*words, "--tune", str(found), "--tune-seconds", "2"]) == 0
    assert "images/s  shards, 1 worker, 2 ahead  (by itself)" in capsys.readouterr().out
    settings = profile.settings(profile.Profile(data=unlabelled_path, config=found))
    assert settings.speed.workers >= 1
    assert settings.speed.ahead in (2, 4)
    assert run(profile.main, [*words, "--tune", str(tmp_path / "fast.txt")]) == 2
    assert "--tune writes a .yaml file" in capsys.readouterr().err


def test_a_store_of_raw_pixels_is_profiled_without_what_is_said_of_jpegs(tmp_path: Path):
    make_folder(tmp_path / "in", 32, 48)
    words = [str(tmp_path / "in"), str(tmp_path / "s"), "--backends", "dali", "--pixels", "raw", "--quiet"]
    assert convert.main(words) == 0
    store = Store.open(tmp_path / "s")
    with contextlib.closing(open_loader(store, {"a": View(side=32)}, batch=8, backend="shards")) as loader:
        limits = stages.machine_limits(loader, torch.device("cpu"))
    assert set(limits) == {"copy_gb", "read_disk", "read_cached"}


@pytest.mark.slow
@needs_ffcv
@pytest.mark.parametrize("pixels", ["jpeg", "raw"])
def test_every_peer_runs_and_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture, pixels: str):
    """FFCV compiles for a quarter of a minute in each of its processes."""
    pytest.importorskip("nvidia.dali")
    make_folder(tmp_path / "in", 48, 96)
    store = str(tmp_path / "s")
    assert convert.main([str(tmp_path / "in"), store, "--pixels", pixels, "--quiet"]) == 0
    capsys.readouterr()
    assert profile.main(["--data", store, "--peers", "--seconds", "1", "--batch", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    there = {"DAAE, FFCV file", "DAAE, shards", "FFCV", "DALI", "torchvision, Pillow", "torchvision, v2"}
    assert set(told["views"]["224"]) == (there if pixels == "jpeg" else there - {"torchvision, v2"})
    for peers in told["views"].values():
        assert all(each["images_per_cpu_second"] > 0 for each in peers.values())
    assert "1" in told["threads"]
    assert told["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]


# --- the step ---------------------------------------------------------------------------------------------------------

TINY_CONFIG = """
preset: daae-tiny
model: {side: 32, width: 32, depth: 1, heads: 2, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
method: {head_hidden: 32, head_out: 16}
precision: fp32
"""


def test_a_step_is_told_part_by_part(tmp_path: Path, capsys: pytest.CaptureFixture):
    config, picture, trace = (tmp_path / name for name in ("a.yaml", "step.png", "trace.json"))
    config.write_text(TINY_CONFIG)
    words = ["--step", "--config", str(config), "--batch", "16", "--seconds", "1", "--device", "cpu", "--quiet"]
    assert run(profile.main, [*words, "--json", "--png", str(picture), "--trace", str(trace)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["milliseconds"]) == {"views", "encoder", "decoder", "losses", "backward", "optimizer", "other"}
    whole = 1000 * 16 / told["images_per_second"]["median"]
    assert sum(told["milliseconds"].values()) == pytest.approx(whole, rel=0.5)  # medians of each, not of one step
    method, shape = open_preset("daae-tiny").method, machine(16).run.model
    assert told["gflop_per_image"] == pytest.approx(
        6 * replace(method, head_hidden=32, head_out=16).macs(shape) / 1e9, rel=1e-6
    )
    assert told["tflops"] == pytest.approx(told["images_per_second"]["median"] * told["gflop_per_image"] / 1000)
    assert 0 < told["mfu"] == pytest.approx(told["tflops"] / told["gemm_tflops"])
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert any(event.get("name") == "aten::linear" for event in json.loads(trace.read_text())["traceEvents"])
    assert run(profile.main, words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "GFLOP an image" in shown
    assert "backward" in shown


@pytest.mark.parametrize(("words", "said"), [
    (["--trace", "a.json"], "--trace, --knobs and --techniques go with --step"),
    ([], "--data (a store made by `daae convert`) is required"),
    (["--step", "--html", "a.html"], "without a picture"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture):
    assert run(profile.main, words) == 2
    assert said in capsys.readouterr().err


def test_a_dry_run_measures_what_an_epoch_takes(store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    from train.pretrain import main

    config = tmp_path / "a.yaml"
    config.write_text(TINY_CONFIG)
    words = ["--config", str(config), "--data", str(store_path), "--epochs", "10", "--batch", "16", "--device", "cpu"]
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds_per_epoch"] == pytest.approx(96 / plan["images_per_second"], rel=0.01)
    assert plan["hours"] == pytest.approx(10 * plan["seconds_per_epoch"] / 3600, abs=0.01)
