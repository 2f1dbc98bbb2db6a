"""What runs answered beside the score that leads: other probes, few labels, fine-tuning, and pictures at another size.

For the tables of `daae report` and of the pages; what can be asked, tools/comparing/questions.py says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.comparing.records import Study, Trial
from tools.comparing.verdict import BASELINES, Score, over_seeds
from train.evaluation.exam import mean_score

FINETUNED = "fine-tuned"


def table(study: Study) -> tuple[list[str], list[tuple[str, list[Score | None]]]]:
    """Questions, and for each arm (with a length, where runs of several were asked) and baseline its answers to them.

    Nothing where no experiment asked for more than the score that leads.
    """
    rows = list(_rows(study))
    names = list(dict.fromkeys(name for _, answers in rows for name in answers))
    return names, [(who, [answers.get(name) for name in names]) for who, answers in rows]


def _rows(study: Study) -> Iterator[tuple[str, dict[str, Score]]]:
    asked = [trial for trial in study.trials if trial.done and trial.asked]
    for group in study.groups:
        mine = [trial for trial in asked if trial.arm == group.arm]
        lengths = {trial.cell.length or 0.0: trial.cell.long for trial in mine}
        for length in sorted(lengths):
            trials = [trial for trial in mine if (trial.cell.length or 0.0) == length]
            name = f"{group.arm} {lengths[length]}" if len(lengths) > 1 else group.arm
            yield name, _over_seeds([_answers(trial) for trial in trials])
    for key, words in BASELINES.items():
        by_seed = {trial.seed: trial for trial in asked if trial.baseline(key) is not None}
        if by_seed:
            yield words, _over_seeds([_of_baseline(trial, key) for trial in by_seed.values()])


def _over_seeds(answers: Sequence[Mapping[str, dict]]) -> dict[str, Score]:
    names = dict.fromkeys(name for each in answers for name in each)
    scores = {name: over_seeds([each.get(name) for each in answers]) for name in names}
    return {name: score for name, score in scores.items() if score is not None}


def _answers(trial: Trial) -> dict[str, dict]:
    evaluation = trial.evaluation or {}
    found = _probes(evaluation) | _agreement(evaluation, "encoder")
    return found | ({FINETUNED: trial.finetuned["leading"]} if trial.finetuned else {})


def _of_baseline(trial: Trial, name: str) -> dict[str, dict]:
    evaluation = trial.evaluation or {}
    return _probes(evaluation["baselines"][name]) | _agreement(evaluation, name)


def _probes(exam: Mapping[str, Any]) -> dict[str, dict]:
    """Each probe's score on the leading label, mean of the test sets."""
    tests = [labels.get(exam["label"], {}) for labels in exam.get("scores", {}).values()]
    names = [name for name in tests[0] if all(name in each for each in tests)] if tests else []
    return {name: mean_score([each[name] for each in tests]) for name in names}


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
