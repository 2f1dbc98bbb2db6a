"""`daae evaluate`: what an encoder's features are worth, always beside raw pixels and the untrained encoder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pipeline.errors import DataError, UsageError
from pipeline.staging import write_whole
from train.command import parse, run

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from model.network import Network
    from pipeline.store import Store
    from train.config import Run

Protocol = Literal["ridge", "knn", "linear"]
PROTOCOLS: tuple[Protocol, ...] = ("ridge", "knn")
EVALUATION = "evaluation.json"  # in a run folder: the newest checkpoint's scores and the baselines'
PIXEL_SIDE = 32
KNN = (1, 20)
RIDGE_MIN_PER_CLASS = 4  # below, a class is missing from some fold and the penalty cannot be chosen on the bank
HELD_OUT = 0.2
SOURCE = "source"  # the label column that tells who made a picture; it is never asked for
FINER = 4  # times as many classes as another column, and a column names things rather than kinds
LINEAR_ROWS = 4_000_000  # rows x epochs that the linear probe needs to arrive
LEADING_BATCH = 4096  # of the linear probe; MAE's 16384 is for ImageNet


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint's frozen encoder with kNN, ridge and linear probes, beside raw pixels and no training."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `daae pretrain`."""
    protocols: tuple[Protocol, ...] = PROTOCOLS
    """ridge: closed-form probe for small sets; knn: weighted neighbours; linear: MAE's probe (LARS, 90 epochs)."""
    data: Path | None = None
    """Store whose labels train the probe; default: the run's own."""
    tests: tuple[Path, ...] = ()
    """Stores to score on; default: the run's own, or else a fifth of --data held out."""
    label: str | None = None
    """Leading label column; default: the run's own, or the first."""
    feature: Literal["patch_mean", "cls"] = "patch_mean"
    """Mean of the patch tokens or the class token, after the final norm."""
    checkpoint: str | None = None
    """Checkpoint folder; default: the newest that verifies."""
    baselines: bool = True
    """Score raw pixels and the untrained encoder too."""
    device: str = "auto"
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    flags = parse(Evaluate, argv, prog="daae evaluate")
    from train import folder
    from train.checkpoint import newest, verify
    from train.config import Run, with_values
    from train.device import choose_device

    saved = folder.saved_settings(flags.run)
    if saved is None:
        raise DataError(f"{flags.run} is no run folder: it has no {folder.CONFIG}.")
    settings = with_values(Run(), saved, str(flags.run / folder.CONFIG))
    data = flags.data or settings.data
    assert data is not None
    watch = dataclasses.replace(
        settings.watch, tests=flags.tests or settings.watch.tests, label=flags.label or settings.watch.label
    )
    exam = Exam.prepare(data, watch.tests, watch.label)
    where = folder.checkpoints(flags.run)
    point = (
        verify(Path(flags.checkpoint))
        if flags.checkpoint
        else newest(where, lambda line: print(f"warning: {line}", file=sys.stderr))
    )
    if point is None:
        raise DataError(f"{flags.run} holds no whole checkpoint.")
    from model.network import Network

    device = choose_device(flags.device)
    network = Network(settings.method, settings.model, settings.seed).to(device)
    network.load_state_dict(point.scored())
    result = exam.sit(encoder_features(network, settings, device, flags.feature), flags.protocols)
    result = {"step": point.step, "train_seconds": round(point.state["clock"]["train_seconds"], 3), **result}
    if flags.baselines:
        result["baselines"] = score_baselines(exam, settings, device, flags.protocols, flags.feature)
    result["sentence"] = sentence(result)
    if flags.checkpoint is None:
        write_whole(flags.run / EVALUATION, json.dumps(result, indent=1))
    if flags.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


Featurise = Callable[["Store", "np.ndarray"], "Tensor"]  # a store and the ids of samples in it -> (n, D)


def encoder_features(network: Network, settings: Run, device: torch.device, feature: str) -> Featurise:
    """Features of samples by the network's encoder."""
    from train.device import autocast
    from train.features import encode

    def featurise(store: Store, ids: np.ndarray) -> Tensor:
        features = encode(
            network.encoder, store, side=settings.model.side, device=device, only=ids,
            precision_context=autocast(device, settings.precision), centre=centre_share(settings.model.side),
        )  # fmt: skip
        return getattr(features, feature)

    return featurise


def pixel_features(device: torch.device) -> Featurise:
    from train.features import pixels

    def featurise(store: Store, ids: np.ndarray) -> Tensor:
        return pixels(store, side=PIXEL_SIDE, device=device, only=ids)

    return featurise


