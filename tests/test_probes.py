"""Neighbours, ridge, logistic and linear probe against slow textbook versions and scikit-learn."""

from __future__ import annotations

import math
import os
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from pipeline.errors import DataError
from tests import textbook
from tests.conftest import PYTHON
from train.evaluation import probes
from train.evaluation.probes import accuracy, folds, linear_probe, logistic, match_labels, neighbours, ridge, vote

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, width: int, classes: int, *, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal clouds around centres that are the same for every seed; features far from standardised."""
    centre = torch.randn(classes, width, generator=generator(0))
    label = torch.arange(count) % classes
    noise = torch.randn(count, width, generator=generator(seed))
    stretch = torch.logspace(-2, 2, width)
    return (centre[label] + spread * noise) * stretch + 3, label


# --- kNN ----------------------------------------------------------------------------------------------------------


def knn(
    bank: torch.Tensor, label: torch.Tensor, query: torch.Tensor, *, k: int, classes: int, temperature: float = 0.07
) -> torch.Tensor:
    near, place = neighbours(bank, query, k)
    return vote(near, label[place], temperature=temperature, classes=classes)


def test_each_picture_is_its_own_nearest_neighbour():
    features, label = torch.randn(300, 16, generator=generator(1)), torch.randint(50, (300,), generator=generator(2))
    assert torch.equal(knn(features, label, features * 7.5, k=1, classes=50), label)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_votes_as_the_textbook_does(k: int):
    bank, label = blobs(90, 6, 7, spread=1.5, seed=1)
    query, _ = blobs(60, 6, 7, spread=1.5, seed=2)
    expected = textbook.weighted_knn(bank, label, query, k=k, temperature=0.07)
    assert knn(bank, label, query, k=k, classes=7).tolist() == expected


def test_an_infinite_temperature_is_a_majority_vote():
    bank, label = torch.randn(90, 8, generator=generator(3)), torch.randint(5, (90,), generator=generator(4))
    query = torch.randn(80, 8, generator=generator(5))
    majority = textbook.majority_knn(bank, label, query, k=9)
    assert knn(bank, label, query, k=9, temperature=math.inf, classes=5).tolist() == majority
    # The weights decide some of these votes, or the comparison above would say nothing.
    assert knn(bank, label, query, k=9, temperature=0.07, classes=5).tolist() != majority


def test_a_tiny_temperature_follows_the_nearest_alone():
    bank, label = torch.randn(90, 8, generator=generator(3)), torch.randint(5, (90,), generator=generator(4))
    query = torch.randn(80, 8, generator=generator(5))
    nearest = knn(bank, label, query, k=1, classes=5)
    assert torch.equal(knn(bank, label, query, k=30, temperature=1e-5, classes=5), nearest)


@pytest.mark.parametrize("queries", [50, 1000])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_chunks_do_not_change_the_neighbours(rows: int, queries: int):
    bank, _ = blobs(200, 12, 9, spread=2.0, seed=1)
    query, _ = blobs(131, 12, 9, spread=2.0, seed=2)
    cosine = F.normalize(query, dim=1) @ F.normalize(bank, dim=1).T
    near, place = cosine.topk(10, dim=1)
    found, where = neighbours(bank, query, 10, rows=rows, queries=queries)
    assert torch.equal(where, place)
    torch.testing.assert_close(found, near, rtol=0, atol=1e-6)


def test_half_precision_features_have_the_same_neighbours():
    bank = torch.randn(300, 16, generator=generator(1)).half()
    query = bank[:50] * 2
    near, place = neighbours(bank, query, 3)
    assert near.dtype == torch.float32
    assert torch.equal(place[:, 0], torch.arange(50))
    torch.testing.assert_close(near[:, 0], torch.ones(50), rtol=0, atol=1e-6)
    whole, where = neighbours(bank.float(), query.float(), 3)
    assert torch.equal(where, place)
    assert torch.equal(whole, near)


LARGE = """
import resource, sys
import numpy as np, torch
from train.evaluation.probes import neighbours

def data_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    return 1024 * int(line.split()[1])

