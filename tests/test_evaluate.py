"""`daae evaluate` on a real run: what is scored against what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, UsageError
from pipeline.store import Store
from tests.images import make_folder
from tests.test_pretrain import flags
from tools import convert
from train import evaluate, probes
from train.evaluate import Exam, mean_score
from train.pretrain import main as pretrain


@pytest.fixture(scope="module")
def test_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pictures of the same four classes, in which one class bears a name that the bank does not know."""
    root = tmp_path_factory.mktemp("other")
    make_folder(root / "images", 40, 64, 4, first=500)
    (root / "images" / "class-3").rename(root / "images" / "stranger")
    assert convert.main([str(root / "images"), str(root / "unseen"), "--backends", "dali", "--quiet"]) == 0
    return root / "unseen"


@pytest.fixture(scope="module")
def run_path(store_path: Path, test_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    tests = ["--tests", str(test_path), "--label", "class"]
    assert pretrain(flags("daae-tiny", store_path, out, "--steps", "4", *tests)) == 0
    return out


def test_scores_stand_beside_both_baselines_and_are_written(run_path, capsys):
    assert evaluate.main([str(run_path), "--protocols", "ridge", "knn", "linear", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((run_path / "evaluation.json").read_text()) == result
    assert result["step"] == 4
    assert result["leading_name"] == "ridge on class, mean of unseen"
    for each in (result, *result["baselines"].values()):
        probes = each["scores"]["unseen"]["class"]
        assert set(probes) == {"ridge", "knn1", "knn20", "linear"}
        for score in probes.values():
            assert score["count"] == 30  # the class that the bank does not know is not asked
            p = score["value"]
            assert score["standard_error"] == pytest.approx((p * (1 - p) / 30) ** 0.5)
        assert each["leading"] == probes["ridge"]
    assert set(result["baselines"]) == {"pixels", "untrained"}
    assert result["baselines"]["untrained"]["scores"] != result["baselines"]["pixels"]["scores"]
    assert "pixels" in result["sentence"]


def test_the_table_is_printed_for_a_person(run_path, capsys):
    assert evaluate.main([str(run_path), "--protocols", "knn", "--no-baselines"]) == 0
    shown = capsys.readouterr().out
    assert "unseen" in shown
    assert shown.strip().splitlines()[-1].startswith("knn20 on class")


def test_without_tests_a_fifth_is_held_out_and_never_trains_the_probe(store_path):
    exam = Exam.prepare(store_path, (), "class")
    store = Store.open(store_path)
    held_out = exam.held_out[store.root]
    assert 0.1 < held_out.float().mean() < 0.35
    truth = torch.from_numpy(store.label("class")[0].astype("int64"))
    # features that give the label away on the bank and lie on the held-out rows: a probe that saw those would not err
    told = torch.nn.functional.one_hot(truth, 4).float()
    lying = torch.where(held_out[:, None], told.roll(1, dims=1), told)
    result = exam.sit(lambda _, ids: lying[ids], ("knn",))
    score = result["scores"]["held-out"]["class"]["knn1"]
    assert score["value"] == 0
    assert score["count"] == int(held_out.sum())
    assert exam.sit(lambda _, ids: told[ids], ("knn",))["leading"]["value"] == 1


def test_near_duplicates_stay_on_one_side_of_a_fold(tmp_path):
    root = tmp_path / "images"
    paths = make_folder(root, 24, 32)
    rows = [f"{path.name},kind-{i % 2},thing-{i // 2}" for i, path in enumerate(paths)]
    (root / "labels.csv").write_text("path,kind,thing\n" + "\n".join(rows) + "\n")
    convert.main([str(root), str(tmp_path / "store"), "--backends", "dali", "--quiet"])
    exam = Exam.prepare(tmp_path / "store", (), "kind")
    groups = exam._near_duplicates("kind")
    assert groups is not None
    assert np.bincount(groups.numpy()).tolist() == [2] * 12
    assert exam._near_duplicates("thing") is None
    assert exam.columns() == ["kind", "thing"]


def test_where_tests_are_by_other_makers_each_maker_of_the_bank_is_left_out_in_turn(tmp_path, monkeypatch):
    stores = {}
    for name, first in (("bank", 0), ("other", 40)):
        root = tmp_path / name
        paths = make_folder(root, 24, 32, first=first)
        rows = [f"{path.name},kind-{i % 2},{'abc'[i % 3]}" for i, path in enumerate(paths)]
        (root / "labels.csv").write_text("path,kind,source\n" + "\n".join(rows) + "\n")
        stores[name] = tmp_path / f"{name}-store"
        assert convert.main([str(root), str(stores[name]), "--backends", "dali", "--quiet"]) == 0
    exam = Exam.prepare(stores["bank"], (stores["other"],), "kind")
    assert exam.columns() == ["kind"]
    asked = []

    def ridge(*args, groups, **more):
        asked.append(groups)
        return genuine(*args, groups=groups, **more)

    genuine = probes.ridge
    monkeypatch.setattr(probes, "ridge", ridge)
    exam.sit(lambda _, ids: torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(0)), ("ridge",))
    assert asked[0].tolist() == Store.open(stores["bank"]).label("source")[0].tolist()
    assert [len(part) for part in probes.folds(24, asked[0], 0)] == [8, 8, 8]
    # Held out of the bank itself, the test is by the same makers.
    assert Exam.prepare(stores["bank"], (), "kind")._fold_groups("kind") is None


def test_mean_of_two_tests_and_its_error():
    parts = [{"value": 0.3, "standard_error": 0.03, "count": 10}, {"value": 0.5, "standard_error": 0.04, "count": 30}]
    assert mean_score(parts) == {"value": 0.4, "standard_error": pytest.approx(0.025), "count": 40}


def test_what_cannot_be_scored_is_refused(run_path, store_path, unlabelled_path, tmp_path):
    with pytest.raises(DataError, match="is no run folder"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(DataError, match="has no labels"):
        evaluate.main([str(run_path), "--data", str(unlabelled_path)])
    with pytest.raises(DataError, match="no label column 'colour'"):
        evaluate.main([str(run_path), "--label", "colour"])
    with pytest.raises(UsageError, match="is the training set itself"):
        evaluate.main([str(run_path), "--tests", str(store_path)])


def test_only_labelled_samples_are_encoded(tmp_path):
    root = tmp_path / "images"
    paths = make_folder(root, 24, 32)
    rows = [f"{path.name},kind-{i % 2}" for i, path in enumerate(paths) if i % 3]
    (root / "labels.csv").write_text("path,kind\n" + "\n".join(rows) + "\n")
    convert.main([str(root), str(tmp_path / "store"), "--backends", "dali", "--quiet"])
    exam, asked = Exam.prepare(tmp_path / "store", (), "kind"), []
    truth = Store.open(tmp_path / "store").label("kind")[0]

    def featurise(_store: Store, ids: np.ndarray) -> torch.Tensor:
        asked.append(ids)
        return torch.nn.functional.one_hot(torch.from_numpy(truth[ids]).long(), 2).float()

    result = exam.sit(featurise, ("knn",))
    assert len(asked) == 1
    assert asked[0].tolist() == np.flatnonzero(truth >= 0).tolist()
    assert len(asked[0]) == 16
    assert result["leading"]["value"] == 1


def test_where_classes_have_one_or_two_pictures_the_nearest_alone_leads(tmp_path):
    make_folder(tmp_path / "images", 12, 48, 6)
    assert convert.main([str(tmp_path / "images"), str(tmp_path / "store"), "--backends", "dali", "--quiet"]) == 0
    make_folder(tmp_path / "more", 12, 48, 6, first=50)
    assert convert.main([str(tmp_path / "more"), str(tmp_path / "unseen"), "--backends", "dali", "--quiet"]) == 0
    result = Exam.prepare(tmp_path / "store", (tmp_path / "unseen",), None).sit(
        evaluate.pixel_features(torch.device("cpu")), ("knn",)
    )
    assert result["leading_name"] == "knn1 on class, mean of unseen"
    assert result["leading"] == result["scores"]["unseen"]["class"]["knn1"]
