"""`daae compare`: recipes side by side on one machine, every seed, interleaved; a record per finished run.

    arms x seeds -> `daae pretrain` -> `daae evaluate` -> records.jsonl -> a table here, a page with `daae report`

What arms may differ in is the method and what an experiment file declares. Everything else has to agree, also with the
records that the output folder already holds: a silent difference would be measured as if it were the method's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import DaaeError, Preempted, ResourceError, UsageError
from pipeline.staging import write_durably
from pipeline.store import Store
from tools.analysis import Contrast
from tools.records import (
    ARMS,
    EXPERIMENT,
    RECORDS,
    RUNS,
    Study,
    deciding,
    read_lines,
    read_object,
    read_run,
    read_study,
    run_name,
    target_score,
)  # fmt: skip
from tools.verdict import (
    BASELINES,
    arm_score,
    baseline_score,
    leading_name,
    ratio_words,
    seconds_words,
    target_words,
    verdict,
)  # fmt: skip
from train.command import coerce, nearest, parse, plain, read_yaml, run
from train.config import Budget, Run, as_values, flat, with_values
from train.presets import PRESETS, open_preset

EVALUATIONS = 6
SAVE_SECONDS = 120.0  # that a run has for its checkpoint after a signal; then it is killed

# No arm may declare these: they belong to the bench, not to a recipe.
BENCH = ("data", "device", "precision", "loader", "seed", "out", "optim.batch", "watch")
# What a recipe is, what a run is called, and stores, which are compared by what they hold and not by their path.
RECIPE = ("preset", "objective", "method", "seed", "out", "data", "watch.tests")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train recipes side by side for the same seconds, over seeds, and score each. The same command goes on."""

    out: Path
    """Folder of the comparison; finished runs in it are kept, unfinished ones resumed."""
    presets: tuple[str, ...] = ()
    """The arms, by preset; the first is the baseline."""
    experiment: Path | None = None
    """YAML that declares the arms and all the rest; flags go before it. See tools/experiments."""
    data: Path | None = None
    """Store made by `daae convert`."""
    tests: tuple[Path, ...] = ()
    """Stores to score on; without any, a fifth of the labelled training images is held out."""
    label: str | None = None
    """Label column to score; default: the leading one of the store."""
    seconds: float | None = None
    """Training seconds of each run."""
    epochs: float | None = None
    """Instead of seconds: passes over the images."""
    steps: int | None = None
    """Instead of seconds: optimizer steps."""
    seeds: tuple[int, ...] = ()
    """Each arm runs with each seed; three give an interval. Default: 0."""
    evaluations: int | None = None
    """Scores taken during a run, evenly spread, for the time to a target. Default: 6."""
    target: str | None = None
    """baseline (its final score, seed by seed), a score in percent, or none. Default: baseline."""
    settings: tuple[str, ...] = ()
    """Settings of every arm, as NAME=VALUE: --settings model.depth=12 optim.batch=256."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N, for every arm."""
    dry_run: bool = False
    """Check everything, print the commands in their order, and stop."""
    overwrite: bool = False
    """Delete what --out holds and start anew."""
    quiet: bool = False
    """No progress."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True)
class Arm:
    """A preset and what is declared to differ from it."""

    preset: str
    settings: dict[str, Any] = field(default_factory=dict)  # flat: {"method.temperature": 0.1}

    def as_values(self) -> Any:
        return {"preset": self.preset, "settings": self.settings} if self.settings else self.preset


@dataclass(frozen=True)
class Plan:
    """An experiment, checked: what to run, in which order, and how."""

    out: Path
    arms: dict[str, Arm]
    data: Path
    tests: tuple[Path, ...]
    label: str | None
    budget: Budget | None  # common to all arms; None where each arm has its own
    seeds: tuple[int, ...]
    evaluations: int
    target: str
    common: dict[str, Any]  # flat settings of every arm
    fingerprints: dict[str, str]  # store -> what it holds
    labelled: bool

    def order(self) -> Iterator[tuple[str, int]]:
        """Runs, seed by seed; who goes first rotates, so that no arm always has the warmer machine."""
        names = list(self.arms)
        for place, seed in enumerate(self.seeds):
            turn = place % len(names)
            for name in names[turn:] + names[:turn]:
                yield name, seed

    def folder(self, arm: str, seed: int) -> Path:
        return self.out / RUNS / run_name(arm, seed)

    def arm_file(self, arm: str) -> Path:
        return self.out / ARMS / f"{arm}.yaml"

    def overrides(self, arm: str) -> dict[str, Any]:
        return {**self.common, **self.arms[arm].settings}

    def wish(self, arm: str) -> Run:
        """The settings that `daae pretrain` is asked for, without a seed and a folder. Raises UsageError."""
        start = open_preset(self.arms[arm].preset)
        start = dataclasses.replace(with_values(start, nested(self.overrides(arm)), f"arm {arm}"), preset=start.preset)
        watch = dataclasses.replace(start.watch, tests=self.tests, label=self.label, evaluations=self.evaluations)
        return dataclasses.replace(start, data=self.data, watch=watch, budget=self.budget or start.budget)

    def pretrain_words(self, arm: str, seed: int) -> list[str]:
        """The command of a run, without the program's name."""
        words = ["--preset", self.arms[arm].preset]
        if self.overrides(arm):
            words += ["--config", str(self.arm_file(arm))]
        words += ["--data", str(self.data), "--out", str(self.folder(arm, seed)), "--seed", str(seed)]
        for name, value in self.given().items():
            words += [f"--{name}", f"{value:.12g}"]
        if self.tests:
            words += ["--tests", *map(str, self.tests)]
        if self.label is not None:
            words += ["--label", self.label]
        return [*words, "--evaluations", str(self.evaluations)]

    def given(self) -> dict[str, float]:
        """The common budget by its one name: {"seconds": 150.0}."""
        wish = {} if self.budget is None else dataclasses.asdict(self.budget)
        return {name: value for name, value in wish.items() if value is not None}

    def as_values(self) -> dict[str, Any]:
        """experiment.yaml: fit to be fed back with --experiment."""
        return plain({
            "arms": {name: arm.as_values() for name, arm in self.arms.items()},
            "data": self.data, "tests": self.tests, "label": self.label, **self.given(), "seeds": self.seeds,
            "evaluations": self.evaluations, "target": self.target, "settings": self.common,
        })  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the plan


