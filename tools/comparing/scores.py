"""An arm's scores over its seeds, and how far they are above what nobody had to train."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tools.comparing.analysis import Margin, margin
from tools.comparing.records import Group, Study, Trial

SAME_SECONDS = 0.05  # runs were trained for the same time if their seconds differ by less than this share
BASELINES = {"pixels": "raw 32 px pixels", "untrained": "untrained encoder"}


@dataclass(frozen=True)
class Score:
    """An arm's leading score over its finished seeds, shares of 1."""

    mean: float
    spread: float | None  # standard deviation between seeds; None with one seed, or where no seed matters
    error: float | None  # standard error from the number of test pictures, for one run
    seeds: int

    def words(self) -> str:
        """± is between seeds where there are several, else the standard error of the test set."""
        beside = self.spread if self.spread is not None else self.error
        return percent(self.mean) + ("" if beside is None else f" ± {percent(beside)}")


def over_seeds(scores: Sequence[dict | None], *, seeded: bool = True) -> Score | None:
    """scores: {"value", "standard_error"} of each run that has one. seeded: whether a seed matters to them."""
    found = [each for each in scores if each is not None]
    if not found:
        return None
    values = [each["value"] for each in found]
    errors = [each["standard_error"] for each in found if each.get("standard_error") is not None]
    spread = statistics.stdev(values) if seeded and len(values) > 1 else None
    return Score(statistics.fmean(values), spread, statistics.fmean(errors) if errors else None, len(values))


def score_of(trials: Sequence[Trial]) -> Score | None:
    return over_seeds([trial.final for trial in trials])


def arm_score(group: Group) -> Score | None:
    return score_of(group.finished)


def baseline_score(trials: Sequence[Trial], name: str) -> Score | None:
    """Pixels and the untrained encoder, scored on the same pictures as the trained one; arms of a seed share it."""
    scores = ((trial.seed, trial.baseline(name)) for trial in trials if trial.done)
    by_seed = {seed: score for seed, score in scores if score is not None}
    return over_seeds(list(by_seed.values()), seeded=name != "pixels")


def overtaken(study: Study) -> list[Trial]:
    """The baseline's runs whose scores are the target: its longest, or shorter ones that score more (Study.goal)."""
    if study.target is not None or not study.targeted:
        return study.base.finished
    seeds = {trial.seed for trial in study.base.finished}  # of others the longest run is still to come
    return [trial for trial in study.base.of_length(study.goal) if trial.seed in seeds]


def margins(study: Study, group: Group, *, longest: bool = False) -> dict[str, Margin]:
    """How far an arm is above each baseline that was scored, the baseline arm by the runs that are to be overtaken.

    longest: by its longest runs, whichever arm it is.
    """
    held = overtaken(study) if group is study.base and not longest else group.finished
    score, found = score_of(held), {}
    for name in BASELINES:
        base = baseline_score(group.trials, name)
        if score is not None and base is not None:
            found[name] = margin(score.mean, score.error or 0.0, base.mean, base.error or 0.0)
    return found


def weak_arms(study: Study) -> list[str]:
    """Arms with a finished run that do not beat both baselines by enough."""
    return [g.arm for g in study.groups if any(not each.enough for each in margins(study, g).values())]


def equally_long(seconds: Sequence[float]) -> bool:
    """Whether scores after so many seconds of training are at equal seconds."""
    return max(seconds) - min(seconds) <= SAME_SECONDS * max(seconds)


def leading_name(study: Study) -> str:
    """What the leading score is, such as "ridge on subcategory, mean of fluent and emojione"."""
    names = ((trial.evaluation or {}).get("leading_name") for trial in study.trials)
    return next((name for name in names if name), "")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    return f"{100 * share:+.1f}"
