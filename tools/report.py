"""`daae report`: runs and comparisons as one HTML file that opens offline, for a reader who asks "is the 2x real?"

The answer stands first; then scores, curves and factors, the slides' figures apart from ours, pictures, and how it was
measured. Nothing in the file points outside of it, and everything that comes from a run is escaped.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.errors import UsageError
from pipeline.staging import write_whole
from tools.comparing import answers, provenance, spent
from tools.comparing.analysis import Bounds, Contrast, Pair, Ratio
from tools.comparing.charts import COLOURS, Level, Line, chart
from tools.comparing.doubts import missing, warnings
from tools.comparing.records import Group, Study, Trial, read_study
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
from tools.comparing.verdict import asks_the_claim, lesser, sentences, verdict
from tools.comparing.wording import (
    between_others,
    gap_words,
    interval_words,
    listed,
    ratio_words,
    seconds_words,
    target_name,
    target_words,
)
from tools.page import document, marked, notes, picture, table
from train.command import parse, run

PICTURE_BYTES = 1_500_000  # of all pictures together, before base64 adds a third: the page stays under 3 MB
CROWDED = 4  # lines of which no single one is read
LONGEST_AXIS = 300.0  # of time: its end over its beginning
LOG_FROM = 4.0  # a time axis is logarithmic where its last point is so many times its first

SIGNS = {"": "", "at least": "≥ ", "at most": "≤ "}  # of what is only known from one side

# Theirs, never ours. Source: the slides of Pan and Wei 2022; the factors are computed from their epochs and times.
SLIDES = (
    ("ImageNet-1K", "MAE", 1600, "83.3", "2.05"),
    ("ImageNet-1K", "DAAE", 600, "83.5", "1"),
    ("ImageNet-mini", "MAE", 800, "42.5", "1.08"),
    ("ImageNet-mini", "DAAE", 550, "42.8", "1"),
    ("ImageNet-mini", "DAAE", 800, "44.8", "1.45"),
)

NOT_TERMS = ("step", "epoch", "lr", "images", "images_per_second", "train_seconds", "data_wait", "spent", "grad_norm")
TERM_NAMES = {
    "reconstruct": "reconstruction loss",
    "info_nce": "contrastive loss, nats",
    "loss": "whole loss",
    "effective_rank": "effective rank of features",
}


@dataclass(frozen=True)
class Report:
    """Turn runs and comparisons into one self-contained HTML file."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of `daae pretrain`, folders of `daae compare`, or both."""
    html: Path | None = None
    """The file to write; --out is the same. Default: report.html in the first folder."""
    json: bool = False
    """Print one JSON object instead of the sentences."""


