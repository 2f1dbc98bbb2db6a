"""`daae evaluate`: what an encoder's features are worth, always beside raw pixels and the untrained encoder."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.errors import UsageError
from pipeline.staging import write_whole
from train.command import parse, run
from train.evaluation.exam import (
    EVALUATION,
    FIFTHS,
    KNN,
    PROTOCOLS,
    Exam,
    Featurise,
    Protocol,
    over_folds,
    percent,
    sentence,
)

CACHE = "cache"  # in a run folder: features
OWN_IMAGES = "--folds is for a store whose own images are held out: without --tests and --label-share."


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint's frozen encoder with kNN, ridge and linear probes, beside raw pixels and no training."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `daae pretrain`."""
    protocols: tuple[Protocol, ...] = PROTOCOLS
    """ridge: closed-form probe for small sets; knn: weighted neighbours; linear: MAE's probe (LARS, 90 epochs);
    logistic: with an L2 penalty. The first one leads."""
    data: Path | None = None
    """Store whose labels train the probe; default: the run's own."""
    tests: tuple[Path, ...] = ()
    """Stores to score on; default: the run's own, or else a fifth of --data held out."""
    folds: bool = False
    """Without tests: hold out each fifth in turn, and score all images, not the first fifth alone."""
    overlap: bool = False
    """Tests may hold pictures whose labels train the probe, as the run's own may where that was declared."""
    label: str | None = None
    """Leading label column; default: the run's own, or the first."""
    feature: Literal["patch_mean", "cls"] = "patch_mean"
    """Mean of the patch tokens or the class token, after the final norm."""
    neighbours: tuple[int, ...] = KNN
    """How many vote in kNN, each a score of its own; InstDisc and DINO report 10 20 100 200."""
    label_share: tuple[float, ...] = ()
    """Also probe with so few of the labels, such as 0.01 0.1: class-balanced, the mean of three draws."""
    exits: bool = False
    """Of a method with exits (SelfCon): also score each exit, and all together, on the leading column."""
    agreement: float | None = None
    """Also tell how far features agree with those of the same pictures at this share of the side, such as 0.5."""
    quarters: bool = False
    """Also score pictures by the patches of their own quarter where four share an image: what patches tell by place."""
    checkpoint: str | None = None
    """Step of the checkpoint, or its folder; default: the newest that verifies."""
    baselines: bool = True
    """Score raw pixels and the untrained encoder too."""
    cache: bool = True
    """Keep the features in RUN/cache, so that the next call need not encode again; it may be deleted at any time."""
    device: str = "auto"
    json: bool = False
    """Print one JSON object."""

    def check(self) -> None:
        """Raises UsageError."""
        if not all(0 < share <= 1 for share in self.label_share):
            raise UsageError("--label-share wants shares of the labels, above 0 and at most 1, such as 0.01 0.1.")
        if not self.neighbours or min(self.neighbours) < 1:
            raise UsageError("--neighbours wants numbers of at least 1, such as 1 20.")
        if self.agreement is not None and not 0 < self.agreement < 1:
            raise UsageError(f"--agreement {self.agreement:g}: wants a share of the side, such as 0.5.")
        if self.folds and (self.tests or self.label_share):
            raise UsageError(OWN_IMAGES)
        if self.folds and (self.exits or self.quarters or self.agreement is not None):
            raise UsageError(
                "--folds scores the probes alone: ask for --exits, --quarters and --agreement in a call without it."
            )


