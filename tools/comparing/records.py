"""What runs and comparisons left on disk, read back for tables and reports.

    OUT of `daae compare`:  experiment.yaml   arms, data, budget, seeds, target: `daae compare --experiment` takes it
                            arms/NAME.yaml    settings of an arm that its preset does not have
                            runs/NAME-seedK/  a run folder each
                            pace.json         seconds of a step of each arm, measured in turns before each seed
                            records.jsonl     one object per finished run

Everything here tolerates what is missing: a run that has just begun has neither scores nor pictures.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from tools.comparing.analysis import Contrast, Curve, Interval, Outcome, contrast, mean_interval, steady_rate
from train.command import read_yaml
from train.config import completed, flat
from train.json_files import read_object, read_rows

RECORDS, EXPERIMENT, PACE, RUNS, ARMS = "records.jsonl", "experiment.yaml", "pace.json", "runs", "arms"
CONFIG, METRICS, LEDGER, BASELINE_SCORES = "config.yaml", "metrics.jsonl", "ledger.json", "baselines.json"

# Settings that are a place, a wish or a consequence; the others decide what a run computes.
PLACES = ("out", "data", "seed", "budget.steps", "preset")


UNITS = {"seconds": "s", "epochs": "ep", "steps": "st"}


@dataclass(frozen=True)
class Cell:
    """One run that a comparison wants."""

    arm: str
    seed: int
    length: float | None = None  # where an arm is trained for several lengths: how long, in `unit`
    unit: str = "seconds"

    @property
    def folder(self) -> str:
        """mae-seed0, mae-120s-seed0."""
        return "-".join(filter(None, (self.arm, self.long, f"seed{self.seed}")))

    @property
    def words(self) -> str:
        return " ".join(filter(None, (self.arm, self.long, f"seed {self.seed}")))

    @property
    def long(self) -> str:
        return "" if self.length is None else f"{self.length:g}{UNITS[self.unit]}"


@dataclass(frozen=True)
class Trial:
    """One run, finished or not, of a comparison."""

    cell: Cell
    folder: Path | None  # None where only its record is left
    settings: dict[str, Any]  # flat, as resolved
    env: dict[str, Any]
    state: str  # "done", "running", "preempted", "failed", "paused" or "unknown"
    reason: str
    step: int
    metrics: list[dict]
    evaluations: list[dict]
    evaluation: dict | None  # evaluation.json
    gallery: Path | None
    pace: float | None = None  # seconds of a step of its arm, measured in turns with the other arms
    ledger: dict = field(default_factory=dict)  # ledger.json, which a run writes at its end
    asked: dict = field(default_factory=dict)  # what it has answered of what the experiment asks: flags by command
    finetuned: dict | None = None  # finetune.json, where that was asked for

    @property
    def arm(self) -> str:
        return self.cell.arm

    @property
    def seed(self) -> int:
        return self.cell.seed

    @property
    def name(self) -> str:
        return self.cell.words

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def steps(self) -> int | None:
        return self.settings.get("budget.steps")

    @property
    def command(self) -> str:
        return self.env.get("command", "")

    @property
    def envs(self) -> list[dict]:
        """Where it was trained: one machine and one code, but for a run that moved."""
        return [self.env, *self.env.get("before", [])]

    @property
    def final(self) -> dict | None:
        """The leading score at the end: value, standard_error, count. None before the end, or without labels.

        A run that `daae evaluate` has not seen gives the last score that was taken while it trained.
        """
        if not self.done:
            return None
        if self.evaluation is not None and self.evaluation.get("step") == self.step:
            return self.evaluation.get("leading")
        last = self.evaluations[-1] if self.evaluations else {}
        leading = last.get("leading") if last.get("step") == self.step else None
        return leading if leading is None or isinstance(leading, dict) else {"value": float(leading)}

    @property
    def by_test(self) -> dict[str, float]:
        """The leading score at the end on each test set by itself; empty before the end."""
        exam = self.evaluation if self.done else None
        if exam is None or not exam.get("leading"):
            return {}
        found = {test: self._leading_on(test, exam) for test in exam.get("scores", {})}
        return {test: score["value"] for test, score in found.items() if score is not None}

    def _leading_on(self, test: str, exam: Mapping[str, Any]) -> dict | None:
        """What an exam of the run, or of pixels or the untrained encoder beside it, says of one test set by the probe
        and label that lead."""
        assert self.evaluation is not None
        probe = self.evaluation["leading_name"].partition(" ")[0]
        return exam.get("scores", {}).get(test, {}).get(self.evaluation["label"], {}).get(probe)

    def on(self, test: str) -> Trial:
        """The same run as if it and its baselines had been scored on one test set alone, and only at the end."""
        exam = self.evaluation
        if exam is None or not exam.get("leading"):
            return replace(self, evaluation=None, evaluations=[])
        baselines = (exam.get("baselines") or {}).items()
        beside = {name: {**each, "leading": self._leading_on(test, each)} for name, each in baselines}
        alone = {**exam, "leading": self._leading_on(test, exam), "baselines": beside}
        return replace(self, evaluation=alone, evaluations=[])

    def baseline(self, name: str) -> dict | None:
        """The leading score of "pixels" or "untrained" on the same test pictures."""
        baselines = (self.evaluation or {}).get("baselines") or {}
        return (baselines.get(name) or {}).get("leading")

    @property
    def curve(self) -> Curve:
        """The leading score against training seconds, the final one included."""
        rows, final = [row for row in self.evaluations if row.get("leading") is not None], self.final
        if final is not None:
            rows = [row for row in rows if row["step"] < self.step]
        points = {row["train_seconds"]: (_value(row["leading"]), row["images"]) for row in rows}
        if final is not None:
            points[self.seconds] = (final["value"], self.images)
        ordered = sorted(points.items())
        return Curve(
            seconds=tuple(seconds for seconds, _ in ordered),
            scores=tuple(score for _, (score, _) in ordered),
            images=tuple(images for _, (_, images) in ordered),
        )

    @property
    def seconds(self) -> float:
        return self.metrics[-1]["train_seconds"] if self.metrics else 0.0

    @property
    def images(self) -> int:
        return self.metrics[-1]["images"] if self.metrics else 0

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by part, those off the training clock too; empty where no ledger was kept."""
        return (self.metrics[-1] if self.metrics else {}).get("spent") or self.ledger.get("spent") or {}

    @property
    def epoch_images(self) -> float:
        """Images in an epoch as the loop counts it: whole batches only."""
        if self.metrics and self.metrics[-1]["epoch"]:
            return self.metrics[-1]["images"] / self.metrics[-1]["epoch"]
        return float(self.env.get("images") or 1)

    @property
    def rate(self) -> float | None:
        """Images per second, the first 50 steps left out where the run is long enough."""
        if self.folder is None and self.metrics:
            return self.metrics[-1]["images_per_second"]  # a record tells it and does not keep the rows
        return steady_rate(self.metrics)

    def at_pace(self) -> Trial:
        """The same run as if each of its steps had taken what one takes in turns with the other arms'."""
        assert self.pace is not None

        def timed(rows: list[dict]) -> list[dict]:
            return [{**row, "train_seconds": row["step"] * self.pace} for row in rows]

        return replace(self, metrics=timed(self.metrics), evaluations=timed(self.evaluations))

    @property
    def outcome(self) -> Outcome:
        final = self.final
        value = None if final is None else final["value"]
        return Outcome(self.curve, value, float(self.images), self.seconds, self.epoch_images)