path, rows, width, queries = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_num_threads(1)
neighbours(torch.randn(100, 8), torch.randn(10, 8), 3)  # whatever a first call loads
bank = torch.from_numpy(np.load(path, mmap_mode="c"))
query = bank[:: rows // queries][:queries].clone()
limit = 8 * queries * width + 16 * queries * 20 + 8 * 2**14 * width + 4 * 2**14 * min(queries, 2**12) + 24 * 2**12 * 20
limit += 96 * 2**20  # what a matrix product's library takes for itself, which differs by processor
naive = 4 * rows * width
assert limit < naive, (limit, naive)
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + limit,) * 2)
near, place = neighbours(bank, query, 20)
assert torch.equal(place[:, 0], torch.arange(queries) * (rows // queries))
try:
    bank.float()
except RuntimeError:
    print("the bank in float32 would not have fitted")
"""


@pytest.mark.parametrize(
    ("rows", "width", "queries"), [(262_144, 256, 500), pytest.param(262_144, 768, 5000, marks=pytest.mark.slow)]
)
def test_neighbours_in_a_large_bank_take_no_more_memory_than_they_say(tmp_path, rows: int, width: int, queries: int):
    """Under a limit of what the docstring says, which the bank alone would break in float32."""
    draw = np.random.default_rng(0)
    with open(tmp_path / "bank.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (rows, width)})
        for _ in range(rows // 8192):
            file.write((draw.random((8192, width), np.float32) - 0.5).astype(np.float16).tobytes())
    words = [PYTHON, "-c", LARGE, str(tmp_path / "bank.npy"), str(rows), str(width), str(queries)]
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system, not into gaps
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, env=at_once)
    assert done.returncode == 0, done.stderr
    assert "would not have fitted" in done.stdout


def test_k_is_cut_to_the_bank():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.01], [0.0, 1.0]])
    assert knn(bank, torch.tensor([0, 0, 1]), query, k=200, classes=2).tolist() == [0, 1]


# --- Ridge --------------------------------------------------------------------------------------------------------


def standardised(bank: torch.Tensor, query: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(bank.double().numpy())
    return np.asarray(scaler.transform(bank.double().numpy())), np.asarray(scaler.transform(query.double().numpy()))


SHAPES = [(120, 20), (60, 150)]  # more rows than features, and fewer


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_ridge_equals_scikit_learn_and_the_normal_equations(rows: int, width: int, penalty: float):
    bank, label = blobs(rows, width, 5, spread=2.5, seed=1)
    query, _ = blobs(400, width, 5, spread=2.5, seed=2)
    ours = ridge(bank, label, query, classes=5, penalties=[penalty])
    assert ours.penalty == penalty
    x, q = standardised(bank, query)
    classifier = RidgeClassifier(alpha=penalty * rows).fit(x, label.numpy())
    assert np.array_equal(ours.predicted.numpy(), np.asarray(classifier.predict(q)))
    target = F.one_hot(label, 5)
    scores = textbook.ridge_scores(torch.from_numpy(x), target, torch.from_numpy(q), penalty=penalty * rows)
    assert torch.equal(ours.predicted, scores.argmax(dim=1))


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_leaving_out_a_fold_equals_fitting_without_it(rows: int, width: int):
    bank, label = blobs(rows, width, 5, spread=2.5, seed=1)
    parts, penalties = folds(rows, None, seed=3), [1e-4, 1e-2, 1.0, 1e4]
    fit = probes._Ridge(bank, label, 5)
    x, _ = standardised(bank, bank)
    fold = np.empty(rows, int)
    for number, part in enumerate(parts):
        fold[part.numpy()] = number
    target = F.one_hot(label, 5).numpy()
    answers = [list(fit.held_out(part, penalties)) for part in parts]
    for place, penalty in enumerate(penalties):
        expected = np.empty(target.shape)
        for number in range(len(parts)):
            left = fold != number
            expected[~left] = Ridge(alpha=penalty * left.sum()).fit(x[left], target[left]).predict(x[~left])
        for part, answer in zip(parts, answers, strict=True):
            np.testing.assert_allclose(answer[place].numpy(), expected[part.numpy()], atol=2e-7)
        score = (expected.argmax(1) == label.numpy()).mean()
        assert ridge(bank, label, bank, classes=5, penalties=[penalty], seed=3).bank_score == pytest.approx(score)


def test_the_penalty_is_the_best_on_the_bank_and_the_larger_of_equals():
    bank, label = blobs(100, 80, 4, spread=4.0, seed=1)
    tried = {p: ridge(bank, label, bank, classes=4, penalties=[p]).bank_score for p in probes.PENALTIES}
    best = max(tried.values())
    chosen = ridge(bank, label, bank, classes=4)
    assert chosen.bank_score == best
    assert chosen.penalty == max(p for p, score in tried.items() if score == best)
    assert len(set(tried.values())) > 3  # the penalty matters here
    apart, label = blobs(100, 10, 4, spread=0.1, seed=1)
    easy = ridge(apart, label, apart, classes=4, penalties=[1e-3, 1e-1, 1e-2])
    assert (easy.penalty, easy.bank_score) == (0.1, 1.0)


def test_the_query_has_no_say_in_the_fit():
    bank, label = blobs(100, 30, 4, spread=3.0, seed=1)
    query, _ = blobs(90, 30, 4, spread=3.0, seed=2)
    whole = ridge(bank, label, query, classes=4)
    order = torch.randperm(90, generator=generator(0))
    shuffled = ridge(bank, label, query[order], classes=4)
    assert torch.equal(shuffled.predicted, whole.predicted[order])
    alone = ridge(bank, label, torch.cat([query[:1], query[1:2] * 1e6]), classes=4)
    assert alone.predicted[0] == whole.predicted[0]
    assert (
        (shuffled.penalty, shuffled.bank_score)
        == (alone.penalty, alone.bank_score)
        == (whole.penalty, whole.bank_score)
    )


def test_blocks_do_not_change_the_ridge(monkeypatch: pytest.MonkeyPatch):
    bank, label = blobs(103, 30, 4, spread=3.0, seed=1)
    query, _ = blobs(90, 30, 4, spread=3.0, seed=2)
    whole = ridge(bank, label, query, classes=4)
    monkeypatch.setattr(probes, "BLOCK", 60 * 8)  # eight rows at once
    small = ridge(bank, label, query, classes=4)
    assert torch.equal(small.predicted, whole.predicted)
    assert (small.penalty, small.bank_score) == (whole.penalty, whole.bank_score)


def test_constant_features_and_unknown_rows_change_nothing():
    bank, label = blobs(100, 30, 4, spread=3.0, seed=1)
    query, _ = blobs(200, 30, 4, spread=3.0, seed=2)
    plain = ridge(bank, label, query, classes=4, penalties=[0.1])
    dead = torch.full((100, 1), 0.1)
    dead[:50] += 1e-8  # one step of float32
    wider = torch.cat([bank, dead, torch.zeros(100, 1)], dim=1)
    asked = torch.cat([query, torch.full((200, 1), 9.0), torch.ones(200, 1)], dim=1)
    # Of 32 features 30 vary: the mean variance, and with it the penalty's unit, is 30/32.
    padded = ridge(wider, label, asked, classes=4, penalties=[0.1 * 32 / 30])
    assert torch.equal(padded.predicted, plain.predicted)
    assert padded.bank_score == plain.bank_score
    noise = torch.randn(20, 30, generator=generator(9)) * 100
    unknown = ridge(
        torch.cat([noise, bank]), torch.cat([torch.full((20,), -1), label]), query, classes=4, penalties=[0.1]
    )
    assert torch.equal(unknown.predicted, plain.predicted)


def test_features_without_any_variance_predict_the_largest_class():
    label = torch.tensor([2, 2, 2, 1, 0, 2])
    assert ridge(torch.ones(6, 3), label, torch.randn(4, 3), classes=4).predicted.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_stay_in_one_fold(seed: int):
    group = torch.arange(101) // 2 * 10
    parts = folds(101, group, seed)
    assert len(parts) == 5
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(101))
    seen = [set(group[part].tolist()) for part in parts]
    assert sum(map(len, seen)) == len(set(group.tolist()))  # no group in two folds
    assert all(18 <= len(part) <= 22 for part in parts)
    assert [part.tolist() for part in parts] == [part.tolist() for part in folds(101, group, seed)]
    assert [part.tolist() for part in parts] != [part.tolist() for part in folds(101, group, seed + 1)]


def test_folds_stay_small_in_a_large_bank():
    parts = folds(20_000, None, seed=0)
    assert len(parts) == 10
    assert max(map(len, parts)) == 2000


def test_near_duplicates_flatter_the_bank_score_unless_grouped():
    """Pictures of one thing by two vendors: labels by chance can be learned by heart, not predicted."""
    things = torch.randn(100, 200, generator=generator(1))
    label = torch.randint(2, (100,), generator=generator(2)).repeat(2)
    bank = torch.cat([things, things + 0.01 * torch.randn(100, 200, generator=generator(3))])
    thing = torch.arange(100).repeat(2)
    loose = ridge(bank, label, bank, classes=2, penalties=[1e-2])
    tied = ridge(bank, label, bank, classes=2, penalties=[1e-2], groups=thing)
    assert loose.bank_score > 0.8
    assert 0.3 < tied.bank_score < 0.7


def test_one_group_cannot_be_cross_validated():
    bank, label = blobs(10, 4, 2, spread=1.0, seed=1)
    with pytest.raises(DataError, match="at least 2"):
        ridge(bank, label, bank, classes=2, groups=torch.zeros(10, dtype=torch.int64))
    with pytest.raises(DataError, match="no picture of the bank has a label"):
        ridge(bank, torch.full((10,), -1), bank, classes=2)


# --- Logistic regression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 10.0])
def test_logistic_regression_equals_scikit_learns(rows: int, width: int, penalty: float):
    bank, label = blobs(rows, width, 5, spread=2.5, seed=1)
    query, _ = blobs(400, width, 5, spread=2.5, seed=2)
    fit = probes._Logistic(bank, label, 5)
    weight = fit.weights(bank, label, penalty)
    shares = (fit.standard(query) @ weight[:-1] + weight[-1]).softmax(dim=1)
    x, q = standardised(bank, query)
    theirs = LogisticRegression(C=1 / (rows * penalty), tol=1e-9, max_iter=10_000).fit(x, label.numpy())
    np.testing.assert_allclose(shares.numpy(), theirs.predict_proba(q), atol=1e-3)
    ours = logistic(bank, label, query, classes=5, penalties=[penalty])
    assert ours.penalty == penalty
    assert torch.equal(ours.predicted, shares.argmax(dim=1))


def test_the_penalty_of_logistic_regression_is_the_best_on_folds_that_are_ridges():
    bank, label = blobs(100, 40, 4, spread=4.0, seed=1)
    group = torch.arange(100) // 2
    penalties = [1e-3, 1e-1, 1.0]
    right = dict.fromkeys(penalties, 0)
    for part in folds(100, group, seed=2):
        rest = torch.ones(100, dtype=torch.bool).index_fill_(0, part, False)
        scaler = StandardScaler().fit(bank.double().numpy())
        x, y = np.asarray(scaler.transform(bank.double().numpy())), label.numpy()
        for penalty in penalties:
            theirs = LogisticRegression(C=1 / (int(rest.sum()) * penalty), tol=1e-8, max_iter=10_000)
            right[penalty] += int((theirs.fit(x[rest], y[rest]).predict(x[part]) == y[part]).sum())
    found = logistic(bank, label, bank, classes=4, penalties=penalties, groups=group, seed=2)
    assert len(set(right.values())) > 1
    assert found.penalty == max(penalties, key=lambda each: (right[each], each))
    assert found.bank_score == pytest.approx(max(right.values()) / 100, abs=0.021)


def test_blocks_and_unknown_rows_do_not_change_logistic_regression(monkeypatch: pytest.MonkeyPatch):
    bank, label = blobs(60, 10, 4, spread=3.0, seed=1)
    query, _ = blobs(90, 10, 4, spread=3.0, seed=2)
    whole = logistic(bank, label, query, classes=4)
    noise = torch.randn(20, 10, generator=generator(9)) * 100
    known = torch.cat([noise, bank]), torch.cat([torch.full((20,), -1), label])
    assert torch.equal(logistic(*known, query, classes=4).predicted, whole.predicted)
    monkeypatch.setattr(probes, "BLOCK", 20 * 8)  # eight rows at once
    small = logistic(bank, label, query, classes=4)
    assert torch.equal(small.predicted, whole.predicted)
    assert (small.penalty, small.bank_score) == (whole.penalty, whole.bank_score)


# --- Linear probe -------------------------------------------------------------------------------------------------


def test_the_linear_probe_tells_separable_blobs_apart():
    bank, label = blobs(600, 24, 6, spread=0.5, seed=1)
    query, truth = blobs(300, 24, 6, spread=0.5, seed=2)
    # 400 epochs move LARS so little that the outcome hangs on the first weights, which differ between torch versions.
    predicted = linear_probe(bank, label, query, classes=6, epochs=1500, batch=300)
    assert accuracy(predicted, truth).value > 0.95


def test_the_linear_probe_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    bank, label = blobs(100, 8, 5, spread=2.0, seed=1)
    query, _ = blobs(500, 8, 5, spread=2.0, seed=2)
    before = torch.random.get_rng_state()
    first = linear_probe(bank, label, query, classes=5, epochs=3, batch=32)
    again = linear_probe(bank, label, query, classes=5, epochs=3, batch=32)
    other = linear_probe(bank, label, query, classes=5, epochs=3, batch=32, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_trained_probe_answers_each_query_by_itself():
    bank, label = blobs(100, 8, 5, spread=2.0, seed=1)
    query, _ = blobs(300, 8, 5, spread=2.0, seed=2)
    whole = linear_probe(bank, label, query, classes=5, epochs=20, batch=50)
    far = torch.cat([query[:10], query[10:] * 100])  # a norm that looked at the queries would see another world
    assert torch.equal(linear_probe(bank, label, far, classes=5, epochs=20, batch=50)[:10], whole[:10])
    assert linear_probe(bank, label, query[:1], classes=5, epochs=20, batch=50).tolist() == whole[:1].tolist()


def test_rows_without_a_label_do_not_train_the_probe():
    bank, label = blobs(100, 8, 5, spread=2.0, seed=1)
    query, _ = blobs(200, 8, 5, spread=2.0, seed=2)
    more = torch.cat([bank, torch.full((30, 8), 1e4)])
    unknown = torch.cat([label, torch.full((30,), -1)])
    assert torch.equal(
        linear_probe(more, unknown, query, classes=5, epochs=5), linear_probe(bank, label, query, classes=5, epochs=5)
    )
    with pytest.raises(DataError, match="at least 2"):
        linear_probe(bank, torch.full((100,), -1), query, classes=5)


def test_the_probe_layers_are_the_specified_ones():
    norm, linear = probes.probe_layers(200, 300, seed=0)
    assert list(norm.parameters()) == []
    assert norm.eps == 1e-6
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not linear.bias.any()


def test_lars_takes_the_textbook_step():
    linear = torch.nn.Linear(7, 5, dtype=torch.float64)
    optimizer = probes.lars(linear)
    expected = {name: (value.detach().clone(), torch.zeros_like(value)) for name, value in linear.named_parameters()}
    for step, lr in enumerate([0.0, 6.4, 3.0, 50.0]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, value in linear.named_parameters():
            value.grad = torch.randn(value.shape, generator=generator(step), dtype=torch.float64) * 10.0 ** (step - 2)
            expected[name] = textbook.lars_step(expected[name][0], value.grad, expected[name][1], lr=lr)
        optimizer.step()
        for name, value in linear.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name][0], rtol=1e-12, atol=1e-15)
    # A zero gradient must leave a weight to its momentum, not turn it into nan.
    linear.weight.grad = torch.zeros_like(linear.weight)
    optimizer.step()
    assert torch.isfinite(linear.weight).all()


def test_the_rate_of_the_probe_warms_up_and_ends_near_zero(monkeypatch: pytest.MonkeyPatch):
    """lr = 0.1 B / 256 at the end of 10 of 90 epochs; B is what fits, 128 of 150 rows cut to one batch an epoch."""
    rates = []
    made = probes.lars

    def spied(linear: torch.nn.Linear) -> torch.optim.Optimizer:
        optimizer = made(linear)
        optimizer.register_step_pre_hook(lambda one, *_: rates.append([group["lr"] for group in one.param_groups]))
        return optimizer

    monkeypatch.setattr(probes, "lars", spied)
    bank, label = blobs(150, 4, 3, spread=1.0, seed=1)
    linear_probe(bank, label, bank, classes=3, batch=128)
    assert len(rates) == 90
    assert all(weight == bias for weight, bias in rates)
    rate = [weight for weight, _ in rates]
    assert rate[0] == 0
    assert rate[5] == pytest.approx(0.025)
    assert max(rate) == rate[10] == pytest.approx(0.05)
    assert rate[50] == pytest.approx(0.025)
    assert rate[-1] == pytest.approx(0.025 * (1 + math.cos(math.pi * 79 / 80)))


# --- Scores -------------------------------------------------------------------------------------------------------


def test_accuracy_counts_known_truths_only_and_says_how_sure_it_is():
    predicted, truth = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 1, 2, 0, -1])
    score = accuracy(predicted, truth)
    assert (score.value, score.count) == (0.75, 4)
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    # ImageNet's validation set: 0.17 points at 83.5 % of 50,000.
    answers = (torch.arange(50_000) >= 41_750).long()
    assert accuracy(answers, torch.zeros(50_000)).standard_error == pytest.approx(0.00166, abs=5e-6)
    with pytest.raises(DataError, match="no picture to be scored has a label"):
        accuracy(predicted, torch.full((5,), -1))


def test_labels_are_matched_by_name():
    bank, test = ["cat", "dog", "fish"], ["fish", "bird", "cat"]
    label = torch.tensor([0, 1, 2, -1, 0], dtype=torch.int32)
    assert match_labels(bank, test, label).tolist() == [2, -1, 0, -1, 2]
