"""`daae compare`: recipes side by side on one machine, every seed, in turns; a record per finished run.

arms -> steps that the seconds come to -> `daae pretrain` of each arm in turn, score by score -> records.jsonl
     -> a table here, a page with `daae report`
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import DaaeError, NumericsError
from pipeline.staging import claimed, write_whole
from tools.children import Stop, call, failure
from tools.comparing.analysis import Contrast
from tools.comparing.doubts import warnings
from tools.comparing.experiment import Compare, Plan, check_bench, check_here, check_records, make_plan, nested
from tools.comparing.questions import ANSWERS, TUNED, typed
from tools.comparing.records import (
    BASELINE_SCORES,
    EXPERIMENT,
    PACE,
    RECORDS,
    Cell,
    Study,
    cell_of,
    deciding,
    measured,
    read_run,
    read_study,
)  # fmt: skip
from tools.comparing.scores import BASELINES, arm_score, baseline_score, leading_name, score_of
from tools.comparing.verdict import verdict
from tools.comparing.wording import gap_words, ratio_words, seconds_words, spread_words, target_words
from train.command import parse, read_yaml, run
from train.config import as_values, completed, flat
from train.evaluate import EVALUATION
from train.evaluation.exam import FOLDS, pooled
from train.finetune import RESULT
from train.journal import code_revision, duration
from train.json_files import read_object, read_rows

if TYPE_CHECKING:
    from rich.table import Table

# ------------------------------------------------------------------------------------------------------- running it


def main(argv: list[str]) -> int:
    flags = parse(Compare, argv, prog="daae compare")
    plan = make_plan(flags)
    if flags.dry_run:
        for cell in plan.order():
            print(shlex.join(["daae", "pretrain", *plan.pretrain_words(cell)]))
        print(foretold(plan))
        return 0
    with claimed(plan.out, "comparison", (EXPERIMENT, RECORDS), overwrite=flags.overwrite), Stop() as stop:
        records = read_rows(plan.out / RECORDS)
        check_records(plan, records)
        _prepare(plan)
        diverged = _run_all(plan, flags, records, stop)
    study = read_study([plan.out])
    if flags.json:
        print(json.dumps({"out": str(plan.out), "records": len(records), "arms": summary(study)}))
    else:
        show(study)
        print(f"Records are in {plan.out / RECORDS}; `daae report {plan.out}` makes a page of them.")
    if diverged:
        raise NumericsError(
            f"{len(diverged)} of {len(plan.order())} runs have no score, since their gradients were not finite: "
            f"{', '.join(cell.words for cell in diverged)}. The others are kept. Declare a lower optim.lr for that arm."
        )
    return 0


def foretold(plan: Plan) -> str:
    """How long the runs of each arm train, and all of them: by what their budgets say, or at a rate measured here."""
    from train.data import open_store
    from train.plan import make_plan, measured_rate
    from train.stages import images_per_step

    total, lines = 0.0, []
    for arm, cells in itertools.groupby(sorted(plan.order(), key=lambda cell: cell.arm), key=lambda cell: cell.arm):
        wishes = [plan.wish(arm, cell.length) for cell in cells]
        taken, how = [wish.budget.seconds for wish in wishes], ""
        if None in taken:
            rate, images = measured_rate(wishes[0]), open_store(wishes[0]).per_epoch
            taken = [make_plan(wish, images, rate)["steps"] * images_per_step(wish) / rate for wish in wishes]
            how = f" at {rate:,.4g} images/s, measured here for some seconds on one device"
        seconds = math.fsum(each or 0.0 for each in taken)
        total += seconds
        lines.append(f"# {arm}: {len(wishes)} run{'s' * (len(wishes) > 1)}, {duration(seconds)}{how}")
    return "\n".join([*lines, f"# All together {duration(total)} of training, and evaluation besides."])


def _prepare(plan: Plan) -> None:
    """Write down what is wanted, with the arms, seeds, lengths, questions and notes of earlier calls."""
    before = read_yaml(plan.out / EXPERIMENT) if (plan.out / EXPERIMENT).exists() else {}
    values = {**{name: before[name] for name in (*ANSWERS, "notes") if name in before}, **plan.as_values()}
    values["arms"] = {**before.get("arms", {}), **values["arms"]}
    values["seeds"] = list(dict.fromkeys([*before.get("seeds", []), *values["seeds"]]))
    if len(plan.lengths) > 1 and isinstance(before.get(plan.unit), list):
        values[plan.unit] = sorted({*before[plan.unit], *plan.lengths})
    for arm in plan.arms:
        if plan.overrides(arm):
            plan.arm_file(arm).parent.mkdir(exist_ok=True)
            write_whole(plan.arm_file(arm), yaml.safe_dump(nested(plan.overrides(arm)), sort_keys=False))
    write_whole(plan.out / EXPERIMENT, yaml.safe_dump(values, sort_keys=False))


def _run_all(plan: Plan, flags: Compare, records: list[dict], stop: Stop) -> list[Cell]:
    """Every run that has no record yet; appends to `records` and to their file. Returns those that diverged."""
    finished = {cell_of(record) for record in records}
    if not plan.labelled and not flags.quiet:
        print(f"note: {plan.data} has no labels, so runs are trained and timed but not scored.", file=sys.stderr)
    diverged: list[Cell] = []
    if records and not finished >= set(plan.order()):
        check_here(plan, records[-1])
    for waiting in rounds(plan, finished):
        others = {record["seed"] for record in records} - {waiting[0].seed}
        paces = measured_paces(plan, stop, times=1 + len(others), quiet=flags.quiet)
        for cell in take_turns(plan, waiting, paces, stop, diverged, quiet=flags.quiet):
            record = make_record(plan, cell)
            check_bench(record, records)
            records.append(record)
            write_records(plan, records)
            question(plan, records, stop, diverged, quiet=flags.quiet)
    question(plan, records, stop, diverged, quiet=flags.quiet)  # what was declared only after its runs had ended
    return diverged


def write_records(plan: Plan, records: list[dict]) -> None:
    write_whole(plan.out / RECORDS, "".join(json.dumps(each) + "\n" for each in records))


def question(plan: Plan, records: list[dict], stop: Stop, diverged: list[Cell], *, quiet: bool) -> None:
    """Ask every recorded run what the experiment wants to know beside its score, unless it has answered; the answers go
    into its record. A run whose folder is gone answers no more. One whose numbers fail, when it is fine-tuned, goes to
    `diverged`."""
    wanted = set(plan.order()) - set(diverged)
    for record in records:
        cell, answered = cell_of(record), record.get("asked", {})
        if cell not in wanted or not done(plan.folder(cell)):
            continue
        for name, flags in plan.asked(cell).items():
            if answered.get(name) == flags:
                continue
            if not quiet:
                print(f"{name} {cell.words}", file=sys.stderr, flush=True)
            device, answered = record["settings"]["device"], {**answered, name: flags}
            ask = evaluate if name == "evaluate" else finetune
            try:
                answer = ask(plan.folder(cell), cell, device, flags, stop)
            except DaaeError as error:
                _diverged(error, f"{name} {cell.words}")
                diverged.append(cell)
                break
            if name == "evaluate":
                _say_moved(cell, record, answer)
            record |= {ANSWERS[name]: answer, "asked": answered, "asked_by": code_revision()}
            write_records(plan, records)


def _say_moved(cell: Cell, record: dict, answer: dict) -> None:
    """A run that is asked again by other code, or on another machine, should score what it scored."""
    before, now = ((each or {}).get("leading") for each in (record.get("evaluation"), answer))
    if before and now and abs(before["value"] - now["value"]) > SAME_SCORE:
        code = record.get("asked_by") or record["env"].get("code")
        print(
            f"note: {cell.words} scores {100 * now['value']:.1f} now, and scored {100 * before['value']:.1f} before, "
            f"by code {code}; from here on the new score counts.",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _diverged(error: DaaeError, what: str) -> None:
    """Say that one run's numbers failed; any other error ends all of them."""
    if error.code != NumericsError.code:
        raise error
    print(f"{what} ends here, as said above; the other runs go on.", file=sys.stderr, flush=True)


