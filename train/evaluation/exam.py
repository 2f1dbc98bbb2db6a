"""What features are asked: a labelled bank trains the probes, labelled test sets question them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pipeline.store import Store
    from train.evaluation.probes import Score

Protocol = Literal["ridge", "knn", "linear", "logistic"]
PROTOCOLS: tuple[Protocol, ...] = ("ridge", "knn")
KNN = (1, 20)
MIN_PER_CLASS = 4  # below, a class is missing from some fold and no penalty can be chosen on the bank
FIFTHS = 5  # that a store is cut into where one of them is held out
SOURCE = "source"  # the label column that tells who made a picture; it is never asked for
FINER = 4  # a column with this many times as many classes as another names individual things, not kinds
LINEAR_ROWS = 4_000_000  # rows x epochs that the linear probe needs to arrive
EVALUATION = "evaluation.json"  # in a run folder: the newest checkpoint's scores and the baselines'
LINEAR_BATCH = 4096  # of the linear probe; MAE's 16384 is for ImageNet
DRAWS, FEW_SEED = 3, 0  # subsets of each size where labels are few; the same for every encoder

Featurise = Callable[["Store", "np.ndarray"], "Tensor"]  # a store and the ids of samples in it -> (n, D)


@dataclass(frozen=True)
class Encoded:
    """Features of some samples of a store."""

    ids: np.ndarray  # ascending
    features: Tensor  # (n, D), of any float type

    def of(self, ids: np.ndarray) -> Tensor:
        """Those of `ids`, ascending, all among ours; ours themselves and no copy where that is all of them."""
        import numpy as np
        import torch

        if len(ids) == len(self.ids):
            return self.features
        return self.features[torch.from_numpy(np.searchsorted(self.ids, ids)).to(self.features.device)]


@dataclass
class Exam:
    """A labelled bank, labelled test sets, and a leading label column."""

    bank: Store
    tests: dict[str, Store]
    leading: str
    held_out: dict[Path, Tensor] = field(default_factory=dict)  # rows that no probe trains on, where a store is both

    @classmethod
    def prepare(
        cls, data: Path, tests: tuple[Path, ...], label: str | None, overlap: bool = False, *, fold: int = 0
    ) -> Exam:
        """overlap: a test store may hold pictures of the bank. fold: which of five is held out, without test stores.

        Raises DataError: no labels, fewer than two classes; UsageError: a test store that is the bank itself or, unless
        that is allowed, holds pictures of it, or generated images."""
        import torch

        from pipeline.sampling import uniform
        from pipeline.store import Store

        bank, stores = Store.open(data), {path.name: Store.open(path) for path in apart(tests)}
        for store in (bank, *stores.values()):
            store.check_real("evaluation")
        if not bank.columns:
            raise DataError(f"{data} has no labels, so nothing can be scored. Pass --tests and --data with labels.")
        leading = label or next(iter(bank.columns))
        known = bank.label(leading)[0]
        if len(set(known[known >= 0].tolist())) < 2:
            raise DataError(f"{data} has fewer than two classes in column {leading!r}: there is nothing to tell apart.")
        for path, store in zip(tests, stores.values(), strict=True):
            store.label(leading)
            if store.fingerprint == bank.fingerprint:
                raise UsageError(f"--tests {path} is the training set itself. Leave it out to hold out a fifth.")
            if not overlap:
                check_apart(bank, store, leading)
        if stores:
            return cls(bank, stores, leading)
        import numpy as np

        exam = cls(bank, {"held-out": bank}, leading)
        things = exam._near_duplicates(leading)  # held out together, all pictures of a thing
        draw = uniform(0, 0, "held out", np.arange(bank.count) if things is None else things.numpy(), 1)[:, 0]
        exam.held_out[bank.root] = torch.from_numpy(np.floor(draw * FIFTHS) == fold)
        return exam

    def training(self, column: str) -> tuple[np.ndarray, Tensor]:
        """Ids of the samples that may train for this column, ascending, and their labels."""
        import numpy as np
        import torch

        label = torch.from_numpy(self.bank.label(column)[0].astype("int64"))
        if self.bank.root in self.held_out:
            label = torch.where(self.held_out[self.bank.root], -1, label)
        ids = np.flatnonzero(label >= 0)
        return ids, label[ids]

    def questions(self, name: str, column: str) -> tuple[np.ndarray, Tensor]:
        """Ids of the samples of a test set that are asked for this column, ascending, and the bank's number of their
        class; one of a class that the bank does not have is not asked."""
        import numpy as np
        import torch

        from train.evaluation.probes import match_labels

        store = self.tests[name]
        label, names = store.label(column)
        truth = match_labels(self.bank.columns[column], names, torch.from_numpy(label.astype("int64")))
        if store.root in self.held_out:
            truth = torch.where(self.held_out[store.root], truth, -1)
        ids = np.flatnonzero(truth >= 0)
        return ids, truth[ids]

    def sit(
        self,
        featurise: Featurise,
        protocols: tuple[Protocol, ...],
        columns: list[str] | None = None,
        *,
        neighbours: tuple[int, ...] = KNN,
        label_shares: tuple[float, ...] = (),
    ) -> dict:
        """Score features on every test set: {"leading", "leading_name", "label", "scores"}.

        scores: test -> column -> probe -> {value, standard_error, count}. The leading score is the first protocol's on
        the leading column, averaged over the test sets. label_shares: for the leading column also by such shares of
        the bank's labels, as "ridge 1%" and so on; see low_label.
        """
        columns = columns or self.columns()
        encoded = {}
        for store in {store.root: store for store in (self.bank, *self.tests.values())}.values():
            ids = self.labelled(store, columns)
            encoded[store.root] = Encoded(ids, featurise(store, ids))
        scores: dict = {name: {} for name in self.tests}
        for column in columns:
            shares = label_shares if column == self.leading else ()
            for name, answers in self._probe(encoded, protocols, column, neighbours, shares).items():
                scores[name][column] = answers
        first = self._leading_neighbours(neighbours) if protocols[0] == "knn" else protocols[0]
        parts = [scores[name][self.leading].get(first) for name in self.tests]
        return {
            "label": self.leading, "leading": mean_score(parts) if all(parts) else None,
            "leading_name": f"{first} on {self.leading}, mean of {' and '.join(self.tests)}", "scores": scores,
        }  # fmt: skip

    def _leading_neighbours(self, neighbours: tuple[int, ...]) -> str:
        """Twenty, or what is nearest to that; of a class with one or two pictures no twenty can be near."""
        known = self.bank.label(self.leading)[0]
        few = (known >= 0).sum() <= 2 * len(self.bank.columns[self.leading])
        return f"knn{min(neighbours) if few else min(neighbours, key=lambda k: abs(k - 20))}"

    def columns(self) -> list[str]:
        """The leading column first, then the others that every test set has too."""
        shared = [c for c in self.bank.columns if all(c in store.columns for store in self.tests.values())]
        shared = [column for column in shared if column != SOURCE]
        return [self.leading, *(column for column in shared if column != self.leading)]

    def labelled(self, store: Store, columns: list[str]) -> np.ndarray:
        """Ids of the samples that have a label in any of these columns: nothing else is worth encoding."""
        import numpy as np

        return np.flatnonzero(np.any([store.label(column)[0] >= 0 for column in columns], axis=0))

    def fold_groups(self, column: str) -> Tensor | None:
        """(N,) which pictures of the bank stay together when a penalty is chosen; None where any may part.

        The folds ask what the test asks. Where the tests are by other makers, each maker of the bank is left out in
        turn: a penalty that serves for new things by the same hand is far too small for the same things by another.
        """
        import torch

        if self.bank.root not in self.held_out and len(self.bank.columns.get(SOURCE, ())) > 1:
            return torch.from_numpy(self.bank.label(SOURCE)[0].astype("int64"))
        return self._near_duplicates(column)

    def _near_duplicates(self, column: str) -> Tensor | None:
        """Pictures of one thing (one code point drawn by several vendors), which must not sit on both sides of a split.

        A column much finer than the one that is asked for tells them; most stores have none.
        """
        import torch

        finest = max(self.bank.columns, key=lambda name: len(self.bank.columns[name]))
        if len(self.bank.columns[finest]) < FINER * len(self.bank.columns[column]):
            return None
        thing = torch.from_numpy(self.bank.label(finest)[0].astype("int64"))
        # One whose thing is unknown is a thing by itself.
        return torch.where(thing >= 0, thing, thing.max() + 1 + torch.arange(len(thing)))

    def _probe(
        self,
        encoded: dict[Path, Encoded],
        protocols: tuple[Protocol, ...],
        column: str,
        neighbours: tuple[int, ...],
        label_shares: tuple[float, ...],
    ) -> dict[str, dict]:
        """Test -> probe -> score, for one column."""
        import torch

        asked = {name: self.questions(name, column) for name in self.tests}
        if column != self.leading and not all(len(ids) for ids, _ in asked.values()):
            return {name: {} for name in asked}  # another column of the same name, with other classes
        ids, label = self.training(column)
        bank, groups = encoded[self.bank.root].of(ids), self.fold_groups(column)
        queries = [encoded[self.tests[name].root].of(questions) for name, (questions, _) in asked.items()]
        query = torch.cat([each.to(bank.device) for each in queries])
        truths = {name: truth for name, (_, truth) in asked.items()}

        def scored(rows: Tensor | None = None) -> dict[str, dict[str, Score]]:
            """Test -> probe -> score, by the whole bank or by some rows of it."""
            some = slice(None) if rows is None else rows
            answers = ask(
                bank if rows is None else bank[rows.to(bank.device)], label[some], query, protocols=protocols,
                classes=len(self.bank.columns[column]), groups=None if groups is None else groups[ids][some],
                neighbours=neighbours,
            )  # fmt: skip
            return mark(answers, truths)

        result = {
            name: {probe: dataclasses.asdict(each) for probe, each in one.items()} for name, one in scored().items()
        }
        for share in label_shares:
            subsets = [few(ids, label, share, draw) for draw in range(DRAWS)]
            draws = [scored(rows) for rows in subsets]
            for name, probes in draws[0].items():
                for probe in probes:
                    drawn = over_draws([each[name][probe] for each in draws])
                    result[name][f"{probe} {100 * share:g}%"] = {**drawn, "labels": len(subsets[0])}
        return result


def check_apart(bank: Store, test: Store, column: str) -> None:
    """Raises UsageError where a picture asked of a test store is one of the bank's, byte for byte, label and all."""
    import numpy as np

    taught, asked = (store.index["sum"][store.label(column)[0] >= 0] for store in (bank, test))
    known = int(np.isin(asked, taught).sum())
    if known:
        raise UsageError(
            f"{known:,} of the {len(asked):,} pictures in {test.root} with a {column} are in {bank.root} too, label "
            "and all: a probe has seen the answers. Score on other pictures, or say that this is meant: --overlap."
        )


