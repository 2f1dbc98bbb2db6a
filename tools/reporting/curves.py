"""Scores and losses against training time, for `daae report`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from html import escape

from tools.charts import Level, Line, chart, legend
from tools.comparing.records import Group, Study, Trial
from tools.comparing.scores import BASELINES, baseline_score, leading_name, overtaken, score_of

CROWDED = 4  # lines of which no single one is read
LONGEST_AXIS = 300.0  # of time: its end over its beginning
LOG_FROM = 4.0  # a time axis is logarithmic where its last point is so many times its first

NOT_TERMS = ("step", "epoch", "lr", "images", "images_per_second", "train_seconds", "data_wait", "spent", "grad_norm")
TERM_NAMES = {
    "reconstruct": "reconstruction loss",
    "info_nce": "contrastive loss, nats",
    "loss": "whole loss",
    "effective_rank": "effective rank of features",
}


def scores(study: Study, colours: dict[str, str]) -> str:
    """HTML; nothing where no run has two scores, nor an arm two lengths."""
    drawn = [(group, curve) for group in study.groups for curve in group.curves() if len(curve)]
    if not any(len(curve) > 1 for _, curve in drawn):
        return ""
    several = any(group.lengths for group in study.groups)
    crowded = several and len(drawn) > CROWDED
    lines = [
        Line(curve.seconds, [100 * score for score in curve.scores], colours[group.arm], marked=True, faint=crowded)
        for group, curve in drawn
    ]
    lines += [mean for group in study.groups if crowded for mean in _mean_line(group, colours[group.arm])]
    levels, held = [], overtaken(study)
    if study.targeted and study.target is None and (score := score_of(held)) is not None and len(study.groups) > 1:
        levels.append(Level(100 * score.mean, " ".join(filter(None, ("target:", study.base.arm, held[0].cell.long)))))
    for name, words in BASELINES.items():
        base = baseline_score(study.trials, name)
        if base is not None:
            levels.append(Level(100 * base.mean, words))
    svg = chart(
        "scores", lines, levels=levels, x_name="training seconds", y_name="score, %",
        log_x=_time_axis(second for _, curve in drawn for second in curve.seconds),
        description="leading score against training seconds, one line per seed",
    )  # fmt: skip
    arms = dict.fromkeys(group.arm for group, _ in drawn)
    what = "each point is a run of its own, at the end of its own schedule" if several else "one line per run"
    what += "; thick: the mean" if crowded else ""
    return (
        "<section><h2>Score against training time</h2>"
        f"<p>Every seed is drawn: {what}. Score: {escape(leading_name(study))}. Training seconds leave out "
        f'set-up, evaluation and checkpoints.</p>{legend(arms, colours)}<figure class="chart">{svg}</figure></section>'
    )


def _mean_line(group: Group, colour: str) -> list[Line]:
    """Mean score of the runs of each length against their mean seconds."""
    runs = [trials for length in group.lengths if score_of(trials := group.of_length(length)) is not None]
    if len(runs) < 2:
        return []
    seconds = [statistics.fmean(trial.seconds for trial in trials) for trials in runs]
    scores = [score_of(trials) for trials in runs]
    return [Line(seconds, [100 * score.mean for score in scores if score is not None], colour)]


def losses(study: Study, colours: dict[str, str]) -> str:
    """HTML, of the longest runs whose folders are there; nothing where there are none."""
    longest = [group.trials if not group.lengths else group.finished for group in study.groups]
    drawn = zip(study.groups, longest, strict=True)
    trials = [(group, trial) for group, runs in drawn for trial in runs if len(trial.metrics) > 1]
    if not trials:
        return ""
    terms = list(dict.fromkeys(name for _, trial in trials for name in trial.metrics[-1] if name not in NOT_TERMS))
    # A method of one term has a whole loss that says nothing new.
    known = [name for name in TERM_NAMES if name in terms]
    shown = [*known, *(name for name in terms if name not in known and name not in ("contrast", "spread"))][:4]
    if len([name for name in terms if name != "loss"]) == 1 and "loss" in shown:
        shown.remove("loss")
    figures = []
    for name in shown:
        lines = [
            Line(
                [row["train_seconds"] for row in rows], [row[name] for row in rows], colours[group.arm],
                faint=len(trials) > CROWDED,
            )
            for group, trial in trials if (rows := _late(trial, name))
        ]  # fmt: skip
        svg = chart(
            f"loss-{len(figures)}", lines, x_name="training seconds", y_name=TERM_NAMES.get(name) or name, small=True,
            log_x=_time_axis(second for line in lines for second in (line.x[0], line.x[-1])),
            description=f"{name} against training seconds",
        )  # fmt: skip
        figures.append(f'<figure class="chart">{svg}</figure>')
    arms = dict.fromkeys(group.arm for group, _ in trials)
    return (
        "<section><h2>Losses</h2><p>The reconstruction loss, on hidden patches, is what MAE and DAAE share; whole "
        "losses of two methods do not compare, and a lower loss is not a better encoder.</p>"
        f'{legend(arms, colours)}<div class="pair">{"".join(figures)}</div></section>'
    )


def _late(trial: Trial, name: str) -> list[dict]:
    """Its rows that have a value, less the first moments, which would take half of a logarithmic axis."""
    if name not in trial.metrics[-1]:
        return []
    return [row for row in trial.metrics if name in row and row["train_seconds"] >= trial.seconds / LONGEST_AXIS]


def _time_axis(times: Iterable[float]) -> bool:
    """Whether a logarithmic axis helps."""
    found = [each for each in times if each > 0]
    return bool(found) and max(found) >= LOG_FROM * min(found)
