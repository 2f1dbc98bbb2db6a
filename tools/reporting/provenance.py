"""How a study was measured, for `daae report`: every run, what the arms differ in, machine, versions and commands."""

from __future__ import annotations

from html import escape
from typing import Any

import yaml

from tools.comparing.records import Study, as_typed, recipe
from tools.comparing.wording import plain, seconds_words
from tools.page import table

FEW_RUNS = 12  # that are shown without a click


def section(study: Study) -> str:
    rows = []
    arms = [group.arm for group in study.groups]
    for trial in sorted(study.trials, key=lambda each: (arms.index(each.arm), each.cell.length or 0.0, each.seed)):
        last = trial.metrics[-1] if trial.metrics else {}
        wait = last.get("data_wait")
        pace = trial.outcome.seconds_per_epoch
        rows.append([
            escape(f"{trial.arm} {trial.cell.long}"), str(trial.seed), escape(trial.state), f"{trial.step:,}",
            f"{trial.images:,}", escape(seconds_words(trial.seconds)),
            "–" if trial.rate is None else f"{trial.rate:,.0f}",
            "–" if pace is None else f"{pace:.3g}", "–" if wait is None else f"{wait:.1%}",
        ])  # fmt: skip
    headings = ["arm", "seed", "state", "steps", "images", "training", "images/s", "s/epoch", "waiting for data"]
    runs = table(headings, rows)
    if len(rows) > FEW_RUNS:
        runs = f"<details><summary>All {len(rows)} runs</summary>{runs}</details>"
    return (
        "<section><h2>How it was measured</h2><p>The clock counts training only: waiting for data, views, forward, "
        "backward and optimizer. Set-up, calibration, evaluation and checkpoints stand outside it. Images/s leaves out "
        "the first 50 steps where the run is long enough. Runs of a comparison follow one another on one machine, and "
        "the arms take turns to go first.</p>"
        + runs
        + _differences(study)
        + _environment(study)
        + _commands(study)
        + "</section>"
    )


def _differences(study: Study) -> str:
    if len(study.groups) < 2:
        return ""
    settings = [recipe(group.trials[0]) for group in study.groups]
    names = sorted({name for each in settings for name in each})
    rows = []
    for name in names:
        values = [each.get(name, "–") for each in settings]
        if any(value != values[0] for value in values):
            rows.append([f"<code>{escape(name)}</code>", *(escape(plain(value)) for value in values)])
    same = len(names) - len(rows)
    if not rows:
        return f"<h3>Settings</h3><p>The arms agree in all {same} settings.</p>"
    return (
        f"<h3>Settings in which the arms differ</h3><p>They agree in {same} others. – : the method has no such setting."
        "</p>" + table(["setting", *(group.arm for group in study.groups)], rows, left=1 + len(study.groups))
    )


def _environment(study: Study) -> str:
    """One row per fact, with all values that the runs have."""
    facts: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        if value not in (None, "", "None") and str(value) not in facts.setdefault(name, []):
            facts[name].append(str(value))

    for trial in study.trials:
        env, settings = trial.env, trial.settings
        add("device", env.get("device"))
        add("cores", env.get("cores"))
        add("precision", settings.get("precision"))
        add("loader", settings.get("loader"))
        add("batch", settings.get("optim.batch"))
        add("data set", settings.get("data"))
        add("fingerprint of the data", env.get("data"))
        add("images in it", f"{env['images']:,}" if env.get("images") else None)
        for test in settings.get("watch.tests") or []:
            add("test sets", test)
        add("label", (trial.evaluation or {}).get("label"))
        add("code", env.get("code"))
        add("python", env.get("python"))
        for name, version in (env.get("versions") or {}).items():
            add("versions", f"{name} {version}")
        add("system", env.get("system"))
        add("dates", str(env.get("date", ""))[:10])
    rows = [[escape(name), escape(", ".join(values))] for name, values in facts.items() if values]
    return "<h3>Environment and data</h3>" + table(["", ""], rows, left=2, css="plain") if rows else ""


def _commands(study: Study) -> str:
    lines = []
    for each in study.experiments:
        if each:
            said = {key: value for key, value in each.items() if value not in (None, [], {})}
            lines.append("# experiment.yaml\n" + yaml.safe_dump(said, sort_keys=False))
            lines.append("daae compare --experiment experiment.yaml --out OUT\ndaae report OUT\n")
    commands = dict.fromkeys(as_typed(trial.command) for trial in study.trials if trial.command)
    parts = []
    if lines:
        parts.append(f"<pre>{escape(chr(10).join(lines))}</pre>")
    if commands:
        runs = f"<pre>{escape(chr(10).join(commands))}</pre>"
        parts.append(f"<details><summary>Each run alone</summary>{runs}</details>" if lines else runs)
    return "<h3>To reproduce it</h3>" + "".join(parts) if parts else ""
