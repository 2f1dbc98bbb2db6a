"""`daae reproduce`: the experiments that the repository declares, and the way from nothing to a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.errors import NumericsError, UsageError
from pipeline.store import Store
from tests.images import make_folder
from tests.study_folders import write_run
from tools import convert, reproduce
from tools.commands import Commands
from tools.comparing.experiment import Compare, plan_experiment
from train.command import parse

# emoji names stores of its own, and what adainf needs is made by another command: both are tested where they are used.
ANY_IMAGES = sorted({path.stem for path in reproduce.EXPERIMENTS.glob("*.yaml")} - {"emoji", "adainf"})


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    """A store with emoji's columns that says to be as large as ImageNet."""
    paths = make_folder(tmp_path / "in", 8, 32)
    rows = [f"{path.name},kind-{i % 2},thing-{i % 4}" for i, path in enumerate(paths)]
    (tmp_path / "in/labels.csv").write_text("path,category,subcategory\n" + "\n".join(rows) + "\n")
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "store"), "--backends", "dali", "--quiet"]) == 0
    monkeypatch.setattr(Store, "per_epoch", property(lambda self: 1_281_167))
    return tmp_path / "store"


@pytest.mark.parametrize("name", ANY_IMAGES)
def test_declared_experiments_are_ones_that_can_be_run(name, images, tmp_path):
    file = str(reproduce.EXPERIMENTS / f"{name}.yaml")
    words = ["--experiment", file, "--data", str(images), "--label", "subcategory", "--out", str(tmp_path / "out")]
    plan = plan_experiment(parse(Compare, words, prog="daae compare"))
    assert plan.order()
    for cell in plan.order():
        plan.wish(cell.arm, cell.length).check()


def test_the_standard_set_is_what_it_says(images, tmp_path):
    file = str(reproduce.EXPERIMENTS / "standard.yaml")
    words = ["--experiment", file, "--data", str(images), "--out", str(tmp_path / "out")]
    cells = plan_experiment(parse(Compare, words, prog="daae compare")).order()
    assert len(cells) == len(set(cells)) == 5 * 5 * 3
    assert sum(cell.length or 0 for cell in cells) / 3600 == pytest.approx(3.875)  # hours of training


def test_from_nothing_to_a_sentence(tmp_path, monkeypatch, capsys):
    called = []

    def call(self, *words):
        called.append(words)
        if words[0] == "compare":
            study = Path(words[words.index("--out") + 1])
            for arm, scores in {"mae": (0.30, 0.34), "daae": (0.34, 0.37)}.items():
                for seed in (0, 1):
                    for seconds, score in zip((30, 120), scores, strict=True):
                        write_run(
                            study / "runs" / f"{arm}-{seconds}s-seed{seed}", preset=f"{arm}-tiny", seed=seed,
                            seconds=seconds, curve=((seconds, score),), gallery=None,
                        )  # fmt: skip
            shutil.copy(words[words.index("--experiment") + 1], study / "experiment.yaml")

    monkeypatch.setattr(Commands, "call", call)
    assert reproduce.main(["--quick", "--out", str(tmp_path), "--json"]) == 0
    assert [words[0] for words in called] == ["fetch", "convert", "convert", "convert", "compare", "report"]
    assert called[4][-1] == str(tmp_path / "quick")
    said = json.loads(capsys.readouterr().out)
    # DAAE is where MAE ends after 120 s when its runs of 30 s end.
    assert "at least 4.00 times as fast (95 % interval from 4.00; 2.05 or more in 2 of 2 seeds)" in said["sentence"]
    assert said["arms"]["daae"]["lengths"] == {"30": [0.34, 0.34], "120": [0.37, 0.37]}
    assert said["report"] == str(tmp_path / "quick.html")


def test_a_run_that_diverged_still_leaves_a_report_and_its_code(tmp_path, monkeypatch, capsys):
    called = []

    def call(self, *words):
        called.append(words[0])
        if words[0] == "compare":
            study = Path(words[words.index("--out") + 1])
            for seed in (0, 1):
                write_run(study / "runs" / f"mae-120s-seed{seed}", seed=seed, seconds=120, curve=((120, 0.34),))
            shutil.copy(words[words.index("--experiment") + 1], study / "experiment.yaml")
            raise NumericsError("2 of 8 runs have no score.")

    monkeypatch.setattr(Commands, "call", call)
    assert reproduce.main(["--quick", "--out", str(tmp_path)]) == NumericsError.code == 4
    assert called[-2:] == ["compare", "report"]
    assert capsys.readouterr().out.startswith("mae scores 34.0 ± 0.0 %")


def test_lengths_are_stretched_where_steps_are_slow(tmp_path, monkeypatch):
    monkeypatch.setattr("train.device.choose_precision", lambda wish, device: "fp32")
    assert reproduce.usual_stretch("cpu") == 2.0
    monkeypatch.setattr("train.device.choose_precision", lambda wish, device: "bf16")
    assert reproduce.usual_stretch("cpu") == 1.0
    longer = yaml.safe_load(reproduce.stretched(reproduce.EXPERIMENTS / "standard.yaml", 2.0, tmp_path).read_text())
    assert longer["seconds"] == [60, 120, 240, 480, 960]
    assert longer["arms"]["mae"] == "mae-tiny"
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"arms": {"a": {"preset": "daae-tiny", "also": [30]}}, "seconds": [60]}))
    assert yaml.safe_load(reproduce.stretched(more, 1.5, tmp_path / "out").read_text())["arms"]["a"]["also"] == [45]
    with pytest.raises(UsageError, match="--stretch 0: wants a factor above 0"):
        reproduce.main(["--stretch", "0", "--out", str(tmp_path)])