def make_plan(flags: Compare) -> Plan:
    """Flags over the experiment file, checked before anything starts. Raises UsageError, DataError."""
    values = _file_values(flags)
    arms = _arms(flags, values)
    if flags.data is None and values["data"] is None:
        raise UsageError("--data (a store made by `daae convert`) is required. See `daae compare --help`.")
    data = flags.data or Path(values["data"])
    tests = flags.tests or tuple(values["tests"])
    label = flags.label or values["label"]
    budget = _budget(flags, values, arms)
    seeds = tuple(dict.fromkeys(flags.seeds or values["seeds"] or (0,)))
    evaluations = flags.evaluations if flags.evaluations is not None else values["evaluations"]
    target = str(flags.target or values["target"] or "baseline")
    target_score(target)
    common = {**values["settings"], **_pairs(flags.settings)}
    if flags.device is not None:
        common["device"] = flags.device
    store, stores = Store.open(data), {path: Store.open(path) for path in tests}
    for each in [store, *stores.values()]:
        if label is not None:
            each.label(label)
    labelled = bool(store.columns)
    if not labelled:
        evaluations = 0
    fingerprints = {"data": store.fingerprint, **{path.name: each.fingerprint for path, each in stores.items()}}
    plan = Plan(
        flags.out, arms, data, tests, label, budget, seeds, EVALUATIONS if evaluations is None else evaluations, target,
        common, fingerprints, labelled,
    )  # fmt: skip
    check_arms(plan)
    return plan