def _value(score: Any) -> float:
    """A leading score is a number in evaluations.jsonl and an object in evaluation.json."""
    return float(score["value"] if isinstance(score, Mapping) else score)


@dataclass
class Group:
    """The runs of one arm: every seed, at one length or at several."""

    arm: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def lengths(self) -> list[float]:
        """From short to long; empty where all runs are as long."""
        return sorted({trial.cell.length for trial in self.trials if trial.cell.length is not None})

    def of_length(self, length: float | None) -> list[Trial]:
        return [trial for trial in self.trials if trial.done and trial.cell.length == length]

    @property
    def finished(self) -> list[Trial]:
        """The longest runs that have finished: whose scores are the arm's."""
        return self.of_length(self.lengths[-1] if self.lengths else None)

    @property
    def objective(self) -> str:
        return str(self.trials[0].settings.get("objective", ""))

    def outcomes(self, longest: float | None = None) -> dict[int, Outcome]:
        """By seed. Of several lengths each gives the point where its own schedule ended: a score in the middle of a
        longer run was taken at a learning rate still high. longest: as if there were no longer runs."""
        if not self.lengths:
            return {trial.seed: trial.outcome for trial in self.finished}
        longest = longest or self.lengths[-1]
        trials = [trial for trial in self.trials if (trial.cell.length or 0.0) <= longest]
        return {
            trial.seed: replace(trial.outcome, curve=ends(each for each in trials if each.seed == trial.seed))
            for trial in self.of_length(longest)
        }

    def curves(self) -> list[Curve]:
        """One for each seed, also of what is not finished."""
        if not self.lengths:
            return [trial.curve for trial in self.trials]
        return [
            ends(each for each in self.trials if each.seed == seed)
            for seed in dict.fromkeys(trial.seed for trial in self.trials)
        ]


