"""What `daae compare` is asked to do: arms, data, budget and seeds, from flags over an experiment file, checked first.

What arms may differ in is the method and what an experiment file declares. Everything else has to agree, also with the
records that the output folder already holds: a silent difference would be measured as if it were the method's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UsageError
from pipeline.limits import affinity
from tools.comparing.questions import Questions
from tools.comparing.records import ARMS, RUNS, UNITS, Cell, cells, target_score
from train.command import coerce, nearest, plain, read_yaml
from train.config import Budget, Run, as_values, completed, flat, with_values
from train.evaluation.exam import apart, check_apart
from train.presets import PRESETS, open_preset

EVALUATIONS = 6

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
    seconds: tuple[float, ...] = ()
    """Training seconds of each run; several: a run of each length, scored at the end of its own schedule."""
    epochs: tuple[float, ...] = ()
    """Instead of seconds: passes over the images."""
    steps: tuple[int, ...] = ()
    """Instead of seconds: optimizer steps."""
    seeds: tuple[int, ...] = ()
    """Each arm runs with each seed; three give an interval. Default: 0."""
    evaluations: int | None = None
    """Scores taken during a run, evenly spread, the last at its end; 0: none. Default: 6, or 1 with several lengths."""
    target: str | None = None
    """baseline (what it scores, seed by seed, at the length where its mean is best), a score in percent, or none.
    Default: baseline."""
    settings: tuple[str, ...] = ()
    """Settings of every arm, as NAME=VALUE: --settings model.depth=12 optim.batch=256."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N, for every arm."""
    gpus: int = 1
    """Train each run on so many GPUs of this machine, a process each; without GPUs, in so many processes."""
    dry_run: bool = False
    """Check everything, print the commands in their order and how long they train, and stop."""
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
    also: tuple[float, ...] = ()  # lengths that this arm alone is trained for, beside the common ones

    def as_values(self) -> Any:
        more = {"settings": self.settings} if self.settings else {}
        more |= {"also": list(self.also)} if self.also else {}
        return {"preset": self.preset, **more} if more else self.preset


