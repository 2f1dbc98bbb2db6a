"""What runs answered beside the score that leads: other probes, few labels, fine-tuning, and pictures at another size.

For the tables of `daae report` and of the pages; what can be asked, tools/comparing/questions.py says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tools.comparing.analysis import Interval, mean_interval
from tools.comparing.records import Study, Trial
from tools.comparing.scores import BASELINES, Score, over_seeds
from tools.comparing.wording import gap_words
from train.evaluation.exam import mean_score


@dataclass(frozen=True)
class Answer:
    """An arm's answer to a question."""

    score: Score
    ahead: Interval | None  # of the baseline's longest runs that were asked, paired by seed

    def words(self) -> str:
        return self.score.words() + (f" ({gap_words(self.ahead)})" if self.ahead is not None else "")


def table(study: Study) -> tuple[list[str], list[tuple[str, list[Answer | None]]]]:
    """Questions, and for each arm (with a length, where runs of several were asked) and baseline its answers to them.

    Nothing where no experiment asked for more than the score that leads.
    """
    found = list(rows(study))
    names = list(dict.fromkeys(name for _, _, cells in found for name in cells))
    return names, [(who, [cells.get(name) for name in names]) for _, who, cells in found]


def beaten(study: Study) -> Iterator[tuple[str, Score, str, Score]]:
    """Probes of the leading label by which raw pixels score more than every arm's longest runs: the probe, what pixels
    score, the arm that comes nearest, what that scores."""
    done = [trial for trial in study.trials if trial.done and trial.baseline("pixels") is not None]
    seeds = {trial.seed: _probes((trial.evaluation or {})["baselines"]["pixels"]) for trial in done}
    for name in dict.fromkeys(name for each in seeds.values() for name in each):
        pixels = over_seeds([each.get(name) for each in seeds.values()], seeded=False)
        arms = {
            group.arm: over_seeds([_probes(t.evaluation).get(name) for t in group.finished if t.evaluation])
            for group in study.groups
        }
        scored = {arm: score for arm, score in arms.items() if score is not None}
        if pixels is not None and scored:
            best = max(scored, key=lambda arm: scored[arm].mean)
            if pixels.mean > scored[best].mean:
                yield name, pixels, best, scored[best]


def rows(study: Study) -> Iterator[tuple[str | None, str, dict[str, Answer]]]:
    """The arm, None of what nobody trained; its name with a length, where runs of several were asked; its answers."""
    asked = [trial for trial in study.trials if trial.done and trial.asked]
    given = {trial.cell: _answers(trial) for trial in asked}
    beside: dict[int, dict[str, dict]] = {}  # what the baseline's longest runs that were asked answered, by seed
    for trial in sorted(asked, key=lambda trial: trial.cell.length or 0.0):
        if trial.arm == study.base.arm:
            beside[trial.seed] = beside.get(trial.seed, {}) | given[trial.cell]
    for group in study.groups:
        mine = [trial for trial in asked if trial.arm == group.arm]
        lengths = {trial.cell.length or 0.0: trial.cell.long for trial in mine}
        for length in sorted(lengths):
            trials = [trial for trial in mine if (trial.cell.length or 0.0) == length]
            name = f"{group.arm} {lengths[length]}" if len(lengths) > 1 else group.arm
            yield group.arm, name, _over_seeds({trial.seed: given[trial.cell] for trial in trials}, beside)
    for key, words in BASELINES.items():
        by_seed = {trial.seed: trial for trial in asked if trial.baseline(key) is not None}
        if by_seed:
            answers = {seed: _of_baseline(trial, key) for seed, trial in by_seed.items()}
            yield None, words, _over_seeds(answers, {}, seeded=key != "pixels")


def _over_seeds(
    answers: Mapping[int, Mapping[str, dict]], beside: Mapping[int, Mapping[str, dict]], *, seeded: bool = True
) -> dict[str, Answer]:
    """answers, beside: by seed, of an arm and of the baseline's longest runs that were asked."""
    found = {}
    for name in dict.fromkeys(name for each in answers.values() for name in each):
        score = over_seeds([each.get(name) for each in answers.values()], seeded=seeded)
        gaps = [
            each[name]["value"] - beside[seed][name]["value"]
            for seed, each in answers.items()
            if name in each and each[name] is not beside.get(seed, {}).get(name, each[name])  # not beside itself
        ]
        if score is not None:
            found[name] = Answer(score, mean_interval(gaps) if gaps else None)
    return found


def _answers(trial: Trial) -> dict[str, dict]:
    evaluation = trial.evaluation or {}
    found = _probes(evaluation) | _quarters(evaluation, "encoder") | _agreement(evaluation, "encoder")
    if trial.finetuned:
        epochs = trial.asked.get("finetune", {}).get("epochs")
        found["fine-tuned" if epochs is None else f"fine-tuned {epochs:g} epochs"] = trial.finetuned["leading"]
    return found


def _of_baseline(trial: Trial, name: str) -> dict[str, dict]:
    evaluation = trial.evaluation or {}
    return _probes(evaluation["baselines"][name]) | _quarters(evaluation, name) | _agreement(evaluation, name)


def _probes(exam: Mapping[str, Any]) -> dict[str, dict]:
    """Each probe's score on the leading label, mean of the test sets."""
    tests = [labels.get(exam["label"], {}) for labels in exam.get("scores", {}).values()]
    names = [name for name in tests[0] if all(name in each for each in tests)] if tests else []
    return {name: mean_score([each[name] for each in tests]) for name in names}


def _quarters(evaluation: Mapping[str, Any], who: str) -> dict[str, dict]:
    """Each probe's score where a picture has a quarter of an image."""
    exam = (evaluation.get("quarters") or {}).get(who)
    return {f"{name} by quarters": score for name, score in _probes(exam).items()} if exam else {}


def _agreement(evaluation: Mapping[str, Any], who: str) -> dict[str, dict]:
    """How often a small picture's features are nearest to those of its own full-size one, mean of the test sets."""
    tests = list((evaluation.get("agreement") or {}).get(who, {}).values())
    if not tests:
        return {}
    parts = [
        {"value": p, "standard_error": math.sqrt(p * (1 - p) / n), "count": n}
        for p, n in ((each["found"], each["count"]) for each in tests)
    ]
    return {f"itself at {evaluation['agreement']['share']:g} of the side": mean_score(parts)}