def main(argv: list[str]) -> int:
    flags = parse(Evaluate, argv, prog="daae evaluate")
    flags.check()
    from train import folder
    from train.device import choose_device

    settings = folder.run_settings(flags.run)
    data = flags.data or settings.data
    assert data is not None
    tests, label = flags.tests or settings.watch.tests, flags.label or settings.watch.label
    if flags.folds and tests:  # the run's own
        raise UsageError(OWN_IMAGES)
    overlap = flags.overlap or settings.watch.overlap
    exams = [Exam.prepare(data, tests, label, overlap, fold=fold) for fold in range(FIFTHS if flags.folds else 1)]
    asked = {"neighbours": flags.neighbours, "label_shares": flags.label_share}

    def sit(featurise: Featurise) -> dict:
        return over_folds([exam.sit(featurise, flags.protocols, **asked) for exam in exams])

    point = folder.chosen_checkpoint(flags.run, flags.checkpoint)
    from model.network import Network
    from train.evaluation.featurise import baseline_features, encoder_features, untrained

    device = choose_device(flags.device)
    network = Network(settings.method, settings.model, settings.seed).to(device)
    network.load_state_dict(point.scored())
    start = functools.cache(lambda: untrained(settings, device))  # drawn once, where anything asks for it
    with features_kept(flags.run, flags.cache) as cache:
        result = sit(encoder_features(network, settings, device, flags.feature, cache))
        result = {"step": point.step, "train_seconds": round(point.state["clock"]["train_seconds"], 3), **result}
        if flags.baselines:
            baselines = baseline_features(start(), settings, device, flags.feature, cache)
            result["baselines"] = {name: sit(each) for name, each in baselines.items()}
        if flags.agreement is not None:
            from train.evaluation.agreement import sizes_agree

            networks = {"encoder": network, "untrained": start()}
            result["agreement"] = sizes_agree(
                networks, settings, device, flags.feature, flags.agreement, exams[0], cache
            )
        if flags.quarters:
            from train.evaluation.quarters import score_quarters

            result["quarters"] = {
                who: score_quarters(each, settings, exams[0], device, flags.protocols, flags.neighbours)
                for who, each in (("encoder", network), ("untrained", start()))
            }
        if flags.exits:
            from train.evaluation.exits import score_exits

            result["exits"] = score_exits(network, settings, exams[0], device)
    result["sentence"] = sentence(result)
    if flags.checkpoint is None:
        write_whole(flags.run / EVALUATION, json.dumps(result, indent=1))
    if flags.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


@contextlib.contextmanager
def features_kept(out: Path, keep: bool) -> Iterator[Path]:
    """The folder of features on the disk: the run's, or one that is gone afterwards."""
    if keep:
        yield out / CACHE
        return
    with tempfile.TemporaryDirectory(prefix=f".{CACHE}-", dir=out) as folder:
        yield Path(folder)


def cell(score: dict) -> str:
    """A score in a table of percentages; where labels are few with the deviation between the draws of them."""
    drawn = f" (draws ± {100 * score['spread']:.1f})" if "spread" in score else ""
    return percent(score).removesuffix(" %") + drawn


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
                cells = [cell(each["scores"][test][label][probe]) for each in columns.values()]
                table.add_row(test, label, probe, *cells, f"{score['count']:,}")
    Console().print(table)
    print(result["sentence"])
    for test, parts in result.get("exits", {}).items():
        print(f"{test}, logistic: {', '.join(f'{name} {percent(each)}' for name, each in parts.items())}.")
    for test, labels in result.get("quarters", {}).get("encoder", {}).get("scores", {}).items():
        before = result["quarters"]["untrained"]["scores"][test][result["label"]]
        parts = (
            f"{name} {percent(s)} (untrained {percent(before[name])})" for name, s in labels[result["label"]].items()
        )
        print(f"{test}, four pictures an image, each by the patches of its own quarter: {', '.join(parts)}.")
    for test, one in result.get("agreement", {}).get("encoder", {}).items():
        before = result["agreement"]["untrained"][test]
        print(
            f"{test} at {result['agreement']['share']:g} of the side: cosine with the same picture at full size "
            f"{one['same']:.2f} (untrained {before['same']:.2f}), nearest to its own "
            f"{100 * one['found']:.1f} % of {one['count']:,} (untrained {100 * before['found']:.1f} %)."
        )


if __name__ == "__main__":
    sys.exit(run(main))