def main(argv: list[str]) -> int:
    flags = parse(Report, argv, prog="daae report", aliases={"--out": "--html"})
    if not flags.folders:
        raise UsageError("which runs? Name run folders, or a folder of `daae compare`. See `daae report --help`.")
    study = read_study(list(flags.folders))
    path = flags.html or flags.folders[0] / "report.html"
    if path.is_dir():
        raise UsageError(f"--html {path} is a folder. Name a file, such as {path / 'report.html'}.")
    page = render(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    answer = verdict(study)
    if flags.json:
        facts = {"verdict": answer.sentence, "meaning": answer.meaning, "tone": answer.tone}
        more = {"warnings": warnings(study), "missing": missing(study), "bytes": len(page.encode())}
        print(json.dumps({"html": str(path), **facts, **more}))
    else:
        print(f"{answer.sentence} {answer.meaning}")
        print(f"Wrote {path} ({len(page.encode()) / 1e6:.2f} MB); it opens in any browser, also offline.")
    return 0


# ----------------------------------------------------------------------------------------------------------- the page


def render(study: Study) -> str:
    """The whole page."""
    colours = {group.arm: COLOURS[place % len(COLOURS)] for place, group in enumerate(study.groups)}
    sections = [
        _head(study),
        notes("Before you believe it", warnings(study), "warn"),
        notes("What is missing", missing(study), "open"),
        _scores(study, colours),
        _curves(study, colours),
        _speed(study, colours),
        spent.section(study.groups),
        _losses(study, colours),
        _pictures(study),
        provenance.section(study),
    ]
    written = f"Written by <code>daae report</code>, {time.strftime('%Y-%m-%d %H:%M')}."
    return document(_title(study), sections, written)


def _title(study: Study) -> str:
    first, *others = [group.arm for group in study.groups]
    if not others:
        return f"Pre-training of {first}"
    return f"{listed(others) if len(others) <= 3 else f'{len(others)} arms'} against {first}"


def _head(study: Study) -> str:
    answer = verdict(study)
    data = next((trial.settings.get("data") for trial in study.trials), None)
    finished = sum(trial.done for trial in study.trials)
    facts = [f"{finished} of {len(study.trials) + len(study.missing)} runs finished"]
    facts += [f"data {Path(str(data)).name}"] if data else []
    facts += sorted({f"{t.env['images']:,} images" for t in study.trials if t.env.get("images")})
    facts += sorted({f"{t.settings['model.side']} px" for t in study.trials if t.settings.get("model.side")})
    facts += sorted({str(t.env["device"]) for t in study.trials if t.env.get("device")})
    several = "Is the 2x real?" if any(asks_the_claim(study, group) for group in study.groups) else "Side by side"
    question = several if len(study.groups) > 1 else "One recipe"
    # What the numbers come to stands before them; where there are none yet, what to do stands after that.
    told = [escape(each) for each in sentences(answer)]
    first, *others = [marked(answer.meaning), *told] if answer.parts else [*told, marked(answer.meaning)]
    said = f'<p class="answer">{first}</p>' + "".join(f"<p>{each}</p>" for each in others)
    return (
        f'<header><p class="kicker">{question}</p><h1>{escape(_title(study))}</h1>{_recipes(study)}'
        f'<div class="verdict {answer.tone}">{said}</div>{_tiles(study)}'
        f'<p class="facts">{escape(" · ".join(facts))}</p></header>'
    )


def _recipes(study: Study) -> str:
    """Which preset each arm is, where its name does not tell."""
    presets = {group.arm: group.trials[0].settings.get("preset") for group in study.groups}
    named = [f"{arm}: {preset}" for arm, preset in presets.items() if preset not in (None, "custom", arm)]
    return f'<p class="facts">Presets: {escape("; ".join(named))}</p>' if named else ""


def _tiles(study: Study) -> str:
    """Four numbers of the first arm that has a baseline beside it."""
    contrasts = study.contrasts()
    if not contrasts:
        return ""
    arm, each = next(iter(contrasts.items()))
    tiles, turns = [], study.paced_contrasts().get(arm)
    counts = lesser(each, turns)
    if each.difference is not None:
        gap = each.difference
        spread = _range(gap.low, gap.high, points)
        tiles.append((points(gap.mean), "points at the end of training", spread))
    if study.targeted and each.pairs:
        ratio = counts.ratio
        what = f"as fast to the target score{', steps timed in turns' if counts is turns else ''}"
        if ratio is None:
            tiles.append(("–", what, "seeds are bounds both ways"))
        else:
            number = f"{SIGNS[ratio.side]}{ratio.mean:.2f}x"
            tiles.append((number, what, _range(ratio.low, ratio.high, "{:.2f}".format)))
    pace = counts.pace if counts.seconds_per_epoch is None else counts.seconds_per_epoch
    if counts.epochs is not None:
        epochs = f"{SIGNS[counts.epochs.side]}{counts.epochs.mean:.2f}x"
        tiles.append((epochs, "epochs factor", "what the method saves"))
    if pace is not None:
        timed = ", timed in turns" if counts is turns else ""
        tiles.append((f"{pace:.2f}x", "seconds-per-epoch factor", f"what a pass costs{timed}; below 1: more"))
    cells = "".join(
        f'<div class="tile"><b>{escape(number)}</b><span>{escape(name)}</span><small>{escape(note)}</small></div>'
        for number, name, note in tiles
    )
    return f'<p class="facts">{escape(arm)} beside {escape(study.base.arm)}</p><div class="tiles">{cells}</div>'


def _range(low: float | None, high: float | None, words: Any) -> str:
    if low is None and high is None:
        return "one seed, no interval"
    if high is None:
        return f"95 % interval from {words(low)}, without an upper end"
    if low is None:
        return f"95 % interval up to {words(high)}, without a lower end"
    return f"95 % interval {words(low)} to {words(high)}"


def _chip(arm: str, colours: dict[str, str]) -> str:
    return f'<i class="chip" style="background:{colours[arm]}"></i>{escape(arm)}'


def _legend(arms: Iterable[str], colours: dict[str, str]) -> str:
    return '<p class="legend">' + "".join(f"<span>{_chip(arm, colours)}</span>" for arm in arms) + "</p>"


# ------------------------------------------------------------------------------------------------------------- scores


def _scores(study: Study, colours: dict[str, str]) -> str:
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
            name = _chip(group.arm, colours) if longest else f"<small>{escape(group.arm)}</small>"
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
    parts, contrasts = [], {}
    for test in study.tests:
        alone, contrasts, rows = study.on(test), study.contrasts_on(test), []
        for group in alone.groups:
            held = overtaken(alone) if group is alone.base else group.finished
            score, each = score_of(held), contrasts.get(group.arm)
            if score is not None:
                gap = alone.ahead(group, group.lengths[-1] if group.lengths else None)
                speed = (
                    "" if each is None else "seeds are bounds both ways" if each.ratio is None else ratio_words(each)
                )
                rows.append([
                    f"{_chip(group.arm, colours)} <small>{escape(held[0].cell.long)}</small>", escape(score.words()),
                    escape(gap_words(gap)), escape(speed),
                ])  # fmt: skip
        for name, words in BASELINES.items():
            base = baseline_score(alone.trials, name)
            if base is not None:
                rows.append([f"<em>{words}</em>", percent(base.mean), "", ""])
        headings = [test, "score, %", f"ahead of {study.base.arm}", "times as fast to its best"]
        shown = len(headings) if contrasts else len(headings) - 1
        parts.append(table(headings[:shown], [row[:shown] for row in rows]))
    best = f"<p>{escape(study.base.arm)} by its best length there; ahead: of its longest runs.</p>" if contrasts else ""
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


# ------------------------------------------------------------------------------------------------------------- curves


def _time_axis(times: Iterable[float]) -> bool:
    """Whether a logarithmic axis helps."""
    found = [each for each in times if each > 0]
    return bool(found) and max(found) >= LOG_FROM * min(found)


def _curves(study: Study, colours: dict[str, str]) -> str:
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
        f'set-up, evaluation and checkpoints.</p>{_legend(arms, colours)}<figure class="chart">{svg}</figure></section>'
    )


