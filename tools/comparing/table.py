"""The table of a comparison, for a terminal, for pages and as JSON: a row for each arm and length."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tools.comparing.analysis import Contrast
from tools.comparing.doubts import warnings
from tools.comparing.records import Study
from tools.comparing.scores import BASELINES, arm_score, baseline_score, leading_name, score_of
from tools.comparing.verdict import verdict
from tools.comparing.wording import gap_words, ratio_words, seconds_words, spread_words, target_words

if TYPE_CHECKING:
    from rich.table import Table


def summary(study: Study) -> dict[str, dict]:
    """What --json prints of each arm; scores are shares of 1."""
    contrasts, paced, rows = study.contrasts(), study.paced_contrasts(), {}
    for group in study.groups:
        done = group.finished
        baselines = {name: baseline_score(done, name) for name in BASELINES}
        rows[group.arm] = {
            "seeds": [trial.seed for trial in done],
            "lengths": {
                f"{length:g}": [trial.final["value"] for trial in group.of_length(length) if trial.final is not None]
                for length in group.lengths
            },
            "train_seconds": [trial.seconds for trial in done],
            "images_per_second": [trial.rate for trial in done],
            "leading": [None if trial.final is None else trial.final["value"] for trial in done],
            **{name: None if score is None else score.mean for name, score in baselines.items()},
            "against_baseline": _plain(contrasts[group.arm]) if group.arm in contrasts else None,
            "at_measured_pace": _plain(paced[group.arm]) if group.arm in paced else None,
        }
    return rows


def _plain(versus: Contrast) -> dict:
    return {
        "difference": None if versus.difference is None else dataclasses.asdict(versus.difference),
        "time_ratio": None if versus.ratio is None else dataclasses.asdict(versus.ratio),
        "epochs_factor": None if versus.epochs is None else dataclasses.asdict(versus.epochs),
        "seconds_per_epoch_factor": versus.seconds_per_epoch,
        "target_never_reached": versus.never,
    }


HEADINGS = (
    "arm", "seeds", "training", "images/s", "s/epoch", "score", "ahead", "to target", "times as fast", "in turns",
)  # fmt: skip
OF_TARGET = 3  # the last of them: by the runs' own clock, and by steps timed in turns


def rows(study: Study) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Whether it is the row of an arm's longest runs, and its cells by HEADINGS; its shorter lengths come before."""
    contrasts, paced = study.contrasts(), study.paced_contrasts()
    for group in study.groups:
        done, score = group.finished, arm_score(group)
        if not done:
            continue
        for length in group.lengths[:-1]:
            shorter = group.of_length(length)
            score_then = score_of(shorter)
            if score_then is not None:
                yield False, (
                    f"{group.arm} {shorter[0].cell.long}", " ".join(str(trial.seed) for trial in shorter),
                    seconds_words(statistics.fmean(t.seconds for t in shorter)), "", "", score_then.words(),
                    gap_words(study.ahead(group, length)), "", "", "",
                )  # fmt: skip
        clocks = [each.get(group.arm) for each in (contrasts, paced)]
        speeds = [ratio_words(each) if each is not None and study.targeted else "" for each in clocks]
        last = group.lengths[-1] if group.lengths else None
        pace = statistics.fmean(trial.outcome.seconds_per_epoch or 0.0 for trial in done)
        yield True, (
            f"{group.arm} {done[0].cell.long}".strip(), " ".join(str(trial.seed) for trial in done),
            seconds_words(statistics.fmean(t.seconds for t in done)),
            f"{statistics.fmean(t.rate or 0.0 for t in done):,.0f}", f"{pace:.3g}",
            "none" if score is None else score.words(), gap_words(study.ahead(group, last)),
            target_words(study, group.arm), *speeds,
        )  # fmt: skip
    for key, name in BASELINES.items():
        base = baseline_score(study.trials, key)
        if base is not None:
            yield False, (name, "", "", "", "", base.words(), "", "", "", "")


# On a terminal that is too narrow for all of them there are two tables; "arm" is in both.
SCORES = ("seeds", "training", "score", "ahead")
TIMES = ("images/s", "s/epoch", "to target", "times as fast", "in turns")


def show(study: Study) -> None:
    """A row for each arm and baseline, then the verdict. Nothing is cut: a terminal that is narrower still wraps."""
    from rich.console import Console

    from tools.tables import print_whole, width_of

    found, console = list(rows(study)), Console()
    full = [name for place, name in enumerate(HEADINGS) if any(cells[place] for _, cells in found)]
    whole = _table(study, found, full)
    split = console.is_terminal and width_of(whole) > console.width
    parts = [["arm", *(name for name in full if name in part)] for part in (SCORES, TIMES)]
    for table in [_table(study, found, part) for part in parts] if split else [whole]:
        print_whole(table)
    if spread := spread_words(study):
        print(spread)
    answer = verdict(study)
    print(f"{answer.sentence} {answer.meaning}")
    for each in warnings(study):
        print(f"Before you believe it: {each}")


def _table(study: Study, found: list[tuple[bool, tuple[str, ...]]], headings: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    name = leading_name(study)
    table = Table(title=f"% right: {name}" if name else None, box=box.SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for own, cells in found:
        table.add_row(*(cells[HEADINGS.index(name)] for name in headings), style="" if own else "dim")
    return table