def ends(trials: Iterable[Trial]) -> Curve:
    """The final scores of runs of several lengths, in order of their seconds."""
    found = sorted((each.seconds, each.final["value"], each.images) for each in trials if each.final is not None)
    seconds, scores, images = zip(*found, strict=True) if found else ((), (), ())
    return Curve(seconds, scores, images)


@dataclass
class Study:
    """Arms side by side, the first of them the baseline, unless an experiment or a MAE arm says otherwise."""

    groups: list[Group]
    target: float | None  # None: the baseline's own score; see goal
    targeted: bool  # whether a time to a target is wanted at all
    planned: list[Cell] = field(default_factory=list)  # what experiments want
    experiments: list[dict] = field(default_factory=list)

    @property
    def trials(self) -> list[Trial]:
        return [trial for group in self.groups for trial in group.trials]

    @property
    def base(self) -> Group:
        return self.groups[0]

    @property
    def goal(self) -> float | None:
        """The length at which the baseline's mean score is best: what its runs of that length score is the target.

        Where longer runs score less, they are not what anybody would run, and a target below what the baseline has had
        before would make every other arm look fast. The longest where nothing is scored; None where all are as long.
        """
        seeds = {trial.seed for trial in self.base.finished if trial.final is not None}
        means = {}
        for length in self.base.lengths:
            scores = [t.final["value"] for t in self.base.of_length(length) if t.seed in seeds and t.final is not None]
            if len(scores) == len(seeds) > 0:
                means[length] = statistics.fmean(scores)
        if not means:
            return self.base.lengths[-1] if self.base.lengths else None
        return max(means, key=lambda length: (means[length], -length))

    def contrasts(self, *, longest: bool = False) -> dict[str, Contrast]:
        """arm -> that arm against the baseline, for every arm with a finished seed in common.

        longest: the baseline's longest runs are the target, whatever shorter ones score.
        """
        base, found = self.base.outcomes(), {}
        goals = base if longest or self.target is not None else self.base.outcomes(self.goal)
        for group in self.groups[1:]:
            each = contrast(base, group.outcomes(), self.target, goals)
            if not self.targeted:
                each = replace(each, pairs=(), ratio=None, whole=None, epochs=None, seconds_per_epoch=None)
            if each.seeds:
                found[group.arm] = each
        return found

    def ahead(self, group: Group, length: float | None) -> Interval | None:
        """How much more an arm's runs of a length score than the baseline's of that length, paired by seed."""
        base = {trial.seed: trial.final["value"] for trial in self.base.of_length(length) if trial.final is not None}
        gaps = [
            trial.final["value"] - base[trial.seed]
            for trial in group.of_length(length)
            if trial.final is not None and trial.seed in base
        ]
        return mean_interval(gaps) if gaps and group is not self.base else None

    @property
    def tests(self) -> list[str]:
        """The test sets whose mean the leading score is."""
        return list(dict.fromkeys(test for trial in self.trials for test in trial.by_test))

    def on(self, test: str) -> Study:
        """The same runs as if they had been scored on one test set alone."""
        return replace(self, groups=[Group(each.arm, [t.on(test) for t in each.trials]) for each in self.groups])

    def contrasts_on(self, test: str) -> dict[str, Contrast]:
        """contrasts() by one test set alone, to the baseline's best score there; empty without runs of several lengths
        (of the middle of a run no single test set is told) and where the target is a number."""
        several = self.target is None and any(group.lengths for group in self.groups)
        return self.on(test).contrasts() if several and self.targeted else {}

    def ahead_by_test(self, group: Group) -> dict[str, Interval]:
        """How much more an arm scores at the end than the baseline on each test set, paired by seed."""
        base = {trial.seed: trial.by_test for trial in self.base.finished}
        found = {}
        for test in dict.fromkeys(test for trial in group.finished for test in trial.by_test):
            pairs = [(trial.by_test.get(test), base.get(trial.seed, {}).get(test)) for trial in group.finished]
            gaps = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
            if gaps:
                found[test] = mean_interval(gaps)
        return found

    def differences(self) -> dict[tuple[str, str], Interval]:
        """Two arms -> how much more the first scores at the end than the second, paired by seed, for all but the
        baseline, which contrasts() is about."""
        found = {}
        for one, other in itertools.combinations(self.groups[1:], 2):
            gap = contrast(other.outcomes(), one.outcomes(), None).difference
            if gap is not None:
                found[one.arm, other.arm] = gap
        return found

    def paced_contrasts(self) -> dict[str, Contrast]:
        """As contrasts(), by a clock that no slow hour of the machine touches: every step takes what it takes in turns
        with the other arms' steps. Empty where some arm's pace is not known."""
        if any(trial.pace is None for trial in self.trials if trial.done):
            return {}
        groups = [Group(each.arm, [t.at_pace() for t in each.trials if t.done]) for each in self.groups]
        return replace(
            self, groups=[group for group in groups if group.trials or group.arm == self.base.arm]
        ).contrasts()

    @property
    def missing(self) -> list[Cell]:
        there = {trial.cell for trial in self.trials}
        return [cell for cell in self.planned if cell not in there]