def evaluate(folder: Path, cell: Cell, device: str, flags: dict, stop: Stop) -> dict:
    command = ["train.evaluate", str(folder), "--no-cache", "--device", device, *typed(flags)]
    # What it prints is a table of one run; ours follows at the end.
    call(command, f"evaluate {cell.words}", folder, stop, subprocess.DEVNULL)
    return read_object(folder / EVALUATION)


def finetune(folder: Path, cell: Cell, device: str, flags: dict, stop: Stop) -> dict:
    """In a folder for these flags, so that what was cut short goes on, and other flags begin anew. With `folds` each
    fifth is held out in turn, and the result is that of all pictures."""
    flags, results = dict(flags), []
    for fold in range(FOLDS) if flags.pop("folds", False) else [0]:
        out = folder / f"{TUNED}-{digest(flags)}-fold{fold}"
        command = ["train.finetune", str(folder), "--out", str(out), "--seed", str(cell.seed), "--device", device]
        command += ["--fold", str(fold), *typed(flags)]
        call(command, f"finetune {cell.words}", out, stop, subprocess.DEVNULL)
        results.append(read_object(out / RESULT))
    return {**results[0], "leading": pooled([each["leading"] for each in results])} if len(results) > 1 else results[0]


def measured_paces(plan: Plan, stop: Stop, *, times: int = 1, quiet: bool) -> dict[str, float]:
    """arm -> seconds of a step, which its seconds are divided by, for every arm whose budget is seconds.

    All are measured in one go, in turns, so that the machine's mood cannot favour one. An arm that joins later is
    measured together with an earlier one, and gets that one's paces, past and first, times the ratio of the two.
    Seconds are divided by what was measured first; until all were measured so many `times` they are measured again, for
    the record alone.
    """
    wishes = {arm: plan.wish(arm) for arm in plan.arms}
    wishes = {arm: wish for arm, wish in wishes.items() if wish.budget.seconds is not None}
    devices = {"gpus": plan.gpus} if plan.gpus > 1 else {}
    keys = {arm: digest({**unhurried(flat(as_values(wish))), **devices}) for arm, wish in wishes.items()}
    known = read_object(plan.out / PACE)
    known = {arm: known[arm] for arm, key in keys.items() if known.get(arm, {}).get("digest") == key}
    if known.keys() < wishes.keys() or any(len(measured(each)) < times for each in known.values()):
        if not quiet:
            print(f"measuring a step of {', '.join(wishes)}, in turns", file=sys.stderr, flush=True)
        question = plan.out / f".{PACE}"
        write_whole(question, json.dumps({"settings": {arm: as_values(wish) for arm, wish in wishes.items()}}))
        call(["train.pace", str(question), str(plan.gpus)], "measuring a step of each arm", plan.out, stop)
        now = read_object(question)["seconds_per_step"]
        question.unlink()
        # Of an arm that was there before: what it took first, and at every moment until now, in what it takes now.
        first, past = 1.0, []
        for arm, each in itertools.islice(known.items(), 1):
            first, past = each["seconds_per_step"] / now[arm], [then / now[arm] for then in measured(each)]
        for arm, key in keys.items():
            if arm in known:
                known[arm] = {**known[arm], "measured": [*measured(known[arm]), now[arm]]}
            else:
                known[arm] = {
                    "digest": key, "seconds_per_step": first * now[arm],
                    "measured": [*(then * now[arm] for then in past), now[arm]],
                }  # fmt: skip
        write_whole(plan.out / PACE, json.dumps({**read_object(plan.out / PACE), **known}, indent=1))
    return {arm: known[arm]["seconds_per_step"] for arm in wishes}


