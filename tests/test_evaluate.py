"""`daae evaluate` on a real run: what is scored against what, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, ResourceError, UsageError
from pipeline.store import Store
from tests.images import make_folder
from tests.test_pretrain import flags
from tools import compare, convert
from train import evaluate, finetune, folder
from train.evaluation import cache, exam, features, featurise, probes
from train.evaluation.exam import Exam, mean_score
from train.pretrain import main as pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_scores_stand_beside_both_baselines_and_are_written(run_path, capsys, monkeypatch):
    monkeypatch.setattr(exam, "linear_epochs", lambda _: 5)
    assert evaluate.main([str(run_path), "--protocols", "ridge", "knn", "linear", "logistic", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((run_path / "evaluation.json").read_text()) == result
    assert result["step"] == 4
    assert result["leading_name"] == "ridge on class, mean of unseen"
    for each in (result, *result["baselines"].values()):
        found = each["scores"]["unseen"]["class"]
        assert set(found) == {"ridge", "knn1", "knn20", "linear", "logistic"}
        for score in found.values():
            assert score["count"] == 30  # the class that the bank does not know is not asked
            p = score["value"]
            assert score["standard_error"] == pytest.approx((p * (1 - p) / 30) ** 0.5)
        assert each["leading"] == found["ridge"]
    assert set(result["baselines"]) == {"pixels", "untrained"}
    assert result["baselines"]["untrained"]["scores"] != result["baselines"]["pixels"]["scores"]
    assert "pixels" in result["sentence"]


def test_the_table_is_printed_for_a_person(run_path, capsys):
    assert evaluate.main([str(run_path), "--protocols", "knn", "--no-baselines"]) == 0
    shown = capsys.readouterr().out
    assert "unseen" in shown
    assert shown.strip().splitlines()[-1].startswith("knn20 on class")


def test_a_checkpoint_is_chosen_by_its_step_or_its_folder(run_path):
    for wish in ("4", str(run_path / "checkpoints" / "step_000000004")):
        assert folder.chosen_checkpoint(run_path, wish).step == 4
    with pytest.raises(DataError, match=r"has no checkpoint of step 3 \(it has: 4\)"):
        evaluate.main([str(run_path), "--checkpoint", "3"])
    with pytest.raises(DataError, match="is damaged"):
        evaluate.main([str(run_path), "--checkpoint", str(run_path)])


def test_features_are_encoded_once_for_a_checkpoint(run_path, store_path, test_path, capsys, monkeypatch):
    words = [str(run_path), "--protocols", "knn", "--json"]

    def scored(*more: str) -> dict:
        assert evaluate.main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    shutil.rmtree(run_path / "cache", ignore_errors=True)
    first = scored()
    kept = sorted((run_path / "cache").iterdir())
    assert len(kept) == 6  # bank and test of the encoder, the untrained one, and pixels
    keys = [json.loads((each / "key.json").read_text()) for each in kept]
    assert {key["store"] for key in keys} == {Store.open(path).fingerprint for path in (store_path, test_path)}
    assert len({key.get("weights") for key in keys}) == 3
    opened = []
    genuine = features.open_loader
    monkeypatch.setattr(
        features, "open_loader", lambda store, *a, **k: opened.append(store.root) or genuine(store, *a, **k)
    )
    assert scored() == first
    assert opened == []
    torn = kept[0] / "features.npy"
    torn.write_bytes(torn.read_bytes()[:-1])
    (kept[1] / "features.npy").unlink()
    assert scored() == first
    assert len(opened) == 2
    opened.clear()
    scored("--feature", "cls", "--no-baselines")  # another key
    assert len(opened) == 2
    opened.clear()
    assert scored("--no-cache") == first
    assert len(opened) == 6
    assert len(list((run_path / "cache").iterdir())) == 8  # and nothing half-written


def test_features_on_the_disk_are_those_in_memory_rounded(run_path, store_path, tmp_path):
    settings, device = folder.run_settings(run_path), torch.device("cpu")
    start = featurise.untrained(settings, device)
    store, ids = Store.open(store_path), np.array([3, 5, 90])
    for made in (
        lambda cache: featurise.pixel_features(device, cache),
        lambda cache: featurise.encoder_features(start, settings, device, "cls", cache),
    ):
        exact, kept = made(None)(store, ids), made(tmp_path)(store, ids)
        assert kept.dtype == torch.float16
        assert torch.equal(kept, exact.half())
        assert torch.equal(made(tmp_path)(store, ids), kept)
        assert made(tmp_path)(store, ids[:0]).shape == (0, exact.shape[1])


def test_a_full_disk_leaves_no_half_written_features(tmp_path, monkeypatch):
    def batches() -> Iterator[torch.Tensor]:
        yield torch.ones(3, 4)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="no space left"):
        cache.kept(tmp_path, {"a": 1}, (6, 4), batches)
    assert list(tmp_path.iterdir()) == []
    found = cache.kept(tmp_path, {"a": 1}, (6, 4), lambda: iter([torch.ones(3, 4), torch.zeros(3, 4)]))
    assert found.tolist() == [[1.0] * 4] * 3 + [[0.0] * 4] * 3


# --- Few labels ---------------------------------------------------------------------------------------------------


def test_few_labels_are_balanced_and_fixed():
    draw = np.random.default_rng(0)
    ids, label = (
        np.sort(draw.choice(5000, 1000, replace=False)),
        torch.from_numpy(draw.choice(4, 1000, p=[0.6, 0.3, 0.08, 0.02])),
    )
    for share, each in ((0.01, 2), (0.1, 25), (0.0001, 1)):
        rows = exam.few(ids, label, share, 0)
        assert rows.tolist() == sorted(set(rows.tolist()))
        counts = torch.bincount(label[rows], minlength=4).tolist()
        there = torch.bincount(label, minlength=4).tolist()
        assert counts == [min(each, most) for most in there]
        assert torch.equal(exam.few(ids, label, share, 0), rows)
        assert not torch.equal(exam.few(ids, label, share, 1), rows)
    more, fewer = (set(exam.few(ids, label, share, 0).tolist()) for share in (0.1, 0.05))
    assert fewer < more  # those who are first in line stay so


def test_few_labels_are_probed_three_times_beside_all_of_them(run_path, capsys):
    words = [str(run_path), "--protocols", "knn", "ridge", "--no-baselines", "--label-share", "0.05", "0.5"]
    assert evaluate.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = result["scores"]["unseen"]["class"]
    assert set(scores) == {"knn1", "knn20", "ridge", "knn1 5%", "knn20 5%", "knn1 50%", "knn20 50%", "ridge 50%"}
    assert result["leading"] == scores["knn20"]
    assert scores["knn1 5%"]["labels"] == 4  # one of each class: too few to choose a penalty on
    assert scores["ridge 50%"]["labels"] == 48
    for name, score in scores.items():
        p = score["value"]
        assert score["standard_error"] == pytest.approx((p * (1 - p) / 30) ** 0.5)
        assert ("spread" in score) == ("%" in name)
        if "%" in name:
            assert score["draws"] == 3
            assert 90 * p == pytest.approx(round(90 * p))  # a mean of three counts out of thirty
    assert evaluate.main(words) == 0
    assert "draws ±" in capsys.readouterr().out


def test_a_mean_over_draws_keeps_the_error_of_the_pictures():
    scores = [probes.Score(value, 0.0, 100) for value in (0.2, 0.3, 0.4)]
    found = exam.over_draws(scores)
    assert found["value"] == pytest.approx(0.3)
    assert found["standard_error"] == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
    assert (found["spread"], found["draws"], found["count"]) == (pytest.approx(0.1), 3, 100)


def test_the_leading_neighbours_are_those_nearest_to_twenty(store_path):
    sitting = Exam.prepare(store_path, (), "class")
    for wish, leading in (((1, 20), "knn20"), ((10, 200), "knn10"), ((5,), "knn5")):
        result = sitting.sit(lambda _, ids: torch.randn(len(ids), 4), ("knn",), neighbours=wish)
        assert result["leading_name"].startswith(f"{leading} on class")
        assert set(result["scores"]["held-out"]["class"]) == {f"knn{k}" for k in wish}


def test_without_tests_a_fifth_is_held_out_and_never_trains_the_probe(store_path):
    sitting = Exam.prepare(store_path, (), "class")
    store = Store.open(store_path)
    held_out = sitting.held_out[store.root]
    assert 0.1 < held_out.float().mean() < 0.35
    truth = torch.from_numpy(store.label("class")[0].astype("int64"))
    # features that give the label away on the bank and lie on the held-out rows: a probe that saw those would not err
    told = torch.nn.functional.one_hot(truth, 4).float()
    lying = torch.where(held_out[:, None], told.roll(1, dims=1), told)
    result = sitting.sit(lambda _, ids: lying[ids], ("knn",))
    score = result["scores"]["held-out"]["class"]["knn1"]
    assert score["value"] == 0
    assert score["count"] == int(held_out.sum())
    assert sitting.sit(lambda _, ids: told[ids], ("knn",))["leading"]["value"] == 1


def test_five_folds_ask_every_image_once(store_path):
    sittings = [Exam.prepare(store_path, (), "class", fold=fold) for fold in range(exam.FIFTHS)]
    store = Store.open(store_path)
    held_out = torch.stack([sitting.held_out[store.root] for sitting in sittings])
    assert torch.equal(held_out.sum(dim=0), torch.ones(store.count, dtype=torch.int64))
    truth = torch.from_numpy(store.label("class")[0].astype("int64"))
    told = torch.nn.functional.one_hot(torch.where(held_out[0], (truth + 1) % 4, truth), 4).float()
    results = [sitting.sit(lambda _, ids: told[ids], ("knn",)) for sitting in sittings]
    score = exam.over_folds(results)["scores"]["held-out"]["class"]["knn20"]
    p = 1 - held_out[0].float().mean().item()  # the first fold's own pictures lie, and all of them are asked there
    assert (score["count"], score["value"]) == (store.count, pytest.approx(p))
    assert score["standard_error"] == pytest.approx((p * (1 - p) / store.count) ** 0.5)
    assert exam.over_folds(results)["leading_name"] == "knn20 on class, mean of held-out in 5 folds"


def test_folds_are_for_a_store_without_tests(run_path, store_path, tmp_path, capsys):
    with pytest.raises(UsageError, match="without --tests"):
        evaluate.main([str(run_path), "--folds"])
    assert pretrain(flags("mae-tiny", store_path, tmp_path / "a", "--steps", "1")) == 0
    with pytest.raises(UsageError, match="ask for --exits, --quarters and --agreement in a call without it"):
        evaluate.main([str(tmp_path / "a"), "--folds", "--agreement", "0.5"])
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "a"), "--folds", "--no-baselines", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["leading"]["count"] == Store.open(store_path).count
    with pytest.raises(UsageError, match=r"--fold 5: one of 0 to 4 fifths"):
        finetune.main([str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--fold", "5"])


def test_tests_that_share_pictures_with_the_bank_are_refused_unless_that_is_declared(tmp_path, capsys):
    stores = {}
    for name, first in (("bank", 0), ("other", 15)):  # nine pictures are in both
        make_folder(tmp_path / name, 24, 32, 4, first=first)
        stores[name] = tmp_path / f"{name}-store"
        assert convert.main([str(tmp_path / name), str(stores[name]), "--backends", "dali", "--quiet"]) == 0
    refusal = r"9 of the 24 pictures in .*other-store with a class are in .*bank-store too"
    with pytest.raises(UsageError, match=refusal):
        Exam.prepare(stores["bank"], (stores["other"],), "class")
    sitting = Exam.prepare(stores["bank"], (stores["other"],), "class", overlap=True)
    assert len(sitting.questions("other-store", "class")[0]) == 24
    words = ["--presets", "mae-tiny", "--data", str(stores["bank"]), "--tests", str(stores["other"]), "--seconds", "2"]
    words += ["--out", str(tmp_path / "out"), "--dry-run", "--settings", "optim.batch=16"]
    with pytest.raises(UsageError, match=refusal):
        compare.main(words)
    assert compare.main([*words, "watch.overlap=true"]) == 0


def test_near_duplicates_stay_on_one_side_of_a_fold_and_of_what_is_held_out(tmp_path):
    root = tmp_path / "images"
    paths = make_folder(root, 24, 32)
    rows = [f"{path.name},kind-{i % 2},thing-{i // 2}" for i, path in enumerate(paths)]
    (root / "labels.csv").write_text("path,kind,thing\n" + "\n".join(rows) + "\n")
    convert.main([str(root), str(tmp_path / "store"), "--backends", "dali", "--quiet"])
    sitting = Exam.prepare(tmp_path / "store", (), "kind")
    groups = sitting._near_duplicates("kind")
    assert groups is not None
    assert np.bincount(groups.numpy()).tolist() == [2] * 12
    held_out = set(groups[sitting.held_out[sitting.bank.root]].tolist())
    assert 0 < len(held_out) < 12
    assert not held_out & set(groups[~sitting.held_out[sitting.bank.root]].tolist())
    assert sitting._near_duplicates("thing") is None
    assert sitting.columns() == ["kind", "thing"]


def test_pictures_of_unknown_things_are_no_near_duplicates_of_one_another(tmp_path):
    root = tmp_path / "images"
    paths = make_folder(root, 24, 32)
    rows = [f"{path.name},kind-{i % 2},{f'thing-{i // 2}' if i < 16 else ''}" for i, path in enumerate(paths)]
    (root / "labels.csv").write_text("path,kind,thing\n" + "\n".join(rows) + "\n")
    convert.main([str(root), str(tmp_path / "store"), "--backends", "dali", "--quiet"])
    groups = Exam.prepare(tmp_path / "store", (), "kind")._near_duplicates("kind")
    assert groups is not None
    assert sorted(groups.unique(return_counts=True)[1].tolist()) == [1] * 8 + [2] * 8


def test_where_tests_are_by_other_makers_each_maker_of_the_bank_is_left_out_in_turn(tmp_path, monkeypatch):
    stores = {}
    for name, first in (("bank", 0), ("other", 40)):
        root = tmp_path / name
        paths = make_folder(root, 24, 32, first=first)
        rows = [f"{path.name},kind-{i % 2},{'abc'[i % 3]}" for i, path in enumerate(paths)]
        (root / "labels.csv").write_text("path,kind,source\n" + "\n".join(rows) + "\n")
        stores[name] = tmp_path / f"{name}-store"
        assert convert.main([str(root), str(stores[name]), "--backends", "dali", "--quiet"]) == 0
    sitting = Exam.prepare(stores["bank"], (stores["other"],), "kind")
    assert sitting.columns() == ["kind"]
    asked = []

    def ridge(*args, groups, **more):
        asked.append(groups)
        return genuine(*args, groups=groups, **more)

    genuine = probes.ridge
    monkeypatch.setattr(probes, "ridge", ridge)
    sitting.sit(lambda _, ids: torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(0)), ("ridge",))
    assert asked[0].tolist() == Store.open(stores["bank"]).label("source")[0].tolist()
    assert [len(part) for part in probes.folds(24, asked[0], 0)] == [8, 8, 8]
    # Held out of the bank itself, the test is by the same makers.
    assert Exam.prepare(stores["bank"], (), "kind").fold_groups("kind") is None


def test_mean_of_two_tests_and_its_error():
    parts = [{"value": 0.3, "standard_error": 0.03, "count": 10}, {"value": 0.5, "standard_error": 0.04, "count": 30}]
    assert mean_score(parts) == {"value": 0.4, "standard_error": pytest.approx(0.035), "count": 40}


def test_what_cannot_be_scored_is_refused(run_path, store_path, unlabelled_path, tmp_path):
    with pytest.raises(DataError, match="is no run folder"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(DataError, match="has no labels"):
        evaluate.main([str(run_path), "--data", str(unlabelled_path)])
    with pytest.raises(DataError, match="no label column 'colour'"):
        evaluate.main([str(run_path), "--label", "colour"])
    with pytest.raises(UsageError, match="is the training set itself"):
        evaluate.main([str(run_path), "--tests", str(store_path)])
    with pytest.raises(UsageError, match="two stores are called val, and scores go by that name"):
        evaluate.main([str(run_path), "--tests", "a/val", "b/val"])
    with pytest.raises(UsageError, match="--label-share wants shares"):
        evaluate.main([str(run_path), "--label-share", "0"])
    with pytest.raises(UsageError, match="--neighbours wants numbers"):
        evaluate.main([str(run_path), "--neighbours", "0"])


def test_only_labelled_samples_are_encoded(tmp_path):
    root = tmp_path / "images"
    paths = make_folder(root, 24, 32)
    rows = [f"{path.name},kind-{i % 2}" for i, path in enumerate(paths) if i % 3]
    (root / "labels.csv").write_text("path,kind\n" + "\n".join(rows) + "\n")
    convert.main([str(root), str(tmp_path / "store"), "--backends", "dali", "--quiet"])
    sitting, asked = Exam.prepare(tmp_path / "store", (), "kind"), []
    truth = Store.open(tmp_path / "store").label("kind")[0]

    def featurise(_store: Store, ids: np.ndarray) -> torch.Tensor:
        asked.append(ids)
        return torch.nn.functional.one_hot(torch.from_numpy(truth[ids]).long(), 2).float()

    result = sitting.sit(featurise, ("knn",))
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
        featurise.pixel_features(torch.device("cpu")), ("knn",)
    )
    assert result["leading_name"] == "knn1 on class, mean of unseen"
    assert result["leading"] == result["scores"]["unseen"]["class"]["knn1"]
