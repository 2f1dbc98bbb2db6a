"""The tables in README and docs, from the records that are kept: `python -m tools.results [--write]`.

docs/records/NAME holds what `daae compare` left of a comparison, put there by `--keep` (experiment.yaml, records.jsonl,
pace.json), or what `daae profile --step --json` printed with --peers, --knobs or --techniques, or `daae methods
--measure --json`, a file for each size. A page has its table between the lines `<!-- results of NAME -->` and
`<!-- end of results -->`; `<!-- results of NAME in brief -->` asks for a row for each arm of a comparison. The table of
`daae methods` stands between `<!-- methods -->` and `<!-- end of methods -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.staging import write_whole
from tools import methods
from tools.comparing import answers
from tools.comparing.doubts import warnings
from tools.comparing.records import EXPERIMENT, PACE, RECORDS, Study, read_study
from tools.comparing.scores import BASELINES, baseline_score, leading_name, score_of
from tools.comparing.table import HEADINGS, OF_TARGET, rows
from tools.comparing.verdict import sentences, verdict
from tools.comparing.wording import between_others, ratio_words, spread_words
from tools.profiling import method_costs, step_records
from tools.tables import page_table
from train.command import parse, run

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "docs/records"
ABSOLUTE = re.compile(r"""(?<=[\s"'])/(?:[^/\s"']+/)*([^/\s"']+/[^/\s"']+)""")
BLOCK = re.compile(r"(<!-- results of (\S+)( in brief)? -->\n).*?(<!-- end of results -->)", re.DOTALL)
METHODS = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)


@dataclass(frozen=True)
class Results:
    """Print the table of everything that is kept."""

    keep: Path | None = None
    """First keep another: a folder of `daae compare`, by its own name."""
    write: bool = False
    """Put each table where README and docs have its place."""


def main(argv: list[str]) -> int:
    flags = parse(Results, argv, prog="python -m tools.results")
    if flags.keep is not None:
        keep(flags.keep)
    for page in pages() if flags.write else ():
        write_whole(page, filled(page.read_text()))
    if not flags.write:
        for folder in sorted(path for path in KEPT.iterdir() if path.is_dir()):
            print(f"{folder.name}\n\n{markdown(folder)}")
    return 0


def keep(folder: Path) -> None:
    """Copy what a comparison left into docs/records, with no more of its paths than tells runs and stores apart."""
    folder = folder.resolve()
    read_study([folder])  # what cannot be read is not kept
    (KEPT / folder.name).mkdir(parents=True, exist_ok=True)
    for name in (EXPERIMENT, RECORDS, PACE):
        if not (folder / name).exists():  # only what is trained for seconds has a pace
            continue
        text = (folder / name).read_text().replace(f"{folder.parent}/", "")
        write_whole(KEPT / folder.name / name, ABSOLUTE.sub(r"\1", text))


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def filled(text: str) -> str:
    """A page with its tables made anew. Raises DataError where it wants one that is not kept."""
    text = METHODS.sub(lambda found: found[1] + methods.markdown() + found[2], text)
    return BLOCK.sub(lambda found: found[1] + (brief if found[3] else markdown)(KEPT / found[2]) + found[4], text)


def markdown(folder: Path) -> str:
    """A table of a comparison, with what to know of it in words, first what it comes to where it has a target; or one
    of timed steps. Raises DataError."""
    if folder.is_dir() and not (folder / RECORDS).exists():
        kind = method_costs if method_costs.read(folder) else step_records
        return "\n".join(kind.markdown(folder))
    study = _study(folder)
    columns = len(HEADINGS) if study.targeted else len(HEADINGS) - OF_TARGET
    found: list[tuple[str, ...]] = [HEADINGS[:columns]]
    for own, (first, *others) in rows(study):
        found.append((f"`{first.strip()}`" if own else first.strip(), *others[: columns - 1]))
    others = between_others(study)
    lines = [f"{leading_name(study)}, %:", "", *_table(found), ""]
    lines += [f"{spread_words(study)} {others}".strip(), "", *_answers(study)]
    answer = verdict(study)
    told = [*sentences(answer), answer.meaning] if study.targeted else []
    said = [*told, *warnings(study)]
    return "\n".join([*lines, *(f"- {each}" for each in said), ""])


def brief(folder: Path) -> str:
    """A row for each arm, its score after each length, and how much sooner it is at the target. Raises DataError."""
    study = _study(folder)
    clocks = {"times as fast": study.contrasts(), "in turns": study.paced_contrasts()} if study.targeted else {}
    lengths = sorted({length for group in study.groups for length in group.lengths}) or [None]
    named = {trial.cell.length: trial.cell.long or "score" for trial in study.trials}
    found = [["", *(named[length] for length in lengths), *clocks]]
    for group in study.groups:
        scores = [score_of(group.of_length(length)) for length in lengths]
        speeds = [ratio_words(each[group.arm]) if group.arm in each else "" for each in clocks.values()]
        found.append([group.arm, *("" if score is None else score.words() for score in scores), *speeds])
    beside = {words: baseline_score(study.trials, name) for name, words in BASELINES.items()}
    known = [f"{words} {score.words()}" for words, score in beside.items() if score is not None]
    lines = [f"{leading_name(study)}, %, ± between seeds:", "", *_table(found), ""]
    return "\n".join([*lines, *([f"Without training: {', '.join(known)}.", ""] if known else [])])


def _study(folder: Path) -> Study:
    if not folder.is_dir():
        raise DataError(f"{folder} is not there, and a page asks for its table.")
    return read_study([folder])


def _answers(study: Study) -> list[str]:
    """What was asked of the runs beside the score that leads, if anything was."""
    names, found = answers.table(study)
    if not found:
        return []
    beside = f"in brackets: points ahead of {study.base.arm}'s longest runs, paired by seed"
    table = [["", *(who for who, _ in found)]]
    for name, cells in zip(names, zip(*(cells for _, cells in found), strict=True), strict=True):
        table.append([name, *("" if cell is None else cell.words() for cell in cells)])
    return [f"Mean of the test sets, %, ± between seeds; {beside}:", "", *_table(table), ""]


def _table(found: Sequence[Sequence[str]]) -> list[str]:
    """Names on the left, figures on the right."""
    return page_table(found, "l" + "r" * (len(found[0]) - 1))


if __name__ == "__main__":
    sys.exit(run(main))