def unhurried(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the pace: not how long it is kept up, and no option that is at its default, as it was before there
    was it."""
    usual = completed({"objective": settings["objective"]})
    return {
        name: value for name, value in deciding(settings).items()
        if name == "objective" or (value != usual.get(name) and not name.startswith("budget."))
    }  # fmt: skip


def rounds(plan: Plan, finished: set[Cell]) -> Iterator[list[Cell]]:
    """What is still to be trained, by seed and length: runs that are held against one another."""
    for _, round in itertools.groupby(plan.order(), key=lambda cell: (cell.seed, cell.length)):
        waiting = [cell for cell in round if cell not in finished]
        if waiting:
            yield waiting


def take_turns(
    plan: Plan, waiting: list[Cell], paces: dict[str, float], stop: Stop, diverged: list[Cell], *, quiet: bool
) -> Iterator[Cell]:
    """Train runs side by side, each to its next score and then the next one. Yields who has finished.

    A slow hour of the machine is then an hour of every arm, where runs are scored on their way. A run whose numbers
    fail goes to `diverged`, and the others go on: hours of theirs are not lost by it.
    """
    places = {cell: place for place, cell in enumerate(plan.order(), 1)}
    while waiting:
        for cell in tuple(waiting):
            # A finished run is not asked again: starting it would rewrite its env.json, which says where it was timed.
            if not done(plan.folder(cell)):
                stop.check(f"the comparison in {plan.out}")
                if not quiet:
                    print(f"[{places[cell]}/{len(places)}] {cell.words}", file=sys.stderr, flush=True)
                try:
                    go_on(plan, cell, paces.get(cell.arm), stop, quiet=quiet)
                except DaaeError as error:
                    _diverged(error, cell.words)
                    diverged.append(cell)
                    waiting.remove(cell)
                    continue
            if done(plan.folder(cell)):
                waiting.remove(cell)
                yield cell
        waiting = waiting[1:] + waiting[:1]


def done(folder: Path) -> bool:
    return read_object(folder / "status.json").get("state") == "done"


def go_on(plan: Plan, cell: Cell, pace: float | None, stop: Stop, *, quiet: bool) -> None:
    """Train one run as far as its next score. Raises what it failed with, or DaaeError if it stands still."""
    folder, what = plan.folder(cell), cell.words
    command = ["train.pretrain", *plan.pretrain_words(cell, pace), "--until-score", *(["--quiet"] if quiet else [])]
    for other in plan.order():
        if other != cell and other.seed == cell.seed and (plan.folder(other) / BASELINE_SCORES).exists():
            command += ["--baselines", str(plan.folder(other))]  # where seed and encoder are the same, so are they
            break
    before = _reached(folder)
    call(command, what, folder, stop)
    if not done(folder) and _reached(folder) == before:
        raise failure(6, f"{what} stands still at step {before[0]:,}; see {folder / 'train.log'}.")


def _reached(folder: Path) -> tuple[int, str]:
    """The last step that a run told of, which may be lost again, and its last checkpoint."""
    status = read_object(folder / "status.json")
    return status.get("step", -1), status.get("last_checkpoint", "")


def make_record(plan: Plan, cell: Cell) -> dict:
    """All that a comparison needs to know of a finished run."""
    trial, arm = read_run(plan.folder(cell), cell), cell.arm
    decides = {**deciding(trial.settings), "data": plan.fingerprints["data"]}
    last = trial.metrics[-1]
    return {
        **dataclasses.asdict(cell), "digest": digest(decides), "declared": sorted(plan.arms[arm].settings),
        "differs": differs(plan, arm), "settings": trial.settings, "fingerprints": plan.fingerprints_of(arm),
        "env": {**trial.env, "command": shlex.join(["daae", "pretrain", *plan.pretrain_words(cell)])},
        "steps": trial.step, "epochs": last["epoch"], "images": trial.images, "train_seconds": trial.seconds,
        "images_per_second": round(trial.rate or 0.0, 1), "data_wait": last["data_wait"],
        "seconds_per_epoch": round(trial.outcome.seconds_per_epoch or 0.0, 4), "evaluations": trial.evaluations,
        "evaluation": trial.evaluation, "ledger": trial.ledger,
    }  # fmt: skip


def digest(values: Mapping[str, Any]) -> str:
    """Short name of a configuration: 12 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def differs(plan: Plan, arm: str) -> dict[str, Any]:
    """The settings in which an arm differs from the first, as they are in this arm."""
    first = deciding(flat(as_values(plan.wish(next(iter(plan.arms))))))
    mine = deciding(flat(as_values(plan.wish(arm))))
    return {name: mine.get(name) for name in sorted(first.keys() | mine.keys()) if first.get(name) != mine.get(name)}


# --------------------------------------------------------------------------------------------------------- the table


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
                    seconds_words(_mean(t.seconds for t in shorter)), "", "", score_then.words(),
                    gap_words(study.ahead(group, length)), "", "", "",
                )  # fmt: skip
        clocks = [each.get(group.arm) for each in (contrasts, paced)]
        speeds = [ratio_words(each) if each is not None and study.targeted else "" for each in clocks]
        last = group.lengths[-1] if group.lengths else None
        pace = _mean(trial.outcome.seconds_per_epoch or 0.0 for trial in done)
        yield True, (
            f"{group.arm} {done[0].cell.long}".strip(), " ".join(str(trial.seed) for trial in done),
            seconds_words(_mean(t.seconds for t in done)),
            f"{_mean(t.rate or 0.0 for t in done):,.0f}", f"{pace:.3g}",
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
SAME_SCORE = 0.0005  # a share of 1: of two evaluations of one run, apart by rounding


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


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    sys.exit(run(main))
