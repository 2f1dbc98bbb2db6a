"""Scores at the end, for `daae report`: every arm and length, each test set, other questions, every probe."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any

from tools.charts import chip
from tools.comparing import answers
from tools.comparing.records import Study
from tools.comparing.scores import (
    BASELINES,
    arm_score,
    baseline_score,
    leading_name,
    margins,
    overtaken,
    percent,
    points,
    score_of,
)
from tools.comparing.wording import between_others, gap_words, ratio_words, seconds_words
from tools.page import table


def section(study: Study, colours: dict[str, str]) -> str:
    """HTML; nothing where no arm has a score."""
    rows, target = [], {trial.cell for trial in overtaken(study)}
    for group in study.groups:
        if arm_score(group) is None:
            continue
        above, first = margins(study, group), group is study.base
        for length in group.lengths or [None]:
            trials = group.of_length(length)
            score = score_of(trials)
            if score is None:
                continue
            longest = trials == group.finished
            # The baseline is held against pixels by the runs whose score is the target.
            held = {trial.cell for trial in trials} >= target if first else longest
            name = chip(group.arm, colours) if longest else f"<small>{escape(group.arm)}</small>"
            if len(group.lengths) > 1:
                is_target = held and first and study.targeted and study.target is None
                name += f" <small>{escape(trials[0].cell.long)}{', the target' if is_target else ''}</small>"
            seconds, images = (statistics.fmean(getattr(t, part) for t in trials) for part in ("seconds", "images"))
            mean = percent(score.mean)
            rows.append([
                name, str(len(trials)), escape(seconds_words(seconds)), f"{images:,.0f}",
                f"<b>{mean}</b>" if longest or held else mean,
                *("–" if each is None else percent(each) for each in (score.error, score.spread)),
                escape(gap_words(study.ahead(group, length))),
                *(_margin(above.get(each)) if held else "" for each in BASELINES),
            ])  # fmt: skip
    if not rows:
        return ""
    for name, words in BASELINES.items():
        base = baseline_score(study.trials, name)
        if base is not None:
            beside = ["–" if one is None else percent(one) for one in (base.error, base.spread)]
            rows.append([f"<em>{words}</em>", "", "", "", percent(base.mean), *beside, "", "", ""])
    headings = ["arm", "seeds", "training", "images", "score, %", "std. error", "between seeds"]
    headings += [f"ahead of {study.base.arm}", "above pixels", "above untrained"]
    name = leading_name(study)
    return (
        f"<section><h2>Scores at the end</h2><p>{escape(name[:1].upper() + name[1:])}. Standard error: from the number "
        "of test pictures, for one run; between seeds: standard deviation. An encoder that has learned is five points "
        "and three standard errors above both baselines. Ahead: points, paired by seed, of runs as long, and its 95 % "
        "interval over seeds, on these test pictures.</p>"
        + table(headings, rows, css="scores")
        + (f"<p>{escape(others)}</p>" if (others := between_others(study)) else "")
        + _each_test(study, colours)
        + _answers(study)
        + _all_probes(study)
        + "</section>"
    )


def _each_test(study: Study, colours: dict[str, str]) -> str:
    """What a mean of several test sets hides."""
    if len(study.tests) < 2:
        return ""
    parts, speeds = [], {test: study.contrasts_on(test) for test in study.tests}
    for test, contrasts in speeds.items():
        alone, rows = study.on(test), []
        for group in alone.groups:
            held = overtaken(alone) if group is alone.base else group.finished
            score, each = score_of(held), contrasts.get(group.arm)
            if score is not None:
                gap = alone.ahead(group, group.lengths[-1] if group.lengths else None)
                speed = (
                    "" if each is None else "seeds are bounds both ways" if each.ratio is None else ratio_words(each)
                )
                rows.append([
                    f"{chip(group.arm, colours)} <small>{escape(held[0].cell.long)}</small>", escape(score.words()),
                    escape(gap_words(gap)), escape(speed),
                ])  # fmt: skip
        for name, words in BASELINES.items():
            base = baseline_score(alone.trials, name)
            if base is not None:
                rows.append([f"<em>{words}</em>", percent(base.mean), "", ""])
        headings = [test, "score, %", f"ahead of {study.base.arm}", "times as fast to its best"]
        shown = len(headings) if contrasts else len(headings) - 1
        parts.append(table(headings[:shown], [row[:shown] for row in rows]))
    several = any(speeds.values())
    best = f"<p>{escape(study.base.arm)} by its best length there; ahead: of its longest runs.</p>" if several else ""
    return f"<h3>Each test set by itself</h3>{best}{''.join(parts)}"


def _margin(each: Any) -> str:
    if each is None:
        return "–"
    return f'<span class="{"yes" if each.enough else "no"}">{points(each.points)}{"" if each.enough else " !"}</span>'


def _answers(study: Study) -> str:
    """What the experiment asked of its runs beside the score that leads, if anything."""
    names, found = answers.table(study)
    if not found:
        return ""
    columns = [["–" if each is None else _answer(each) for each in cells] for _, cells in found]
    rows = [[escape(name), *cells] for name, *cells in zip(names, *columns, strict=True)]
    return (
        "<h3>What else the features are good for</h3><p>Percent right on the same label, mean of the test sets; ± is "
        f"between seeds; below it the points ahead of {escape(study.base.arm)}'s longest runs, paired by seed, with "
        "their 95 % interval.</p>" + table(["", *(who for who, _ in found)], rows, css="dense")
    )


def _answer(each: answers.Answer) -> str:
    gap = "" if each.ahead is None else f"<br><small>{escape(gap_words(each.ahead))}</small>"
    return escape(each.score.words()) + gap


def _all_probes(study: Study) -> str:
    """Every test set, label and probe that was scored, behind a click."""
    columns: list[tuple[str, list[dict]]] = []
    for group in study.groups:
        found = [(trial.evaluation or {}).get("scores") for trial in group.finished]
        scores = [each for each in found if each]
        if scores:
            columns.append((group.arm, scores))
    for name, words in BASELINES.items():
        found = [((trial.evaluation or {}).get("baselines") or {}).get(name) or {} for trial in study.trials]
        if any(each.get("scores") for each in found):
            columns.append((words, [each["scores"] for each in found if each.get("scores")]))
    if not columns:
        return ""
    first, rows = columns[0][1][0], []
    keys = [(test, label, probe) for test in first for label in first[test] for probe in first[test][label]]
    for test, label, probe in keys:
        cells, count = [], 0
        for _, scores in columns:
            found = [each.get(test, {}).get(label, {}).get(probe) for each in scores]
            there = [each for each in found if each]
            count = max([count, *(each["count"] for each in there)])
            if there:
                error = statistics.fmean(each["standard_error"] for each in there)
                value = statistics.fmean(each["value"] for each in there)
                cells.append(f"{percent(value)} <small>± {percent(error)}</small>")
            else:
                cells.append("–")
        rows.append([escape(test), escape(label), escape(probe), *cells, f"{count:,}"])
    if not rows:
        return ""
    headings = ["test set", "label", "probe", *(name for name, _ in columns), "pictures"]
    return (
        "<details><summary>Every test set, label and probe</summary><p>Percent right, mean over seeds; "
        "± is one run's standard error.</p>" + table(headings, rows, left=3) + "</details>"
    )