def ask(
    bank: Tensor,
    label: Tensor,
    query: Tensor,
    *,
    protocols: Sequence[Protocol],
    classes: int,
    groups: Tensor | None,
    neighbours: Sequence[int],
) -> dict[str, Tensor]:
    """Probe -> its predictions, (Q,) on the host. A bank with too few labels of each class answers for kNN alone."""
    from train.evaluation import probes

    answers = {}
    for protocol in protocols:
        if protocol == "knn":
            near, place = probes.neighbours(bank, query, max(neighbours))
            named = label.to(bank.device)[place]
            for k in neighbours:
                answers[f"knn{k}"] = probes.vote(near[:, :k], named[:, :k], classes=classes)
        elif len(label) < MIN_PER_CLASS * classes:
            continue
        elif protocol == "ridge":
            answers["ridge"] = probes.ridge(bank, label, query, classes=classes, groups=groups).predicted
        elif protocol == "logistic":
            answers["logistic"] = probes.logistic(bank, label, query, classes=classes, groups=groups).predicted
        else:
            answers["linear"] = probes.linear_probe(
                bank, label, query, classes=classes, batch=LINEAR_BATCH, epochs=linear_epochs(len(bank))
            )
    return {probe: predicted.cpu() for probe, predicted in answers.items()}