FILE_KEYS: dict[str, Any] = {
    "data": Path | None, "tests": tuple[Path, ...], "label": str | None, "seconds": float | None,
    "epochs": float | None, "steps": int | None, "seeds": tuple[int, ...], "evaluations": int | None,
    "target": str | float | None, "settings": dict[str, Any],
}  # fmt: skip


def _file_values(flags: Compare) -> dict[str, Any]:
    """The experiment file with every key there, of its type; `arms` as written. Raises UsageError."""
    empty: dict[str, Any] = {"arms": {}, "tests": (), "seeds": (), "settings": {}}
    values = {**dict.fromkeys(FILE_KEYS), **empty}
    if flags.experiment is None:
        return values
    for key, value in read_yaml(flags.experiment).items():
        where = f"{flags.experiment}: {key}"
        if key == "arms":
            values["arms"] = coerce(value, dict[str, Any], where)
        elif key not in FILE_KEYS:
            raise UsageError(f"{where} is unknown.{nearest(str(key), ['arms', *FILE_KEYS])}")
        else:
            values[key] = coerce(value, FILE_KEYS[key], where)
    values["settings"] = flat(values["settings"])
    return values


def _arms(flags: Compare, values: dict[str, Any]) -> dict[str, Arm]:
    if flags.presets:
        arms = {name: Arm(name) for name in flags.presets}
        if len(arms) < len(flags.presets):
            raise UsageError("--presets names one preset twice. Arms of one preset need names: use --experiment.")
    else:
        arms = {str(name): _arm(str(name), value, flags.experiment) for name, value in values["arms"].items()}
    if not arms:
        raise UsageError("which arms? Give --presets A B, or --experiment FILE.yaml with `arms`.")
    for name, arm in arms.items():
        if not re.fullmatch(r"[\w][\w.-]*", name, re.ASCII):
            raise UsageError(f"arm {name!r} names a folder: use letters, digits, dots, dashes and underscores.")
        if arm.preset not in PRESETS:
            raise UsageError(
                f"arm {name}: preset {arm.preset} is unknown.{nearest(arm.preset, PRESETS)} "
                "`daae pretrain --list-presets` names all."
            )
    return arms


def _arm(name: str, value: Any, source: Path | None) -> Arm:
    where = f"{source}: arms: {name}"
    if isinstance(value, str):
        return Arm(value)
    if not isinstance(value, Mapping) or "preset" not in value:
        raise UsageError(f"{where} wants a preset's name, or a mapping with `preset` and `settings`.")
    for key in value:
        if key not in ("preset", "settings"):
            raise UsageError(f"{where}: {key} is unknown.{nearest(str(key), ['preset', 'settings'])}")
    settings = flat(coerce(value.get("settings") or {}, dict[str, Any], f"{where}: settings"))
    for key in settings:
        if _under(key, BENCH):
            raise UsageError(f"{where}: {key} is one for all arms, or seconds would not compare. Set it beside `arms`.")
    return Arm(str(value["preset"]), settings)


def _budget(flags: Compare, values: dict[str, Any], arms: dict[str, Arm]) -> Budget | None:
    names = ("seconds", "epochs", "steps")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    given = given or {name: values[name] for name in names if values[name] is not None}
    own = [name for name, arm in arms.items() if any(_under(key, ("budget",)) for key in arm.settings)]
    if len(given) > 1:
        raise UsageError(f"how long? {' and '.join(given)} are given; one of seconds, epochs and steps decides.")
    if not given:
        missing = next((name for name in arms if name not in own), None)
        if missing is not None:
            raise UsageError(f"how long? Give --seconds, --epochs or --steps, or a budget to arm {missing}.")
        return None
    name, value = next(iter(given.items()))
    if own:
        raise UsageError(f"{name} is given for all arms, and arm {own[0]} declares a budget of its own.")
    if value <= 0:
        raise UsageError(f"--{name} must be above 0, not {value:g}.")
    return Budget(**given)


