"""`daae compare`: recipes side by side on one machine, every seed, in turns; a record per finished run.

arms -> steps that the seconds come to -> `daae pretrain` of each arm in turn, score by score -> records.jsonl
     -> a table here, a page with `daae report`
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import DaaeError, NumericsError
from pipeline.staging import claimed, write_whole
from tools.children import PassOn, call, failure
from tools.comparing.experiment import Compare, Plan, check_bench, check_here, check_records, nested, plan_experiment
from tools.comparing.pace import measured_paces
from tools.comparing.questions import ANSWERS, TUNED, typed
from tools.comparing.records import (
    BASELINE_SCORES,
    EXPERIMENT,
    RECORDS,
    Cell,
    cell_of,
    deciding,
    digest,
    read_run,
    read_study,
)  # fmt: skip
from tools.comparing.table import show, summary
from train.command import parse, read_yaml, run
from train.config import as_values, flat
from train.evaluation.exam import EVALUATION, FIFTHS, pooled
from train.finetune import RESULT
from train.journal import code_revision, duration
from train.json_files import read_object, read_rows


def main(argv: list[str]) -> int:
    flags = parse(Compare, argv, prog="daae compare")
    plan = plan_experiment(flags)
    if flags.dry_run:
        for cell in plan.order():
            print(shlex.join(["daae", "pretrain", *plan.pretrain_words(cell)]))
        print(foretold(plan))
        return 0
    with claimed(plan.out, "comparison", (EXPERIMENT, RECORDS), overwrite=flags.overwrite), PassOn() as stop:
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
            store = open_store(wishes[0])
            rate, images = measured_rate(wishes[0], store), store.per_epoch
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


def _run_all(plan: Plan, flags: Compare, records: list[dict], stop: PassOn) -> list[Cell]:
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


def question(plan: Plan, records: list[dict], stop: PassOn, diverged: list[Cell], *, quiet: bool) -> None:
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


SAME_SCORE = 0.0005  # a share of 1: of two evaluations of one run, apart by rounding


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


def evaluate(folder: Path, cell: Cell, device: str, flags: dict, stop: PassOn) -> dict:
    command = ["train.evaluate", str(folder), "--no-cache", "--device", device, *typed(flags)]
    # What it prints is a table of one run; ours follows at the end.
    call(command, f"evaluate {cell.words}", folder, stop, subprocess.DEVNULL)
    return read_object(folder / EVALUATION)


def finetune(folder: Path, cell: Cell, device: str, flags: dict, stop: PassOn) -> dict:
    """In a folder for these flags, so that what was cut short goes on, and other flags begin anew. With `folds` each
    fifth is held out in turn, and the result is that of all pictures."""
    flags, results = dict(flags), []
    for fold in range(FIFTHS) if flags.pop("folds", False) else [0]:
        out = folder / f"{TUNED}-{digest(flags)}-fold{fold}"
        command = ["train.finetune", str(folder), "--out", str(out), "--seed", str(cell.seed), "--device", device]
        command += ["--fold", str(fold), *typed(flags)]
        call(command, f"finetune {cell.words}", out, stop, subprocess.DEVNULL)
        results.append(read_object(out / RESULT))
    return {**results[0], "leading": pooled([each["leading"] for each in results])} if len(results) > 1 else results[0]


def rounds(plan: Plan, finished: set[Cell]) -> Iterator[list[Cell]]:
    """What is still to be trained, by seed and length: runs that are held against one another."""
    for _, round in itertools.groupby(plan.order(), key=lambda cell: (cell.seed, cell.length)):
        waiting = [cell for cell in round if cell not in finished]
        if waiting:
            yield waiting


def take_turns(
    plan: Plan, waiting: list[Cell], paces: dict[str, float], stop: PassOn, diverged: list[Cell], *, quiet: bool
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


def go_on(plan: Plan, cell: Cell, pace: float | None, stop: PassOn, *, quiet: bool) -> None:
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


def differs(plan: Plan, arm: str) -> dict[str, Any]:
    """The settings in which an arm differs from the first, as they are in this arm."""
    first = deciding(flat(as_values(plan.wish(next(iter(plan.arms))))))
    mine = deciding(flat(as_values(plan.wish(arm))))
    return {name: mine.get(name) for name in sorted(first.keys() | mine.keys()) if first.get(name) != mine.get(name)}


if __name__ == "__main__":
    sys.exit(run(main))
