"""Scores of a run while it trains: off the clock, by rank 0 alone, beside what an encoder has to beat."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from model.network import Network
from pipeline.errors import DataError
from pipeline.staging import write_whole
from train.config import Run
from train.evaluation.exam import EVALUATION, PROTOCOLS, Exam, sentence
from train.evaluation.featurise import baseline_features, encoder_features, untrained
from train.journal import Journal
from train.json_files import read_object

BASELINES = "baselines.json"


class Scores:
    """The exam of one run, and the scores of pixels and of the untrained encoder."""

    def __init__(self, exam: Exam, run: Run, device: torch.device, journal: Journal, baselines_from: Path | None):
        """baselines_from: folder of a run that may have the same baselines."""
        self.exam, self.run, self.device, self.journal = exam, run, device, journal
        self.baselines_from = baselines_from
        self.baselines: dict = {}

    @classmethod
    def prepare(cls, run: Run, device: torch.device, journal: Journal, baselines_from: Path | None) -> Scores | None:
        """Labels are never needed to train: without them there is a notice and no score."""
        assert run.data is not None
        try:
            exam = Exam.prepare(run.data, run.watch.tests, run.watch.label, run.watch.overlap)
        except DataError as error:
            journal.say(f"no evaluation during training: {error}")
            return None
        return cls(exam, run, device, journal, baselines_from)

    def take_baselines(self) -> None:
        """Once, before the first score, or from a run that has the same."""
        path = self.journal.out / BASELINES
        # What the scores depend on: with another seed or encoder they would be another network's.
        key = {
            "seed": self.run.seed, "model": dataclasses.asdict(self.run.model), "precision": self.run.precision,
            "label": self.exam.leading, "bank": self.exam.bank.fingerprint,
            "tests": {name: store.fingerprint for name, store in self.exam.tests.items()},
            **({"objective": self.run.objective} if self.run.method.own_start else {}),
        }  # fmt: skip
        for known in (path, self.baselines_from and self.baselines_from / BASELINES):
            found = read_object(known) if known else {}
            if found.get("key") == key:
                self.baselines = found["scores"]
        if not self.baselines:
            baselines = baseline_features(untrained(self.run, self.device), self.run, self.device, "patch_mean")
            self.baselines = {name: self.exam.sit(featurise, PROTOCOLS) for name, featurise in baselines.items()}
        write_whole(path, json.dumps({"key": key, "scores": self.baselines}))

    def take(self, network: Network, at: dict, *, final: bool) -> None:
        """Ridge and neighbours on the leading column, at the end on every one.

        at: step, train_seconds and images so far. The encoder comes back in training mode.
        """
        featurise = encoder_features(network, self.run, self.device, "patch_mean")
        result = self.exam.sit(featurise, PROTOCOLS, None if final else [self.exam.leading])
        leading = result["leading"] and result["leading"]["value"]
        result = {"step": at["step"], "train_seconds": at["train_seconds"], **result, "baselines": self.baselines}
        result["sentence"] = sentence(result)
        if final:
            write_whole(self.journal.out / EVALUATION, json.dumps(result, indent=1))
        self.journal.row("evaluations", {**at, "leading": leading, "scores": result["scores"]})
        self.journal.say(f"step {at['step']:,}, {at['train_seconds']:.0f} s: {result['sentence']}")