def centre_share(side: int) -> float:
    """ImageNet's 224 out of 256; small pictures are framed by whoever drew them and are taken whole."""
    return 0.875 if side >= 160 else 1.0


@dataclass
class Exam:
    """A labelled bank, labelled test sets, and a leading label column."""

    bank: Store
    tests: dict[str, Store]
    leading: str
    held_out: dict[Path, Tensor] = field(default_factory=dict)  # rows that no probe trains on, where a store is both

    @classmethod
    def prepare(cls, data: Path, tests: tuple[Path, ...], label: str | None) -> Exam:
        """Raises DataError: no labels, fewer than two classes; UsageError: a test store that is the bank itself, or
        generated images."""
        import torch

        from pipeline.sampling import uniform
        from pipeline.store import Store

        bank, stores = Store.open(data), {path.name: Store.open(path) for path in tests}
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
        if stores:
            return cls(bank, stores, leading)
        import numpy as np

        draw = uniform(0, 0, "held out", np.arange(bank.count), 1)[:, 0]
        return cls(bank, {"held-out": bank}, leading, {bank.root: torch.from_numpy(draw < HELD_OUT)})

    def sit(self, featurise: Featurise, protocols: tuple[Protocol, ...], columns: list[str] | None = None) -> dict:
        """Score features on every test set: {"leading", "leading_name", "label", "scores"}.

        scores: test -> column -> probe -> {value, standard_error, count}. The leading score is the first protocol's on
        the leading column, averaged over the test sets.
        """
        columns = columns or self.columns()
        scores: dict = {name: {} for name in self.tests}
        features = {root: featurise(store, self.labelled(store, columns)) for root, store in self._stores().items()}
        for column in columns:
            for name, answers in self._probe(features, protocols, columns, column).items():
                scores[name][column] = answers
        first = self._neighbours() if protocols[0] == "knn" else protocols[0]
        parts = [scores[name][self.leading].get(first) for name in self.tests]
        return {
            "label": self.leading, "leading": mean_score(parts) if all(parts) else None,
            "leading_name": f"{first} on {self.leading}, mean of {' and '.join(self.tests)}", "scores": scores,
        }  # fmt: skip

    def _neighbours(self) -> str:
        """Of a class with one or two pictures no twenty can be near."""
        known = self.bank.label(self.leading)[0]
        return "knn1" if (known >= 0).sum() <= 2 * len(self.bank.columns[self.leading]) else "knn20"

    def columns(self) -> list[str]:
        """The leading column first, then the others that every test set has too."""
        shared = [c for c in self.bank.columns if all(c in store.columns for store in self.tests.values())]
        shared = [column for column in shared if column != SOURCE]
        return [self.leading, *(column for column in shared if column != self.leading)]

    def labelled(self, store: Store, columns: list[str]) -> np.ndarray:
        """Ids of the samples that have a label in any of these columns: nothing else is worth encoding."""
        import numpy as np

        return np.flatnonzero(np.any([store.label(column)[0] >= 0 for column in columns], axis=0))

    def _stores(self) -> dict[Path, Store]:
        return {store.root: store for store in (self.bank, *self.tests.values())}

    def _fold_groups(self, column: str) -> Tensor | None:
        """(N,) which pictures of the bank stay together when the ridge penalty is chosen; None where any may part.

        The folds ask what the test asks. Where the tests are by other makers, each maker of the bank is left out in
        turn: a penalty that serves for new things by the same hand is far too small for the same things by another.
        """
        import torch

        if self.bank.root not in self.held_out and len(self.bank.columns.get(SOURCE, ())) > 1:
            return torch.from_numpy(self.bank.label(SOURCE)[0].astype("int64"))
        return self._near_duplicates(column)

    def _near_duplicates(self, column: str) -> Tensor | None:
        """Pictures of one thing (one code point drawn by several vendors), which must not sit on both sides of a fold.

        A column much finer than the one that is asked for tells them; most stores have none.
        """
        import torch

        finest = max(self.bank.columns, key=lambda name: len(self.bank.columns[name]))
        if len(self.bank.columns[finest]) < FINER * len(self.bank.columns[column]):
            return None
        return torch.from_numpy(self.bank.label(finest)[0].astype("int64"))

    def _probe(
        self, features: dict[Path, Tensor], protocols: tuple[Protocol, ...], columns: list[str], column: str
    ) -> dict[str, dict]:
        import torch

        from train import probes

        def labels(store: Store, column: str) -> Tensor:
            return torch.from_numpy(store.label(column)[0].astype("int64"))[self.labelled(store, columns)]

        def held_out(store: Store) -> Tensor:
            return self.held_out[store.root][self.labelled(store, columns)]

        known, names = labels(self.bank, column), self.bank.columns[column]
        if self.bank.root in self.held_out:
            known = torch.where(held_out(self.bank), -1, known)
        rows = known >= 0
        bank, known = features[self.bank.root][rows], known[rows]
        questions = {}
        for name, store in self.tests.items():
            truth = probes.match_labels(names, store.columns[column], labels(store, column))
            if store.root in self.held_out:
                truth = torch.where(held_out(store), truth, -1)
            asked = truth >= 0
            questions[name] = (features[store.root][asked], truth[asked])
        if column != self.leading and not all(len(query) for query, _ in questions.values()):
            return {name: {} for name in questions}  # another column of the same name, with other classes
        every = torch.cat([query for query, _ in questions.values()])
        per_class = len(known) / len(names)
        answers: dict[str, Tensor] = {}
        for protocol in protocols:
            if protocol == "knn":
                for k in KNN:
                    answers[f"knn{k}"] = probes.knn(bank, known, every, k=k, classes=len(names))
            elif protocol == "ridge" and per_class >= RIDGE_MIN_PER_CLASS:
                groups = self._fold_groups(column)
                groups = None if groups is None else groups[self.labelled(self.bank, columns)][rows]
                answers["ridge"] = probes.ridge(bank, known, every, classes=len(names), groups=groups).predicted
            elif protocol == "linear" and per_class >= RIDGE_MIN_PER_CLASS:
                answers["linear"] = probes.linear_probe(
                    bank, known, every, classes=len(names), batch=min(LEADING_BATCH, len(bank)),
                    epochs=linear_epochs(len(bank)),
                )  # fmt: skip
        result: dict[str, dict] = {}
        for name, (query, truth) in questions.items():
            result[name] = {}
            for probe, predicted in answers.items():
                mine, answers[probe] = predicted[: len(query)], predicted[len(query) :]
                result[name][probe] = dataclasses.asdict(probes.accuracy(mine, truth))
        return result