@dataclass(frozen=True)
class Plan:
    """An experiment, checked: what to run, in which order, and how."""

    out: Path
    arms: dict[str, Arm]
    data: Path
    tests: tuple[Path, ...]
    label: str | None
    unit: str  # of the lengths: seconds, epochs or steps
    lengths: tuple[float, ...]  # common to all arms; empty where each arm has its own
    seeds: tuple[int, ...]
    evaluations: int
    target: str
    common: dict[str, Any]  # flat settings of every arm
    fingerprints: dict[str, str]  # store -> what it holds
    labelled: bool
    questions: Questions
    generated: dict[str, str]  # arm -> what the store of generated images holds that it trains on besides
    gpus: int = 1  # processes of a run
    notes: tuple[str, ...] = ()  # what whoever reads the answer must know of how the question came about

    def order(self) -> list[Cell]:
        return cells(self.as_values())

    def fingerprints_of(self, arm: str) -> dict[str, str]:
        return {**self.fingerprints, **({"generated": self.generated[arm]} if arm in self.generated else {})}

    def folder(self, cell: Cell) -> Path:
        return self.out / RUNS / cell.folder

    def arm_file(self, arm: str) -> Path:
        return self.out / ARMS / f"{arm}.yaml"

    def overrides(self, arm: str) -> dict[str, Any]:
        return {**self.common, **self.arms[arm].settings}

    def longest(self, arm: str) -> float | None:
        return max((*self.lengths, *self.arms[arm].also), default=None)

    def asked(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """What is asked of a run once it is trained: flags by command."""
        return self.questions.of(cell.arm, cell.length, longest=cell.length in (None, self.longest(cell.arm)))

    def wish(self, arm: str, length: float | None = None) -> Run:
        """The settings that `daae pretrain` is asked for, without a seed and a folder. Raises UsageError.

        length: default: the arm's longest.
        """
        start = open_preset(self.arms[arm].preset)
        start = dataclasses.replace(with_values(start, nested(self.overrides(arm)), f"arm {arm}"), preset=start.preset)
        watch = dataclasses.replace(start.watch, tests=self.tests, label=self.label, evaluations=self.evaluations)
        length = self.longest(arm) if length is None else length
        budget = start.budget if length is None else Budget(**{self.unit: coerce(length, KINDS[self.unit], self.unit)})
        return dataclasses.replace(start, data=self.data, watch=watch, budget=budget)

    def pretrain_words(self, cell: Cell, pace: float | None = None) -> list[str]:
        """The command of a run, without the program's name. pace: seconds of a step, once they are known."""
        arm = cell.arm
        words = ["--preset", self.arms[arm].preset]
        if self.overrides(arm):
            words += ["--config", str(self.arm_file(arm))]
        words += ["--data", str(self.data), "--out", str(self.folder(cell)), "--seed", str(cell.seed)]
        budget = self.wish(arm, cell.length).budget
        if self.longest(arm) is not None:
            words += [f"--{self.unit}", f"{getattr(budget, self.unit):.12g}"]
        if pace is not None and budget.seconds is not None:
            if self.longest(arm) is None:
                words += ["--seconds", f"{budget.seconds:.12g}"]
            words += ["--steps", str(max(1, round(budget.seconds / pace)))]
        if self.tests:
            words += ["--tests", *map(str, self.tests)]
        if self.label is not None:
            words += ["--label", self.label]
        if self.gpus > 1:
            words += ["--gpus", str(self.gpus)]
        return [*words, "--evaluations", str(self.evaluations)]

    def as_values(self) -> dict[str, Any]:
        """experiment.yaml: fit to be fed back with --experiment."""
        return plain({
            "arms": {name: arm.as_values() for name, arm in self.arms.items()},
            "data": self.data, "tests": self.tests, "label": self.label,
            **({self.unit: self.lengths[0] if len(self.lengths) == 1 else self.lengths} if self.lengths else {}),
            "seeds": self.seeds,
            "evaluations": self.evaluations, "target": self.target, "settings": self.common,
            **self.questions.as_values(), **({"notes": self.notes} if self.notes else {}),
        })  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the plan


def plan_experiment(flags: Compare) -> Plan:
    """Flags over the experiment file, checked before anything starts. Raises UsageError, DataError."""
    from pipeline.store import Store
    from train.data import check_data, open_store

    values = _file_values(flags)
    arms = _arms(flags, values)
    if flags.data is None and values["data"] is None:
        raise UsageError("--data (a store made by `daae convert`) is required. See `daae compare --help`.")
    data = flags.data or Path(values["data"])
    tests = flags.tests or tuple(values["tests"])
    label = flags.label or values["label"]
    unit, lengths = _lengths(flags, values, arms)
    seeds = tuple(dict.fromkeys(flags.seeds or values["seeds"] or (0,)))
    if flags.gpus < 1:
        raise UsageError(f"--gpus is at least 1, not {flags.gpus}.")
    evaluations = flags.evaluations if flags.evaluations is not None else values["evaluations"]
    target = str(flags.target or values["target"] or "baseline")
    target_score(target)
    common = {**values["settings"], **_pairs(flags.settings)}
    if flags.device is not None:
        common["device"] = flags.device
    store, stores = Store.open(data), {path: Store.open(path) for path in apart(tests)}
    for each in [store, *stores.values()]:
        if label is not None:
            each.label(label)
    for each in stores.values():
        each.check_real("evaluation")
    labelled = bool(store.columns)
    questions = Questions.read(values, f"{flags.experiment}: ") if labelled else Questions()
    if not labelled:
        evaluations = 0
    fingerprints = {"data": store.fingerprint, **{path.name: each.fingerprint for path, each in stores.items()}}
    several = len({*lengths, *(each for arm in arms.values() for each in arm.also)}) > 1
    if evaluations is None:
        evaluations = 1 if several else EVALUATIONS
    plan = Plan(
        out=flags.out, arms=arms, data=data, tests=tests, label=label, unit=unit, lengths=lengths, seeds=seeds,
        evaluations=evaluations, target=target, common=common, fingerprints=fingerprints, labelled=labelled,
        questions=questions, generated={}, gpus=flags.gpus, notes=values["notes"],
    )  # fmt: skip
    check_arms(plan)
    questions.check_arms(arms)
    for name in arms:
        wish = plan.wish(name)
        wish.check()
        joined = open_store(wish)
        check_data(wish, joined, plan.gpus)
        wish.method.check(wish.optim.batch, joined.per_epoch)
        questions.check(wish.model, tests=bool(tests), several=several)
    if labelled and not plan.wish(next(iter(arms))).watch.overlap:
        for each in stores.values():
            check_apart(store, each, label or next(iter(store.columns)))
    for name, inflate in ((name, plan.wish(name).inflate) for name in arms):
        if inflate.data is not None:
            plan.generated[name] = Store.open(inflate.data).fingerprint
    return plan


KINDS: dict[str, type] = {"seconds": float, "epochs": float, "steps": int}
FILE_KEYS: dict[str, Any] = {
    "data": Path | None, "tests": tuple[Path, ...], "label": str | None, "seconds": tuple[float, ...],
    "epochs": tuple[float, ...], "steps": tuple[int, ...], "seeds": tuple[int, ...], "evaluations": int | None,
    "target": str | float | None, "settings": dict[str, Any], "evaluate": dict[str, Any] | None,
    "finetune": dict[str, Any] | None, "notes": tuple[str, ...],
}  # fmt: skip


def _file_values(flags: Compare) -> dict[str, Any]:
    """The experiment file with every key there, of its type; `arms` as written. Raises UsageError."""
    empty: dict[str, Any] = {"arms": {}, "settings": {}, **dict.fromkeys(("tests", "seeds", "notes", *KINDS), ())}
    values = {**dict.fromkeys(FILE_KEYS), **empty}
    if flags.experiment is None:
        return values
    for key, value in read_yaml(flags.experiment).items():
        where = f"{flags.experiment}: {key}"
        if key == "arms":
            values["arms"] = coerce(value, dict[str, Any], where)
        elif key not in FILE_KEYS:
            raise UsageError(f"{where} is unknown.{nearest(str(key), ['arms', *FILE_KEYS])}")
        elif key in KINDS:
            many = [] if value is None else value if isinstance(value, list) else [value]
            values[key] = tuple(coerce(each, KINDS[key], where) for each in many)
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
    keys = ["preset", "settings", "also"]
    for key in value:
        if key not in keys:
            raise UsageError(f"{where}: {key} is unknown.{nearest(str(key), keys)}")
    settings = flat(coerce(value.get("settings") or {}, dict[str, Any], f"{where}: settings"))
    for key in settings:
        if _under(key, BENCH):
            raise UsageError(f"{where}: {key} is one for all arms, or seconds would not compare. Set it beside `arms`.")
    return Arm(str(value["preset"]), settings, coerce(value.get("also") or (), tuple[float, ...], f"{where}: also"))


def _lengths(flags: Compare, values: dict[str, Any], arms: dict[str, Arm]) -> tuple[str, tuple[float, ...]]:
    """The unit, and the lengths that all arms are trained for; none where each arm has its own. Raises UsageError."""
    given = {name: getattr(flags, name) for name in UNITS if getattr(flags, name)}
    given = given or {name: values[name] for name in UNITS if values[name]}
    own = [name for name, arm in arms.items() if any(_under(key, ("budget",)) for key in arm.settings)]
    if len(given) > 1:
        raise UsageError(f"how long? {' and '.join(given)} are given; one of seconds, epochs and steps decides.")
    if not given:
        missing = next((name for name in arms if name not in own), None)
        if missing is not None:
            raise UsageError(f"how long? Give --seconds, --epochs or --steps, or a budget to arm {missing}.")
        if any(arm.also for arm in arms.values()):
            raise UsageError("`also` adds to the common lengths, and there are none: give seconds, epochs or steps.")
        return "seconds", ()
    name, lengths = next(iter(given.items()))
    if own:
        raise UsageError(f"{name} is given for all arms, and arm {own[0]} declares a budget of its own.")
    for value in (*lengths, *(each for arm in arms.values() for each in arm.also)):
        if value <= 0:
            raise UsageError(f"--{name} must be above 0, not {value:g}.")
    return name, tuple(sorted(set(lengths)))


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
SETTLED = ("device", "precision", "loader", "budget.steps", "speed.attention")


def undeclared(one: Mapping[str, Any], other: Mapping[str, Any], declared: set[str]) -> list[str]:
    """Flat settings in which two arms differ though nobody said so, as "name (one / other)"."""
    # Who declares a number of epochs has declared that it is no number of seconds.
    free = {"budget" if _under(name, ("budget",)) else name for name in declared}
    return [
        f"{name} ({_short(one.get(name))} / {_short(other.get(name))})"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
        and not _under(name, (*RECIPE, *free))
        and not (name in SETTLED and (_open(name, one.get(name)) or _open(name, other.get(name))))
    ]


def _open(name: str, value: Any) -> bool:
    """Left to the run, or settled by it: it attends over its own lengths in the way that was fastest for each."""
    return value in (None, "auto") or (name == "speed.attention" and (value == "" or "=" in value))


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
    several = any(cell.length is not None for cell in plan.order())
    for record in records:
        if several != (record.get("length") is not None):
            one, other = ("one length", "several") if several else ("several lengths", "one")
            raise UsageError(f"--out {plan.out} holds runs of {one}, and {other} is asked for. {ask}")
        settings = completed(record["settings"])
        before, now = record["fingerprints"], plan.fingerprints_of(record["arm"])
        if record["arm"] not in plan.arms:
            before = {name: each for name, each in before.items() if name != "generated"}
        stores = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if stores:
            raise UsageError(f"--out {plan.out} holds runs on other images or tests ({', '.join(stores)}). {ask}")
        if record["env"]["cores"] != affinity():
            raise UsageError(
                f"--out {plan.out} holds runs timed on {record['env']['cores']} cores; here are {affinity()}, "
                f"and seconds would not compare. {ask}"
            )
        for name in plan.arms:
            # A run of a length that is no longer asked for is another point of the same arm.
            wish = flat(as_values(plan.wish(name, record.get("length"))))
            if name == record["arm"]:
                different = changed(settings, wish)
                what = f"arm {name} with other settings"
            else:
                different = undeclared(settings, wish, {*record["declared"], *plan.arms[name].settings})
                what = f"arm {record['arm']}, from which arm {name} differs in what no one declared"
            if different:
                raise UsageError(f"--out {plan.out} holds runs of {what}: {_some(different)}. {ask}")


def check_here(plan: Plan, before: dict) -> None:
    """This machine against the one of a recorded run, before hours are spent here. Raises UsageError."""
    from pipeline.loader import choose_backend
    from train.device import choose_precision, device_name, find_device

    wish = plan.wish(next(iter(plan.arms)))
    device = find_device(wish.device)
    facts = [
        ("processor", before["env"].get("device"), device_name(device)),
        ("precision", before["settings"].get("precision"), choose_precision(wish.precision, device)),
        ("loader", before["settings"].get("loader"), choose_backend(device) if wish.loader == "auto" else wish.loader),
        ("--gpus", before["env"].get("ranks", 1), plan.gpus),
    ]
    for name, there, here in facts:
        if there not in (None, here):
            raise UsageError(
                f"--out {plan.out} holds runs with {name} {there}; here it is {here}, and seconds would not compare. "
                "Go on where they were trained, or choose another --out."
            )


def check_bench(record: dict, records: list[dict]) -> None:
    """A new run's machine, device, decoder and precision against the runs before it. Raises UsageError."""
    for before in records:
        facts = [(name, before["settings"].get(name), record["settings"].get(name)) for name in SETTLED[:3]]
        facts.append(("processor", before["env"].get("device"), record["env"].get("device")))
        facts.append(("--gpus", before["env"].get("ranks", 1), record["env"].get("ranks", 1)))
        for name, old, new in facts:
            if old != new:
                raise UsageError(
                    f"{record['arm']} seed {record['seed']} ran with {name} {new}, {before['arm']} seed "
                    f"{before['seed']} with {old}: seconds do not compare. Use the same machine, or another --out."
                )