def read_study(folders: list[Path]) -> Study:
    """Run folders and folders of `daae compare`, together as one study. Raises UsageError."""
    trials: list[Trial] = []
    experiments, names = [], []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder. Name run folders or folders of `daae compare`.")
        if (folder / RECORDS).exists() or (folder / EXPERIMENT).exists():
            found, experiment = read_comparison(folder)
            trials += found
            experiments.append(experiment)
            names += [name for name in experiment.get("arms", {}) if name not in names]
        elif (folder / CONFIG).exists():
            trials.append(read_run(folder))
        else:
            raise UsageError(
                f"{folder} holds no run (no {CONFIG}) and no comparison (no {RECORDS}). "
                "Name folders that `daae pretrain` or `daae compare` wrote."
            )
    if not trials:
        raise UsageError(f"{folders[0]} holds no run that has begun yet. Run `daae compare` again to go on.")
    if len(experiments) > 1:  # whose steps were never timed in turns with one another's
        trials = [replace(trial, pace=None) for trial in trials]
    groups = _grouped(trials, names)
    if not names:  # without a comparison that names it, MAE is what others are held against
        groups.sort(key=lambda group: group.objective != "mae")
    target, targeted = _target(experiments)
    return Study(groups, target, targeted, [cell for each in experiments for cell in cells(each)], experiments)


def cells(experiment: Mapping[str, Any]) -> list[Cell]:
    """The runs that an experiment wants, in their order: seed by seed, from short to long. Who goes first rotates, so
    that no arm always has the warmer machine."""
    unit = next((name for name in UNITS if experiment.get(name) is not None), "seconds")
    common = experiment.get(unit)
    common = list(common) if isinstance(common, (list, tuple)) else [] if common is None else [common]
    arms = {
        name: {*common, *(arm.get("also", ()) if isinstance(arm, Mapping) else ())}
        for name, arm in experiment.get("arms", {}).items()
    }
    every = sorted(set().union(*arms.values()))
    found, turn = [], 0
    for seed in experiment.get("seeds", []):
        for length in every or [None]:
            names = list(arms)[turn % len(arms) :] + list(arms)[: turn % len(arms)]
            turn += 1
            for name in names:
                if length is None or length in arms[name]:
                    found.append(Cell(name, seed, length if len(every) > 1 else None, unit))
    return found


def _target(experiments: list[dict]) -> tuple[float | None, bool]:
    wish = experiments[0].get("target", "baseline") if experiments else "baseline"
    return target_score(wish), wish != "none"


def target_score(wish: str | float | None) -> float | None:
    """A target as a share of 1: .31 and 31 are the same; "baseline" and "none" are no number. Raises UsageError."""
    if wish in (None, "baseline", "none"):
        return None
    try:
        number = float(str(wish))
    except ValueError:
        number = -1.0
    number = number / 100 if number > 1 else number
    if not 0 < number <= 1:
        raise UsageError(f"--target {wish} is none of: baseline, none, a score such as 31.5 (percent) or 0.315.")
    return number


def _grouped(trials: list[Trial], order: list[str]) -> list[Group]:
    """By arm, in the order of the experiment and then of appearance; two runs of one arm and seed get their folder's
    name instead, and so do runs that share a preset but not their settings."""
    groups: dict[str, Group] = {name: Group(name) for name in order}
    for trial in trials:
        group = groups.setdefault(trial.arm, Group(trial.arm))
        twin = any(other.cell == trial.cell for other in group.trials)
        if group.trials and (twin or recipe(group.trials[0]) != recipe(trial)):
            name = _unused(str(trial.folder or trial.arm), groups)
            trial = replace(trial, cell=replace(trial.cell, arm=name))
            group = groups.setdefault(name, Group(name))
        group.trials.append(trial)
    return [group for group in groups.values() if group.trials]