def _mean_line(group: Group, colour: str) -> list[Line]:
    """Mean score of the runs of each length against their mean seconds."""
    runs = [trials for length in group.lengths if score_of(trials := group.of_length(length)) is not None]
    if len(runs) < 2:
        return []
    seconds = [statistics.fmean(trial.seconds for trial in trials) for trials in runs]
    scores = [score_of(trials) for trials in runs]
    return [Line(seconds, [100 * score.mean for score in scores if score is not None], colour)]


def _losses(study: Study, colours: dict[str, str]) -> str:
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
        f'{_legend(arms, colours)}<div class="pair">{"".join(figures)}</div></section>'
    )


def _late(trial: Trial, name: str) -> list[dict]:
    """Its rows that have a value, less the first moments, which would take half of a logarithmic axis."""
    if name not in trial.metrics[-1]:
        return []
    return [row for row in trial.metrics if name in row and row["train_seconds"] >= trial.seconds / LONGEST_AXIS]


# -------------------------------------------------------------------------------------------------------------- speed


def _speed(study: Study, colours: dict[str, str]) -> str:
    contrasts = study.contrasts()
    ours = _factors(study, contrasts, colours) if contrasts else ""
    if not ours and len(study.groups) < 2:
        return ""
    theirs = table(
        ["data", "method", "epochs", "top-1, %", "time"],
        [[data, method, f"{epochs:,}", score, f"{ratio}x"] for data, method, epochs, score, ratio in SLIDES],
        left=2, css="theirs",
    )  # fmt: skip
    return (
        f"<section><h2>What the speed is made of</h2>{ours}"
        f'<aside class="slides"><h3>The slides\' figures: theirs, not measured here</h3>{theirs}'
        "<p>Top-1 and wall time relative to DAAE, as its slides print them. On ImageNet-1K that is 2.67 times fewer "
        "epochs at 1.30 times the seconds per epoch: 2.05. On ImageNet-mini at equal accuracy it is 1.45 times fewer "
        "epochs at 1.35 times the seconds: 1.08. Other images, sizes and machines than ours.</p></aside></section>"
    )


def _factors(study: Study, contrasts: dict[str, Contrast], colours: dict[str, str]) -> str:
    rows = [[_chip(study.base.arm, colours), target_words(study, study.base.arm) or "–", *["1"] * 6]]
    paced, longest = study.paced_contrasts(), study.contrasts(longest=True)
    for arm, each in contrasts.items():
        rows.append([
            _chip(arm, colours), escape(target_words(study, arm) or "–"),
            _ratio(each.ratio, each.pairs), _ratio(paced[arm].ratio, paced[arm].pairs) if arm in paced else "–",
            _ratio(longest[arm].whole, each.pairs),
            "–" if each.epochs is None else f"{SIGNS[each.epochs.side]}{each.epochs.mean:.2f}",
            "–" if each.seconds_per_epoch is None else f"{each.seconds_per_epoch:.2f}",
            "–" if each.pace is None else f"{each.pace:.2f}",
        ])  # fmt: skip
    headings = [
        "arm", "time to target", "times as fast", "steps timed in turns", f"whole runs of {study.base.arm}", "epochs",
        "× seconds per epoch", "s/epoch, whole run",
    ]  # fmt: skip
    head = f"<p>Target: {escape(target_name(study))}" + (", seed by seed" if study.target is None else "") + ". "
    return (
        (head if study.targeted else "<p>No target was asked for. ")
        + "Every factor is baseline over arm: above 1 the arm needs less. <em>Epochs</em> is what the method saves, "
        "<em>seconds per epoch</em> what a pass costs on the same loader, machine, precision and batch; their product "
        "is the ratio by the clock. <em>Steps timed in turns</em>: every step takes what it took when the arms' steps "
        "were timed alternately, before each seed, so that no slow hour of the machine is in it. <em>Whole runs</em>: "
        f"{'the target is what the longest runs of the baseline score, and ' if study.target is None else ''}its time "
        "is that of the whole run, as the slides count, even if it first met that score before. Times lie between two "
        "scores, linear in the logarithm of the seconds. Brackets: 95 % interval of the paired log ratios (Student's "
        f"t); where some times are only bounds, the one end that is known. {_how_scored(study)}</p>"
        + table(headings, rows)
        + _by_seed(contrasts, paced)
    )


