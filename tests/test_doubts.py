"""What a reader is told before a number is believed: runs written by hand that leave one thing to doubt each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from tests.study_folders import of_lengths, score, write_run
from tests.test_questions import answered
from tools import report
from tools.comparing.doubts import warnings
from tools.comparing.records import Cell, Group, Study, read_study
from tools.comparing.verdict import verdict


def said(study: Study, word: str) -> str:
    """The one doubt with this word in it."""
    (line,) = [line for line in warnings(study) if word in line]
    return line


def rescored(folder: Path, pixels: float = 0.22) -> Path:
    """On fluent MAE rises to the end and DAAE stays behind; on emojione MAE is at its best after 100 s, and DAAE's
    first score is above that. pixels: their score on fluent."""
    of_lengths(folder, mae=(0.28, 0.32, 0.32), daae=(0.305, 0.33, 0.36))
    alone = {
        "mae": {"fluent": (0.28, 0.31, 0.34), "emojione": (0.28, 0.33, 0.30)},
        "daae": {"fluent": (0.27, 0.30, 0.32), "emojione": (0.34, 0.36, 0.40)},
    }
    for arm, tests in alone.items():
        for seed in (0, 1):
            for place, seconds in enumerate((50.0, 100.0, 200.0)):
                path = folder / "runs" / Cell(arm, seed, seconds).folder / "evaluation.json"
                exam = json.loads(path.read_text())
                for test, values in tests.items():
                    exam["scores"][test]["subcategory"]["ridge"] = score(values[place])
                exam["leading"] = score(sum(values[place] for values in tests.values()) / 2)
                exam["baselines"]["pixels"]["scores"]["fluent"]["subcategory"]["ridge"] = score(pixels)
                exam["baselines"]["pixels"]["leading"] = score((pixels + 0.22) / 2)
                path.write_text(json.dumps(exam))
    return folder


def test_test_sets_that_disagree_are_told_with_the_speed_on_each(tmp_path, capsys):
    study = read_study([rescored(tmp_path)])
    assert study.tests == ["fluent", "emojione"]
    assert [study.on(test).goal for test in study.tests] == [200, 100]
    assert said(study, "disagree") == (
        "The test sets disagree: at the end daae is on fluent 2.0 points behind mae (-2.0 to -2.0), at most 1.00 (up "
        "to 1.00) times as fast to its best; on emojione 10.0 points ahead of mae (+10.0 to +10.0), at least 2.00 "
        "(from 2.00) times as fast to its best. The score is their mean."
    )
    beyond = "daae is faster than mae beyond chance in the mean of the test sets, though not on fluent. The claim"
    assert verdict(study).meaning.startswith(beyond)
    assert report.main([str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Each test set by itself" in page
    assert ">at most 1.00 (up to 1.00)<" in page
    assert ">at least 2.00 (from 2.00)<" in page


def test_a_test_set_on_which_nothing_counts_is_named(tmp_path):
    study = read_study([rescored(tmp_path / "low")])
    assert not any("would not count" in line and line.startswith("On ") for line in warnings(study))
    study = read_study([rescored(tmp_path / "high", pixels=0.31)])
    assert said(study, "On fluent alone") == (
        "On fluent alone mae and daae would not count: +3.0 and +1.0 points above the better of raw pixels and the "
        "untrained encoder."
    )


def test_probes_by_which_pixels_are_ahead_are_named(tmp_path):
    folder = of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))
    assert not any("Raw pixels score more" in line for line in warnings(read_study([folder])))
    for path in folder.glob("runs/*/evaluation.json"):
        exam = json.loads(path.read_text())
        for labels in exam["baselines"]["pixels"]["scores"].values():
            labels["subcategory"]["knn20"] = score(0.5)
        path.write_text(json.dumps(exam))
    line = said(read_study([folder]), "Raw pixels score more")
    assert line == "Raw pixels score more than every arm by knn20 (50.0 ± 1.0 %, daae 37.0 ± 0.1 %)."


def test_what_else_was_asked_and_went_worse_is_told(tmp_path):
    # Of the arms that the verdict is not about nothing is told, whatever their names begin with.
    few = {"mae": (0.30, 0.31, 0.32), "daae": (0.20, 0.21, 0.23), "daae-half": (0.10, 0.11, 0.13)}
    groups = [
        Group(arm, [answered(tmp_path, arm, seed, 0.4, value) for seed, value in enumerate(values)])
        for arm, values in few.items()
    ]
    assert said(Study(groups, None, True), "behind") == (
        "daae is behind mae's longest runs in ridge 10% (-9.7 (-11.1 to -8.2) points)."
    )
    assert not any("is behind" in line for line in warnings(Study(groups[::-1], None, True)))


def test_an_arm_that_is_faster_than_the_one_in_question_is_told(tmp_path):
    scores = {"mae": (0.28, 0.31, 0.34), "daae": (0.33, 0.35, 0.37), "contrast": (0.345, 0.35, 0.37)}
    study = read_study([of_lengths(tmp_path, **scores)])
    assert said(study, "sooner") == (
        "contrast is at the target sooner than daae: at least 4.00 (from 4.00) times as fast as mae."
    )


def test_settings_that_two_methods_could_share_are_told(tmp_path):
    study = read_study([of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))])
    line = said(study, "Recipes are compared")
    assert line.startswith("mae and daae differ in what both methods know as well: method.")
    assert "method.decoded_share (1.0; 0.25)" in line
    assert "method.gray (0.0; 0.2)" in line
    assert "budget" not in line
    alike = [
        dataclasses.replace(trial, cell=dataclasses.replace(trial.cell, arm="other")) for trial in study.base.trials
    ]
    study = Study([study.base, Group("other", alike)], None, True)
    assert not any("Recipes are compared" in line for line in warnings(study))


def test_a_machine_that_was_uneven_within_a_seed_is_told(tmp_path):
    """DAAE's runs are of a machine a quarter faster in one seed, and a fifth slower in the other."""
    folder = of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))
    for seed, rate in ((0, 800.0), (1, 512.0)):
        for seconds, value in ((50.0, 0.33), (100.0, 0.35), (200.0, 0.37)):
            run = folder / "runs" / Cell("daae", seed, seconds).folder
            shutil.rmtree(run)
            curve = ((seconds, value + 0.001 * seed),)
            write_run(run, preset="daae-tiny", seed=seed, seconds=seconds, curve=curve, rate=rate, gallery=None)
    paces = {arm: {"digest": "", "seconds_per_step": 0.2, "measured": [0.2]} for arm in ("mae", "daae")}
    (folder / "pace.json").write_text(json.dumps(paces))
    assert said(read_study([folder]), "within every seed") == (
        "The machine was not equally fast within every seed: by the clock and with steps timed in turns daae is 2.85 "
        "and 2.28 (seed 0) and 2.83 and 3.54 (seed 1) times as fast."
    )


def test_notes_of_an_experiment_are_told(tmp_path):
    folder = of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))
    with open(folder / "experiment.yaml", "a") as file:
        file.write("notes: [The target was chosen late.]\n")
    assert warnings(read_study([folder]))[-1] == "The target was chosen late."
