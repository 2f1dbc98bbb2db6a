"""`daae reproduce`: the experiments that the repository declares, and the way from nothing to a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.study_folders import write_run
from tools import reproduce
from tools.commands import Commands
from tools.comparing.experiment import Compare, make_plan
from train.command import parse

# emoji names stores of its own, and what adainf needs is made by another command: both are tested where they are used.
ANY_IMAGES = sorted({path.stem for path in reproduce.EXPERIMENTS.glob("*.yaml")} - {"emoji", "adainf"})


@pytest.mark.parametrize("name", ANY_IMAGES)
def test_declared_experiments_are_ones_that_can_be_run(name, store_path, tmp_path):
    file = str(reproduce.EXPERIMENTS / f"{name}.yaml")
    words = ["--experiment", file, "--data", str(store_path), "--label", "class", "--out", str(tmp_path / "out")]
    plan = make_plan(parse(Compare, words, prog="daae compare"))
    assert plan.order()
    for cell in plan.order():
        plan.wish(cell.arm, cell.length).check()


def test_the_standard_set_is_what_it_says(store_path, tmp_path):
    file = str(reproduce.EXPERIMENTS / "standard.yaml")
    words = ["--experiment", file, "--data", str(store_path), "--label", "class", "--out", str(tmp_path / "out")]
    cells = make_plan(parse(Compare, words, prog="daae compare")).order()
    assert len(cells) == len(set(cells)) == 5 * (3 + 4 + 4)
    assert sum(cell.length or 0 for cell in cells) / 3600 == pytest.approx(3.67, abs=0.01)  # hours of training


def test_from_nothing_to_a_sentence(tmp_path, monkeypatch, capsys):
    called = []

    def call(self, *words, listen=False):
        called.append(words)
        if words[0] == "compare":
            study = Path(words[words.index("--out") + 1])
            for arm, scores in {"mae": (0.30, 0.34), "daae": (0.34, 0.37)}.items():
                for seed in (0, 1):
                    for seconds, score in zip((40, 80), scores, strict=True):
                        write_run(
                            study / "runs" / f"{arm}-{seconds}s-seed{seed}", preset=f"{arm}-tiny", seed=seed,
                            seconds=seconds, curve=((seconds, score),), gallery=None,
                        )  # fmt: skip
            shutil.copy(words[words.index("--experiment") + 1], study / "experiment.yaml")
        return ""

    monkeypatch.setattr(Commands, "call", call)
    assert reproduce.main(["--quick", "--out", str(tmp_path), "--json"]) == 0
    assert [words[0] for words in called] == ["fetch", "convert", "convert", "convert", "compare", "report"]
    assert called[4][-1] == str(tmp_path / "quick")
    said = json.loads(capsys.readouterr().out)
    # DAAE is where MAE ends after 80 s when its runs of 40 s end.
    assert "at least 2.00 times as fast (95 % interval from 2.00; 2.05 or more in 0 of 2 seeds)" in said["sentence"]
    assert said["arms"]["daae"]["lengths"] == {"40": [0.34, 0.34], "80": [0.37, 0.37]}
    assert said["report"] == str(tmp_path / "quick.html")