def _ratio(ratio: Ratio | None, pairs: Sequence[Pair]) -> str:
    """A ratio, its interval on a line of its own."""
    if not pairs:
        return "–"
    if ratio is None:
        return "unknown"
    return f"{SIGNS[ratio.side]}{ratio.mean:.2f}<br><small>{interval_words(ratio) or 'one seed'}</small>"


def _how_scored(study: Study) -> str:
    if any(group.lengths for group in study.groups):
        return "Every score is that of a run at the end of its own schedule, and a run of each length was trained."
    return "Scores before the end come from a learning rate still high: it holds back whoever is ahead."


def _by_seed(contrasts: dict[str, Contrast], paced: dict[str, Contrast]) -> str:
    rows = []
    for arm, each in contrasts.items():
        turns = {pair.seed: pair for pair in paced[arm].pairs} if arm in paced else {}
        for pair in each.pairs:
            factors = pair.factors
            rows.append([
                escape(arm), str(pair.seed), percent(pair.target), _when(pair.base), _when(pair.arm),
                *(_bound(one.ratio) if one else "–" for one in (pair, turns.get(pair.seed))),
                "–" if factors is None else f"{factors.epochs:.2f}",
                "–" if factors is None else f"{factors.seconds_per_epoch:.2f}",
            ])  # fmt: skip
    if not rows:
        return ""
    headings = ["arm", "seed", "target, %", "baseline there", "arm there", "ratio", "steps timed in turns", "epochs",
                "seconds per epoch"]  # fmt: skip
    return "<details><summary>Seed by seed</summary>" + table(headings, rows) + "</details>"


def _bound(bound: Bounds) -> str:
    return f"{bound.words}{bound.number:.2f}" if bound.known else "unknown"


def _when(crossing: Any) -> str:
    seconds = crossing.seconds
    if not seconds.known:
        return "–"
    before = "" if seconds.exact else "within " if crossing.reached else "not in "
    return escape(before + seconds_words(seconds.number))


# ----------------------------------------------------------------------------------------------------------- pictures


def _pictures(study: Study) -> str:
    shown = []
    for group in study.groups:
        trial = next((each for each in reversed(group.trials) if each.gallery is not None), None)
        if trial is not None:
            shown.append(trial)
    figures = []
    for trial in shown:
        source = picture(trial.gallery, PICTURE_BYTES // len(shown)) if trial.gallery else None
        if source is not None:
            caption = f"<b>{escape(trial.arm)}</b>, seed {trial.seed}. {escape(_rows_of(trial))}"
            image = f'<img src="{source}" alt="views and repainted pictures of {escape(trial.arm)}">'
            figures.append(f'<figure class="gallery">{image}<figcaption>{caption}</figcaption></figure>')
    if not figures:
        return ""
    return (
        "<section><h2>What the encoder sees, and what it repaints</h2><p>The first images of the training set, one "
        f"column each, cut and coloured as in training.</p>{''.join(figures)}</section>"
    )


def _rows_of(trial: Trial) -> str:
    """What the rows of a gallery are, by the method's settings."""
    settings = trial.settings
    if settings.get("objective") not in ("mae", "daae"):
        return "A row per view; masked views also with their holes and, where there is a decoder, repainted."
    kept = 1 - float(settings.get("method.mask_ratio", 0.75))
    rows = ["the full-size view", f"what the encoder sees of it ({kept:.0%} of the patches)"]
    if settings.get("method.reconstruct_weight", 1.0) > 0:
        rows.append("the holes repainted by the decoder")
    if settings.get("objective") == "daae":
        crop = "the same" if settings.get("method.share_crop") else "its own"
        rows.append(f"the downsampled view, from {crop} crop")
    words = "Rows from the top: " + "; ".join(rows) + "."
    if settings.get("method.norm_pix") and settings.get("method.reconstruct_weight", 1.0) > 0:
        words += " The decoder predicts a patch relative to its mean and contrast, which are taken from the true patch."
    return words


if __name__ == "__main__":
    sys.exit(run(main))