def mark(answers: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, dict[str, Score]]:
    """Test -> probe -> score. answers: to all tests, one behind the other. Raises DataError where one asks nothing."""
    from train.evaluation.probes import accuracy

    sizes = list(map(len, truths.values()))
    marks: dict[str, dict[str, Score]] = {name: {} for name in truths}
    for probe, predicted in answers.items():
        for (name, truth), mine in zip(truths.items(), predicted.split(sizes), strict=True):
            marks[name][probe] = accuracy(mine, truth)
    return marks


def linear_epochs(rows: int) -> int:
    """MAE's 90 epochs, or more where there are few rows: LARS moves a matrix by its share of rows x epochs at most,
    and 90 passes over some thousand rows would stop on the way (see probes.linear_probe)."""
    return min(1000, max(90, LINEAR_ROWS // rows))


def few(ids: np.ndarray, label: Tensor, share: float, draw: int) -> Tensor:
    """Rows of a class-balanced share of a bank, ascending: as many of each class, one at least, all that a smaller
    class has. ids, label: (N,). A pure function of (draw, ids, label): every encoder gets the same pictures.

    Source: 1 % and 10 % of ImageNet's labels as in SimCLR (Chen et al. 2020, arXiv 2002.05709), section 6.
    """
    import numpy as np
    import torch

    from pipeline.sampling import uniform

    classes = label.numpy()
    each = max(1, round(share * len(ids) / len(np.unique(classes))))
    order = np.lexsort((uniform(FEW_SEED, draw, "few labels", ids, 1)[:, 0], classes))
    place = np.arange(len(ids)) - np.searchsorted(classes[order], classes[order])  # within its class
    return torch.from_numpy(np.sort(order[place < each]))


def over_draws(scores: Sequence[Score]) -> dict:
    """Mean over draws of few labels, the standard error that the test pictures leave of it, and the deviation between
    the draws. They answer the same questions, so that more draws do not make the first smaller."""
    value, count = statistics.fmean(each.value for each in scores), scores[0].count
    spread = statistics.stdev(each.value for each in scores)
    error = math.sqrt(value * (1 - value) / count)
    return {"value": value, "standard_error": error, "count": count, "draws": len(scores), "spread": spread}


def over_folds(results: Sequence[dict]) -> dict:
    """What Exam.sit returned of each fold, as one exam of all images: its standard error is that of their number."""
    first = results[0]
    if len(results) == 1:
        return first
    scores = {
        test: {
            column: {
                probe: pooled([each["scores"][test][column][probe] for each in results])
                for probe in probes
                if all(probe in each["scores"][test][column] for each in results)  # few of a class, and one has none
            }
            for column, probes in columns.items()
        }
        for test, columns in first["scores"].items()
    }  # fmt: skip
    leading = [each["leading"] for each in results]
    name = f"{first['leading_name']} in {len(results)} folds"
    return {**first, "scores": scores, "leading": pooled(leading) if all(leading) else None, "leading_name": name}


def pooled(parts: Sequence[dict]) -> dict:
    """Scores of parts of the pictures as one of all of them."""
    count = sum(part["count"] for part in parts)
    value = sum(part["value"] * part["count"] for part in parts) / count
    return {**parts[0], "value": value, "standard_error": math.sqrt(value * (1 - value) / count), "count": count}


def apart(tests: Sequence[Path]) -> Sequence[Path]:
    """Test stores go by the names of their folders. Raises UsageError where two share one."""
    names = [path.name for path in tests]
    for path in tests:
        if names.count(path.name) > 1:
            raise UsageError(f"--tests: two stores are called {path.name}, and scores go by that name. Rename one.")
    return tests


def mean_score(parts: list[dict]) -> dict:
    """Mean over test sets. Its error is the mean of theirs: they may show the same things (two vendors' pictures of one
    emoji), and then the mean of several is no surer than one."""
    count = len(parts)
    return {
        "value": sum(part["value"] for part in parts) / count,
        "standard_error": sum(part["standard_error"] for part in parts) / count,
        "count": sum(part["count"] for part in parts),
    }


def sentence(result: dict) -> str:
    """The leading score beside its baselines, in words."""
    if result["leading"] is None:
        return f"{result['label']}: too few images of each class for this probe."
    words = f"{result['leading_name']}: {percent(result['leading'])}"
    baselines = result.get("baselines") or {}
    if baselines:
        beside = ", ".join(f"{name} {percent(each['leading'])}" for name, each in baselines.items())
        words += f" ({beside})"
    return words + "."


def percent(score: dict) -> str:
    return f"{100 * score['value']:.1f} ± {100 * score['standard_error']:.1f} %"