def linear_epochs(rows: int) -> int:
    """MAE's 90 epochs, or more where there are few rows: LARS moves a matrix by its share of rows x epochs at most,
    and 90 passes over some thousand rows would stop on the way (see probes.linear_probe)."""
    return min(1000, max(90, LINEAR_ROWS // rows))


def mean_score(parts: list[dict]) -> dict:
    """Mean over test sets; their errors are independent, so its error is the root of the summed squares over n."""
    count = len(parts)
    return {
        "value": sum(part["value"] for part in parts) / count,
        "standard_error": sum(part["standard_error"] ** 2 for part in parts) ** 0.5 / count,
        "count": sum(part["count"] for part in parts),
    }


def score_network(network: Network, exam: Exam, settings: Run, device: torch.device, *, final: bool) -> dict:
    """The score that is taken during training: ridge and neighbours on the leading column, at the end on every one."""
    featurise = encoder_features(network, settings, device, "patch_mean")
    return exam.sit(featurise, PROTOCOLS, None if final else [exam.leading])


def score_baselines(
    exam: Exam,
    settings: Run,
    device: torch.device,
    protocols: tuple[Protocol, ...] = PROTOCOLS,
    feature: str = "patch_mean",
) -> dict[str, dict]:
    """What needs no training: raw pixels, and the encoder as the run's seed draws it."""
    from model.network import Network

    untrained = Network(settings.method, settings.model, settings.seed).to(device)
    return {
        "pixels": exam.sit(pixel_features(device), protocols),
        "untrained": exam.sit(encoder_features(untrained, settings, device, feature), protocols),
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


def show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {"encoder": result, **result.get("baselines", {})}
    table = Table(title=f"step {result['step']:,}, {result['train_seconds']:.0f} s of training; % ± standard error")
    for heading in ("test", "label", "probe", *columns, "n"):
        table.add_column(heading, justify="left" if heading in ("test", "label", "probe") else "right")
    for test, labels in result["scores"].items():
        for label, probes in labels.items():
            for probe, score in probes.items():
                cells = [percent(each["scores"][test][label][probe])[:-2] for each in columns.values()]
                table.add_row(test, label, probe, *cells, f"{score['count']:,}")
    Console().print(table)
    print(result["sentence"])


if __name__ == "__main__":
    sys.exit(run(main))