def _pairs(words: tuple[str, ...]) -> dict[str, Any]:
    """("model.depth=1",) -> {"model.depth": 1}; values as YAML reads them."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--settings wants NAME=VALUE, not {word!r}.")
        try:
            found[name.lstrip("-").replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--settings {word}: {value!r} cannot be read as a value.") from None
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1} -> {"optim": {"lr": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return tree


def _under(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(group + ".") for group in groups)


# ------------------------------------------------------------------------------------------------- what has to agree

# Settled when a run starts; until then a wish may leave them open.
SETTLED = ("device", "precision", "loader", "budget.steps")


def undeclared(one: Mapping[str, Any], other: Mapping[str, Any], declared: set[str]) -> list[str]:
    """Flat settings in which two arms differ though nobody said so, as "name (one / other)"."""
    # Who declares a number of epochs has declared that it is no number of seconds.
    free = {"budget" if _under(name, ("budget",)) else name for name in declared}
    return [
        f"{name} ({_short(one.get(name))} / {_short(other.get(name))})"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
        and not _under(name, (*RECIPE, *free))
        and not (name in SETTLED and {one.get(name), other.get(name)} & {None, "auto"})
    ]


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What an arm's record and its new wish disagree on: nothing may, its method included."""
    method = [name for name in before.keys() | now.keys() if _under(name, ("objective", "method"))]
    return undeclared(before, now, set()) + [
        f"{name} ({_short(before.get(name))} / {_short(now.get(name))})"
        for name in sorted(method)
        if before.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    return "none" if value is None else str(value)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_arms(plan: Plan) -> None:
    """Every arm against the first. Raises UsageError naming what differs."""
    first = next(iter(plan.arms))
    wishes = {name: flat(as_values(plan.wish(name))) for name in plan.arms}
    for name, arm in plan.arms.items():
        different = undeclared(wishes[first], wishes[name], {*arm.settings, *plan.arms[first].settings})
        if different:
            raise UsageError(
                f"arms {first} and {name} differ in {_some(different)}, which no one declared. Choose presets of one "
                "size, set it for every arm (--settings), or declare it in an --experiment file."
            )


def check_records(plan: Plan, records: list[dict]) -> None:
    """The plan against what --out holds already. Raises UsageError naming what differs."""
    ask = "Choose another folder, or --overwrite."
    wishes = {name: flat(as_values(plan.wish(name))) for name in plan.arms}
    for record in records:
        before, now = record["fingerprints"], plan.fingerprints
        stores = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if stores:
            raise UsageError(f"--out {plan.out} holds runs on other images or tests ({', '.join(stores)}). {ask}")
        if record["env"]["cores"] != cores():
            raise UsageError(
                f"--out {plan.out} holds runs timed on {record['env']['cores']} cores; here are {cores()}, "
                f"and seconds would not compare. {ask}"
            )
        for name, wish in wishes.items():
            if name == record["arm"]:
                different = changed(record["settings"], wish)
                what = f"arm {name} with other settings"
            else:
                different = undeclared(record["settings"], wish, {*record["declared"], *plan.arms[name].settings})
                what = f"arm {record['arm']}, from which arm {name} differs in what no one declared"
            if different:
                raise UsageError(f"--out {plan.out} holds runs of {what}: {_some(different)}. {ask}")


def check_bench(record: dict, records: list[dict]) -> None:
    """A new run's machine, device, decoder and precision against the runs before it. Raises UsageError."""
    for before in records:
        facts = [(name, before["settings"].get(name), record["settings"].get(name)) for name in SETTLED[:3]]
        facts.append(("processor", before["env"].get("device"), record["env"].get("device")))
        for name, old, new in facts:
            if old != new:
                raise UsageError(
                    f"{record['arm']} seed {record['seed']} ran with {name} {new}, {before['arm']} seed "
                    f"{before['seed']} with {old}: seconds do not compare. Use the same machine, or another --out."
                )


def cores() -> int:
    return len(os.sched_getaffinity(0))


# ------------------------------------------------------------------------------------------------------- running it


def main(argv: list[str]) -> int:
    flags = parse(Compare, argv, prog="daae compare")
    plan = make_plan(flags)
    if flags.dry_run:
        for arm, seed in plan.order():
            print(shlex.join(["daae", "pretrain", *plan.pretrain_words(arm, seed)]))
        return 0
    with claimed(plan.out, overwrite=flags.overwrite), Stop() as stop:
        records = read_lines(plan.out / RECORDS)
        check_records(plan, records)
        _prepare(plan)
        _run_all(plan, flags, records, stop)
    study = read_study([plan.out])
    if flags.json:
        print(json.dumps({"out": str(plan.out), "records": len(records), "arms": summary(study)}))
    else:
        show(study)
        print(f"Records are in {plan.out / RECORDS}; `daae report {plan.out}` makes a page of them.")
    return 0


@contextlib.contextmanager
def claimed(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold OUT: two comparisons on one machine at once would time each other.

    Raises UsageError: in use, or holds something else; ResourceError: cannot be written.
    """
    lock = out / ".lock"
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder.")
    ours = (out / EXPERIMENT).exists() or (out / RECORDS).exists() or lock.exists()
    if (out / "config.yaml").exists() or (not ours and out.is_dir() and any(out.iterdir())):
        raise UsageError(f"--out {out} holds files that are no comparison. Choose another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ResourceError(f"--out {out} cannot be written: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {out} is in use by another `daae compare`.") from None
        if overwrite:
            for path in (path for path in out.iterdir() if path != lock):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    finally:
        os.close(handle)


def _prepare(plan: Plan) -> None:
    """Write down what is wanted, with the arms and seeds that earlier calls wanted."""
    before = read_yaml(plan.out / EXPERIMENT) if (plan.out / EXPERIMENT).exists() else {}
    values = plan.as_values()
    values["arms"] = {**before.get("arms", {}), **values["arms"]}
    values["seeds"] = list(dict.fromkeys([*before.get("seeds", []), *values["seeds"]]))
    for arm in plan.arms:
        if plan.overrides(arm):
            plan.arm_file(arm).parent.mkdir(exist_ok=True)
            write_whole(plan.arm_file(arm), yaml.safe_dump(nested(plan.overrides(arm)), sort_keys=False))
    write_whole(plan.out / EXPERIMENT, yaml.safe_dump(values, sort_keys=False))


def _run_all(plan: Plan, flags: Compare, records: list[dict], stop: Stop) -> None:
    """Every run that has no record yet; appends to `records` and to their file."""
    runs = list(plan.order())
    finished = {(record["arm"], record["seed"]) for record in records}
    if not plan.labelled and not flags.quiet:
        print(f"note: {plan.data} has no labels, so runs are trained and timed but not scored.", file=sys.stderr)
    for place, (arm, seed) in enumerate(runs, 1):
        if (arm, seed) in finished:
            continue
        stop.check(f"the comparison in {plan.out}")
        if not flags.quiet:
            print(f"[{place}/{len(runs)}] {arm}, seed {seed}", file=sys.stderr, flush=True)
        record = run_one(plan, arm, seed, known_baselines(plan, arm, seed, records), flags.quiet, stop)
        check_bench(record, records)
        records.append(record)
        write_whole(plan.out / RECORDS, "".join(json.dumps(each) + "\n" for each in records))


def known_baselines(plan: Plan, arm: str, seed: int, records: list[dict]) -> dict | None:
    """What pixels and the untrained encoder scored in a run with the same seed and encoder: the same as here.

    A network draws its encoder before anything that its method adds, so arms of one size start from equal encoders.
    """
    shape = {name: value for name, value in flat(as_values(plan.wish(arm))).items() if _under(name, ("model",))}
    for record in records:
        same = all(record["settings"].get(name) == value for name, value in shape.items())
        if record["seed"] == seed and same and (record["evaluation"] or {}).get("baselines"):
            return record["evaluation"]["baselines"]
    return None


def run_one(plan: Plan, arm: str, seed: int, baselines: dict | None, quiet: bool, stop: Stop) -> dict:
    """Train and score one arm with one seed, or finish doing so. Returns its record.

    baselines: their scores if they are known; else they are scored too.
    """
    folder, words = plan.folder(arm, seed), plan.pretrain_words(arm, seed)
    # A finished run is not asked again: starting it would rewrite its env.json, which says where it was timed.
    if read_object(folder / "status.json").get("state") != "done":
        call(["train.pretrain", *words, *(["--quiet"] if quiet else [])], f"{arm} seed {seed}", folder, stop)
    if plan.labelled:
        device = read_yaml(folder / "config.yaml")["device"]
        score = ["train.evaluate", str(folder), "--device", device, "--json"]
        score += ["--no-baselines"] if baselines else []
        call(score, f"scoring {arm} seed {seed}", folder, stop, subprocess.DEVNULL)
        result = read_object(folder / "evaluation.json")
        if baselines:
            write_whole(folder / "evaluation.json", json.dumps({**result, "baselines": baselines}, indent=1))
        if not quiet:
            print(result.get("sentence", ""), file=sys.stderr, flush=True)
    return make_record(plan, arm, seed)


def make_record(plan: Plan, arm: str, seed: int) -> dict:
    """All that a comparison needs to know of a finished run."""
    trial = read_run(plan.folder(arm, seed), arm)
    decides = {**deciding(trial.settings), "data": plan.fingerprints["data"]}
    last = trial.metrics[-1]
    return {
        "arm": arm, "seed": seed, "digest": digest(decides), "declared": sorted(plan.arms[arm].settings),
        "differs": differs(plan, arm), "settings": trial.settings, "fingerprints": plan.fingerprints,
        "env": {**trial.env, "command": shlex.join(["daae", "pretrain", *plan.pretrain_words(arm, seed)])},
        "steps": trial.step, "epochs": last["epoch"], "images": trial.images, "train_seconds": trial.seconds,
        "images_per_second": round(trial.rate or 0.0, 1), "data_wait": last["data_wait"],
        "seconds_per_epoch": round(trial.outcome.seconds_per_epoch or 0.0, 4), "evaluations": trial.evaluations,
        "evaluation": trial.evaluation,
    }  # fmt: skip


def digest(values: Mapping[str, Any]) -> str:
    """Short name of a configuration: 12 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def differs(plan: Plan, arm: str) -> dict[str, Any]:
    """The settings in which an arm differs from the first, as they are in this arm."""
    first = deciding(flat(as_values(plan.wish(next(iter(plan.arms))))))
    mine = deciding(flat(as_values(plan.wish(arm))))
    return {name: mine.get(name) for name in sorted(first.keys() | mine.keys()) if first.get(name) != mine.get(name)}


def call(words: list[str], what: str, folder: Path, stop: Stop, stdout: int | None = None) -> None:
    """Run a command of ours as a process. Raises what it died of, with its exit code.

    stdout: where its result goes; by default to our progress on stderr.
    """
    stop.check(what)
    # Its own process group, so that Ctrl-C reaches it once, and through us.
    to = sys.stderr.fileno() if stdout is None else stdout
    child = subprocess.Popen([sys.executable, "-m", *words], stdin=subprocess.DEVNULL, stdout=to, process_group=0)
    code = stop.watch(child)
    stop.check(what)
    if code == 0:
        return
    if code == Preempted.code or code == -signal.SIGTERM:
        raise Preempted(f"{what} was stopped. Run the same command again to go on.")
    if code < 0:
        name = signal.Signals(-code).name
        raise failure(6, f"{what} was killed by {name} (out of memory?). Run the same command again to go on.")
    status = read_object(folder / "status.json")
    reason = f" ({status['reason']})" if status.get("state") == "failed" and status.get("reason") else ""
    raise failure(
        code, f"{what} failed with exit code {code}{reason}; it says more above. Finished runs are kept: "
        "mend it and run the same command again."
    )  # fmt: skip


def failure(code: int, sentence: str) -> DaaeError:
    error = DaaeError(sentence)
    error.code = code
    return error


class Stop:
    """Signals that end a comparison: they are passed to the run under way, which saves and ends."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, patience: float = SAVE_SECONDS) -> None:
        self.name, self._patience = "", patience
        self._child: subprocess.Popen | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # Who ignores SIGHUP (nohup) wants the work to go on.
        caught = [each for each in self.SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in caught}
        return self

    def _ask(self, number: int, _frame) -> None:
        self.name = self.name or signal.Signals(number).name
        self._since = self._since or time.monotonic()
        self._pass_on()

    def _pass_on(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def watch(self, child: subprocess.Popen) -> int:
        """Wait for the child; after a signal not longer than it needs for a checkpoint. Returns its exit code."""
        self._child = child
        if self.name:  # between the start and here
            self._pass_on()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=0.5)
                if self._since and time.monotonic() - self._since > self._patience:
                    os.killpg(child.pid, signal.SIGKILL)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            self._child = None

    def check(self, what: str) -> None:
        """Raises Preempted once a signal has come."""
        if self.name:
            raise Preempted(f"{what} was stopped by {self.name}; what is done is kept. Run the same command again.")

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one go: a crash leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write_durably(partial, text.encode())
        os.replace(partial, path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        partial.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- the table


def summary(study: Study) -> dict[str, dict]:
    """What --json prints of each arm; scores are shares of 1."""
    contrasts, rows = study.contrasts(), {}
    for group in study.groups:
        done = group.finished
        baselines = {name: baseline_score(done, name) for name in BASELINES}
        rows[group.arm] = {
            "seeds": [trial.seed for trial in done],
            "train_seconds": [trial.seconds for trial in done],
            "images_per_second": [trial.rate for trial in done],
            "leading": [None if trial.final is None else trial.final["value"] for trial in done],
            **{name: None if score is None else score.mean for name, score in baselines.items()},
            "against_baseline": _plain(contrasts[group.arm]) if group.arm in contrasts else None,
        }
    return rows


def _plain(versus: Contrast) -> dict:
    bound = versus.bound
    return {
        "difference": None if versus.difference is None else dataclasses.asdict(versus.difference),
        "time_ratio": None if versus.ratio is None else dataclasses.asdict(versus.ratio),
        "time_ratio_bound": None if bound is None else {"is": bound.words.strip(), "number": bound.number},
        "epochs_factor": versus.epochs,
        "seconds_per_epoch_factor": versus.seconds_per_epoch,
        "target_never_reached": versus.never,
    }


def show(study: Study) -> None:
    """A row for each arm and baseline, then the verdict."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    name = leading_name(study)
    table = Table(title=f"% right: {name}" if name else None, box=box.SIMPLE)
    for heading in ("arm", "seeds", "training", "images/s", "s/epoch", "score", "to target", "times as fast"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading != "arm")
    contrasts = study.contrasts()
    for group in study.groups:
        done, score = group.finished, arm_score(group)
        if not done:
            continue
        versus = contrasts.get(group.arm)
        speed = ratio_words(versus) if versus is not None and study.targeted else ""
        pace = _mean(trial.outcome.seconds_per_epoch or 0.0 for trial in done)
        table.add_row(
            group.arm, " ".join(str(trial.seed) for trial in done), seconds_words(_mean(t.seconds for t in done)),
            f"{_mean(t.rate or 0.0 for t in done):,.0f}", f"{pace:.3g}",
            "none" if score is None else score.words(), target_words(study, group.arm), speed,
        )  # fmt: skip
    for key, words in BASELINES.items():
        base = baseline_score(study.trials, key)
        if base is not None:
            table.add_row(words, "", "", "", "", base.words(), "", "", style="dim")
    # Nobody sees a pipe's edge: a line that is cut off would be lost for good.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print("± is the standard deviation between seeds, or the test set's standard error where there is one seed.")
    answer = verdict(study)
    print(f"{answer.sentence} {answer.meaning}")


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    sys.exit(run(main))
