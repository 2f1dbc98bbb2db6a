"""`daae report`: runs and comparisons as one HTML file that opens offline, for a reader who asks "is the 2x real?"

The answer stands first, then why to doubt it and what is missing; then scores, curves, the factors of the speed with
the slides' figures apart from ours, where the seconds went, losses, pictures, and how it was measured. Nothing in the
file points outside of it, and everything that comes from a run is escaped.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.errors import UsageError
from pipeline.staging import write_whole
from tools.charts import COLOURS
from tools.comparing.doubts import missing, warnings
from tools.comparing.records import Study, read_study
from tools.comparing.scores import points
from tools.comparing.verdict import asks_the_claim, lesser, sentences, verdict
from tools.comparing.wording import SIGNS, listed
from tools.page import document, marked, notes
from tools.reporting import curves, pictures, provenance, scores, speed, spent
from train.command import parse, run


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


def render(study: Study) -> str:
    """The whole page."""
    colours = {group.arm: COLOURS[place % len(COLOURS)] for place, group in enumerate(study.groups)}
    sections = [
        _head(study),
        notes("Before you believe it", warnings(study), "warn"),
        notes("What is missing", missing(study), "open"),
        scores.section(study, colours),
        curves.scores(study, colours),
        speed.section(study, colours),
        spent.section(study.groups),
        curves.losses(study, colours),
        pictures.section(study),
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


if __name__ == "__main__":
    sys.exit(run(main))
