"""What a speed is made of, for `daae report`: epochs and seconds an epoch, and the slides' figures apart from ours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from tools.charts import chip
from tools.comparing.analysis import Bounds, Contrast, Pair, Ratio
from tools.comparing.records import Study
from tools.comparing.scores import percent
from tools.comparing.wording import SIGNS, interval_words, seconds_words, target_name, target_words
from tools.page import table

# Theirs, never ours. Source: the slides of Pan and Wei 2022; the factors are computed from their epochs and times.
SLIDES = (
    ("ImageNet-1K", "MAE", 1600, "83.3", "2.05"),
    ("ImageNet-1K", "DAAE", 600, "83.5", "1"),
    ("ImageNet-mini", "MAE", 800, "42.5", "1.08"),
    ("ImageNet-mini", "DAAE", 550, "42.8", "1"),
    ("ImageNet-mini", "DAAE", 800, "44.8", "1.45"),
)


def section(study: Study, colours: dict[str, str]) -> str:
    """HTML; nothing of one arm alone."""
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
    rows = [[chip(study.base.arm, colours), target_words(study, study.base.arm) or "–", *["1"] * 6]]
    paced, longest = study.paced_contrasts(), study.contrasts(longest=True)
    for arm, each in contrasts.items():
        rows.append([
            chip(arm, colours), escape(target_words(study, arm) or "–"),
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