def recipe(trial: Trial) -> dict[str, Any]:
    """What has to be equal in the runs of one arm: all but the length, where it has several."""
    found = deciding(trial.settings)
    several = trial.cell.length is not None
    return {name: value for name, value in found.items() if not (several and name.startswith("budget."))}


def _unused(name: str, taken: Mapping) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, without places, the seed, what is only watched and speed."""
    return {
        name: value
        for name, value in settings.items()
        if name not in PLACES and name.split(".")[0] not in ("watch", "speed")
    }


def digest(values: Mapping[str, Any]) -> str:
    """Short name of a configuration: 12 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def read_comparison(folder: Path) -> tuple[list[Trial], dict]:
    """Every run of a comparison, finished or not, and its experiment."""
    experiment = read_yaml(folder / EXPERIMENT) if (folder / EXPERIMENT).exists() else {}
    records = {cell_of(record): record for record in read_rows(folder / RECORDS)}
    moments = {arm: measured(each) for arm, each in read_object(folder / PACE).items()}
    # An arm that was left out of later calls was not measured with the others then.
    shared = min(map(len, moments.values()), default=0)
    paces = {arm: statistics.median(each[:shared]) for arm, each in moments.items()}
    trials = []
    for cell, record in records.items():
        where = folder / RUNS / cell.folder
        trials.append(read_run(where, cell, record) if (where / CONFIG).exists() else from_record(record))
    for cell in cells(experiment):
        where = folder / RUNS / cell.folder
        if cell not in records and (where / CONFIG).exists():
            trials.append(read_run(where, cell))
    return [replace(trial, pace=paces.get(trial.arm)) for trial in trials], experiment


def measured(pace: Mapping[str, Any]) -> list[float]:
    """Seconds of a step in an entry of pace.json: at the start, and before each further seed."""
    return pace.get("measured") or [pace["seconds_per_step"]]  # older ones were measured once


def cell_of(record: Mapping[str, Any]) -> Cell:
    return Cell(record["arm"], record["seed"], record.get("length"), record.get("unit", "seconds"))


def read_run(folder: Path, cell: Cell | None = None, record: dict | None = None) -> Trial:
    """A run folder, in whatever state it is; what a comparison recorded of it goes before what it says itself."""
    settings, status = completed(flat(read_yaml(folder / CONFIG))), read_object(folder / "status.json")
    gallery = folder / "media" / "gallery.png"
    preset = str(settings.get("preset") or "custom")
    env = read_object(folder / "env.json")
    env["command"] = as_typed(env.get("command", ""))
    metrics = read_rows(folder / METRICS)
    name = preset if preset != "custom" else str(settings.get("objective", "run"))
    return Trial(
        cell=cell or Cell(name, int(settings.get("seed") or 0)),
        folder=folder,
        settings=settings,
        env={**env, **record["env"]} if record else env,
        state="done" if record else str(status.get("state", "unknown")),
        reason=str(status.get("reason") or ""),
        step=int(status.get("step") or (metrics[-1]["step"] if metrics else 0)),
        metrics=metrics,
        evaluations=read_rows(folder / "evaluations.jsonl"),
        evaluation=(record["evaluation"] if record else read_object(folder / "evaluation.json")) or None,
        asked=record.get("asked", {}) if record else {},
        finetuned=record.get("finetune") if record else None,
        gallery=gallery if gallery.exists() else None,
        ledger=read_object(folder / LEDGER),
    )


def from_record(record: dict) -> Trial:
    """A run whose folder is gone: its scores are all there, its loss curve and pictures are not."""
    last = {name: record[name] for name in ("images", "train_seconds", "data_wait")}
    last |= {"step": record["steps"], "epoch": record["epochs"], "images_per_second": record["images_per_second"]}
    return Trial(
        cell=cell_of(record), folder=None, settings=completed(record["settings"]), env=record["env"],
        state="done", reason="", step=record["steps"], metrics=[last], evaluations=record["evaluations"],
        evaluation=record["evaluation"], gallery=None, ledger=record.get("ledger", {}),
        asked=record.get("asked", {}), finetuned=record.get("finetune"),
    )  # fmt: skip


def as_typed(command: str) -> str:
    """`/where/ever/train/pretrain.py --preset …`, or `/where/ever/daae pretrain …`, as a person would type it."""
    first, _, rest = command.partition(" ")
    name = Path(first).name
    if name == "cli.py":
        return f"daae {rest}"
    return f"daae {Path(first).stem} {rest}" if first.endswith(".py") else command.replace(first, name, 1)
