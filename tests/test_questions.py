"""What an experiment asks of its runs beside the leading score: what it may ask, of whom, and the table of answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from tests.study_folders import exam, score, write_run
from tools import results
from tools.comparing import answers
from tools.comparing.questions import Questions, typed
from tools.comparing.records import Cell, Group, Study, Trial, read_run
from train.command import parse
from train.evaluate import Evaluate
from train.finetune import Finetune
from train.presets import open_preset

# ---------------------------------------------------------------------------------------------------- what is asked


def test_each_runs_own_questions():
    questions = Questions.read(
        {"evaluate": {"label_share": [0.01, 0.1]}, "finetune": {"epochs": 20, "lengths": [240, 480]}}, ""
    )
    few, tuning = {"label_share": [0.01, 0.1]}, {"epochs": 20.0}
    assert questions.of("mae", 480, longest=True) == {"evaluate": few, "finetune": tuning}
    assert questions.of("mae", 240, longest=False) == {"finetune": tuning}
    assert questions.of("mae", 120, longest=False) == {}
    everyone = Questions.read({"finetune": {}}, "")
    assert everyone.of("mae", None, longest=True) == {"finetune": {}}
    assert everyone.of("mae", 240, longest=False) == {}
    assert Questions.read({}, "").of("mae", 480, longest=True) == {}
    each = Questions.read({"finetune": {"epochs": 20, "lengths": {"mae": [480], "daae": [240]}}}, "")
    assert each.of("mae", 480, longest=True) == each.of("daae", 240, longest=False) == {"finetune": tuning}
    for arm, length in (("mae", 240), ("daae", 480), ("contrast", 480)):
        assert each.of(arm, length, longest=length == 480) == {}
    for some in (questions, each):
        assert Questions.read(some.as_values(), "") == some
    each.check_arms(["mae", "daae", "contrast"])
    with pytest.raises(UsageError, match=r"finetune: lengths: there is no arm daae\. Did you mean daee"):
        each.check_arms(["mae", "daee"])


def test_folds_are_for_experiments_without_tests():
    shape = open_preset("mae-tiny").model
    for name in ("evaluate", "finetune"):
        questions = Questions.read({name: {"folds": True}}, "")
        questions.check(shape, tests=False, several=False)
        with pytest.raises(UsageError, match="folds hold out a part of the training images"):
            questions.check(shape, tests=True, several=False)


def test_questions_are_flags_of_their_commands():
    asked = Questions.read({"evaluate": {"label_share": [0.1], "agreement": 0.5, "exits": True, "neighbours": [5]},
                            "finetune": {"epochs": 2, "from_scratch": False, "betas": [0.9, 0.95]}}, "")  # fmt: skip
    assert asked.evaluate is not None
    assert asked.finetune is not None
    flags = parse(Evaluate, ["a-run", *typed(asked.evaluate)], prog="daae evaluate")
    assert (flags.label_share, flags.agreement, flags.exits, flags.neighbours) == ((0.1,), 0.5, True, (5,))
    tuning = parse(Finetune, ["a-run", "--out", "o", *typed(asked.finetune)], prog="daae finetune")
    assert (tuning.epochs, tuning.from_scratch, tuning.betas) == (2.0, False, (0.9, 0.95))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluate": {"label_shares": [0.1]}}, r"e\.yaml: evaluate: label_shares is unknown\. Did you mean label_sh"),
        ({"evaluate": {"label_share": [2]}}, "--label-share wants shares of the labels"),
        ({"evaluate": {"agreement": "half"}}, r"evaluate: agreement wants .*, not 'half'"),
        ({"evaluate": {"folds": True, "label_share": [0.1]}}, "without --tests and --label-share"),
        ({"evaluate": {"folds": True, "agreement": 0.5}}, "--folds scores the probes alone"),
        ({"evaluate": {"folds": True, "quarters": True}}, "--folds scores the probes alone"),
        ({"evaluate": {"protocols": ["knn"]}}, "protocols begin with ridge, which leads"),
        ({"finetune": {"epoch": 3}}, r"finetune: epoch is unknown\. Did you mean epochs"),
        ({"finetune": {"seed": 3}}, r"finetune: seed is unknown"),
        ({"finetune": {"folds": "all"}}, r"finetune: folds wants"),
        ({"finetune": {"lengths": "long"}}, r"finetune: lengths wants"),
    ],
)  # fmt: skip
def test_wrong_questions_are_one_sentence(values: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Questions.read(values, "e.yaml: ")


# ------------------------------------------------------------------------------------------------- what is answered


def answered(folder: Path, arm: str, seed: int, ridge: float, few: float, tuned: float | None = None):
    """A finished run with answers: few labels in two test sets, one a tenth above, the other a tenth below `few`."""
    record: dict[str, Any] = {"env": {}, "asked": {"evaluate": {"label_share": [0.1]}}}
    evaluation = exam(ridge) | {"baselines": {"pixels": exam(0.2), "untrained": exam(0.21)}}
    evaluation["agreement"] = {"share": 0.5, "encoder": {"fluent": {"found": 0.8, "count": 400}},
                               "untrained": {"fluent": {"found": 0.5, "count": 400}}}  # fmt: skip
    evaluation["quarters"] = {"encoder": exam(ridge / 2), "untrained": exam(0.1)}
    for test, shift in (("fluent", 0.1), ("emojione", -0.1)):
        evaluation["scores"][test]["subcategory"] = {"ridge": score(ridge), "ridge 10%": score(few + shift, 0.02)}
    record["evaluation"] = evaluation
    if tuned is not None:
        record["finetune"] = {"leading": score(tuned)}
        record["asked"]["finetune"] = {"epochs": 2.0}
    return read_run(write_run(folder / f"{arm}-{seed}", seed=seed), Cell(arm, seed), record)


def test_answers_are_means_of_tests_and_then_of_seeds(tmp_path):
    arms = {"mae": [(0.3, 0.2, 0.5), (0.34, 0.24, 0.56)], "daae": [(0.4, 0.3, None), (0.4, 0.32, None)]}
    groups = [
        Group(arm, [answered(tmp_path, arm, seed, *each) for seed, each in enumerate(seeds)])
        for arm, seeds in arms.items()
    ]
    names, rows = answers.table(Study(groups, None, True))
    quarters = ["ridge by quarters", "knn20 by quarters"]
    assert names == ["ridge", "ridge 10%", *quarters, "itself at 0.5 of the side", "fine-tuned 2 epochs", "knn20"]
    table = {who: dict(zip(names, cells, strict=True)) for who, cells in rows}
    assert list(table) == ["mae", "daae", "raw 32 px pixels", "untrained encoder"]
    few = table["mae"]["ridge 10%"]
    assert few is not None
    assert (few.score.mean, few.score.seeds, few.score.error) == (pytest.approx(0.22), 2, pytest.approx(0.02))
    assert few.score.spread == pytest.approx(0.02 * 2**0.5)
    assert few.ahead is None
    assert few.words() == "22.0 ± 2.8"
    better = table["daae"]["ridge 10%"]
    assert better is not None
    assert better.ahead is not None
    assert (better.ahead.mean, better.ahead.count) == (pytest.approx(0.09), 2)  # 10 and 8 points
    assert better.words().startswith("31.0 ± 1.4 (+9.0 (")
    tuned = table["mae"]["fine-tuned 2 epochs"]
    assert tuned is not None
    assert tuned.score.mean == pytest.approx(0.53)
    assert table["daae"]["fine-tuned 2 epochs"] is None
    placed = {who: cells["ridge by quarters"] for who, cells in table.items()}
    assert placed["daae"] is not None
    assert placed["daae"].score.mean == pytest.approx(0.2)
    assert placed["daae"].ahead is not None
    assert placed["daae"].ahead.mean == pytest.approx(0.04)  # 0.2 beside 0.15 and 0.17
    assert placed["raw 32 px pixels"] is None
    found = {who: cells["itself at 0.5 of the side"] for who, cells in table.items()}
    assert found["daae"] is not None
    assert found["untrained encoder"] is not None
    assert (found["daae"].score.mean, found["untrained encoder"].score.mean) == (0.8, 0.5)
    assert found["daae"].score.error == pytest.approx((0.8 * 0.2 / 400) ** 0.5)
    assert found["raw 32 px pixels"] is None


def test_half_of_the_time_is_held_against_the_baselines_longest_runs(tmp_path):
    def tuned(arm: str, length: float, seed: int, value: float) -> Trial:
        trial = answered(tmp_path / f"{length:g}", arm, seed, 0.3, 0.2, value)
        return dataclasses.replace(trial, cell=Cell(arm, seed, length))

    mae = [tuned("mae", 480, seed, value) for seed, value in enumerate((0.50, 0.52))]
    daae = [tuned("daae", 240, seed, value) for seed, value in enumerate((0.53, 0.53))]
    names, rows = answers.table(Study([Group("mae", mae), Group("daae", daae)], None, True))
    half = dict(rows)["daae"][names.index("fine-tuned 2 epochs")]
    assert half is not None
    assert half.ahead is not None
    assert half.ahead.mean == pytest.approx(0.02)
    lines = results._answers(Study([Group("mae", mae), Group("daae", daae)], None, True))
    assert lines[2] == "|  | mae | daae | raw 32 px pixels | untrained encoder |"
    (row,) = [line for line in lines if line.startswith("| fine-tuned 2 epochs |")]
    assert row.startswith("| fine-tuned 2 epochs | 51.0 ± 1.4 | 53.0 ± ")
    assert row.endswith(" |  |  |")


def test_runs_that_were_asked_nothing_have_no_table(tmp_path):
    run = answered(tmp_path, "mae", 0, 0.3, 0.2)
    study = Study([Group("mae", [dataclasses.replace(run, asked={})])], None, True)
    assert answers.table(study) == ([], [])
