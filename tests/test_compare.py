"""Comparisons: what they refuse, their order, signals, and one real one from start to report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from model.network import Network
from pipeline.errors import DataError, NumericsError, Preempted, UsageError
from pipeline.limits import affinity
from pipeline.staging import claimed
from pipeline.store import Store
from tests.study_folders import write_run
from tools import children, compare, report
from tools.comparing import experiment as asked
from tools.comparing import table
from tools.comparing.pace import measured_paces
from tools.comparing.records import Cell, cells, read_study, target_score
from tools.comparing.table import show
from train.command import parse
from train.device import choose_precision, device_name
from train.journal import code_revision
from train.json_files import read_object, read_rows

ROOT = Path(__file__).parent.parent
TINY = ("model.side=32", "model.width=32", "model.depth=1", "model.heads=2", "model.decoder_width=32")
TINY += ("model.decoder_depth=1", "model.decoder_heads=2", "optim.batch=16", "watch.log_every=2", "loader=dali")
TINY += ("device=cpu",)  # also where there is a GPU


def plan_of(*words: str) -> asked.Plan:
    return asked.plan_experiment(parse(asked.Compare, words, prog="daae compare"))


def words_for(store: Path, out: Path, *more: str, presets: tuple[str, ...] = ("mae-tiny", "daae-tiny")) -> list[str]:
    fits = () if "--settings" in more else ("--settings", "optim.batch=16")  # the store is small
    return ["--presets", *presets, "--data", str(store), "--out", str(out), *more, *fits]


def experiment(path: Path, **values: Any) -> str:
    default = {"arms": {"a": "mae-tiny", "b": "daae-tiny"}, "steps": 4, "settings": {"optim.batch": 16}}
    path.write_text(yaml.safe_dump(default | values, sort_keys=False))
    return str(path)


# ------------------------------------------------------------------------------------------------- what may differ


def test_methods_may_differ_and_nothing_else_does(store_path, tmp_path):
    plan = plan_of(*words_for(store_path, tmp_path / "out", "--steps", "4"))
    assert compare.differs(plan, "mae-tiny") == {}
    names = compare.differs(plan, "daae-tiny")
    assert names["objective"] == "daae"
    assert all(name == "objective" or name.startswith("method.") for name in names)


def test_presets_of_two_sizes_are_refused_by_what_differs(store_path, tmp_path):
    words = words_for(store_path, tmp_path / "out", "--steps", "4", presets=("mae-tiny", "daae-vits16"))
    with pytest.raises(
        UsageError, match=r"mae-tiny and daae-vits16 differ in .*model\.depth \(6 / 12\).* no one declared"
    ):
        plan_of(*words)


def test_a_declared_difference_is_let_through_and_recorded(store_path, tmp_path):
    arms = {"mae": "mae-tiny", "slow": {"preset": "daae-tiny", "settings": {"optim": {"lr": 1e-4}}}}
    file = experiment(tmp_path / "e.yaml", arms=arms, data=str(store_path))
    plan = plan_of("--experiment", file, "--out", str(tmp_path / "out"))
    assert plan.arms["slow"].settings == {"optim.lr": 1e-4}
    assert plan.wish("slow").optim.lr == 1e-4
    assert plan.wish("mae").optim.lr == 1e-3
    assert compare.differs(plan, "slow")["optim.lr"] == 1e-4


@pytest.mark.parametrize("name", ["data", "device", "precision", "loader", "seed", "optim.batch", "watch.label"])
def test_the_bench_is_one_for_all_arms(store_path, tmp_path, name):
    arms = {"a": "mae-tiny", "b": {"preset": "daae-tiny", "settings": {name: 1}}}
    file = experiment(tmp_path / "e.yaml", arms=arms, data=str(store_path))
    with pytest.raises(UsageError, match=f"arms: b: {name} is one for all arms"):
        plan_of("--experiment", file, "--out", str(tmp_path / "out"))


def test_arms_may_have_epochs_of_their_own(store_path, tmp_path):
    arms = {name: {"preset": "mae-tiny", "settings": {"budget.epochs": n}} for name, n in (("long", 16), ("short", 6))}
    values = {"arms": arms, "data": str(store_path), "steps": None}
    plan = plan_of("--experiment", experiment(tmp_path / "e.yaml", **values), "--out", str(tmp_path / "out"))
    assert [plan.wish(name).budget.epochs for name in plan.arms] == [16, 6]
    assert "--steps" not in plan.pretrain_words(Cell("long", 0))
    with pytest.raises(UsageError, match="steps is given for all arms, and arm long declares a budget"):
        plan_of("--experiment", str(tmp_path / "e.yaml"), "--out", str(tmp_path / "out"), "--steps", "5")


def test_a_dry_run_tells_the_seconds_that_lengths_come_to(store_path, tmp_path, capsys):
    arms = {"mae": "mae-tiny", "daae": {"preset": "daae-tiny", "also": [60]}}
    file = experiment(
        tmp_path / "e.yaml", arms=arms, data=str(store_path), steps=None, seconds=[120, 480], seeds=[0, 1]
    )
    assert compare.main(["--experiment", file, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    *commands, daae, mae, total = capsys.readouterr().out.splitlines()
    assert len(commands) == 10
    assert all(line.startswith("daae pretrain --preset ") for line in commands)
    assert (daae, mae) == ("# daae: 6 runs, 22 min", "# mae: 4 runs, 20 min")
    assert total == "# All together 42 min of training, and evaluation besides."


def test_a_dry_run_of_epochs_measures_what_they_take(store_path, tmp_path, capsys):
    words = [*words_for(store_path, tmp_path / "out", "--epochs", "90", presets=("mae-tiny",)), "--settings", *TINY]
    assert compare.main([*words, "--dry-run"]) == 0
    _, line, total = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"# mae-tiny: 1 run, (.+) at ([\d,.e+]+) images/s, measured here .*", line)
    assert found is not None
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    seconds = sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+) (\w+)", found[1]))
    images = 90 * Store.open(store_path).count
    assert seconds == pytest.approx(images / float(found[2].replace(",", "")), rel=0.02, abs=20)
    assert total == f"# All together {found[1]} of training, and evaluation besides."


@pytest.mark.parametrize(
    ("values", "words", "message"),
    [
        ({"armz": {}}, (), "armz is unknown. Did you mean arms?"),
        ({"arms": {}}, (), "which arms"),
        ({"arms": {"a": "mae-tini"}}, (), "preset mae-tini is unknown. Did you mean mae-tiny?"),
        ({"arms": {"a": {"preset": "mae-tiny", "setting": {}}}}, (), "setting is unknown. Did you mean settings?"),
        ({"arms": {"a/b": "mae-tiny"}}, (), "names a folder"),
        ({"arms": {"a": {"preset": "mae-tiny", "settings": {"optim.lrr": 1}}}}, (), "lrr is unknown. Did you mean lr?"),
        ({"steps": None}, (), "how long"),
        ({"seconds": 5}, (), "seconds and steps are given"),
        ({}, ("--steps", "0"), "--steps must be above 0"),
        ({}, ("--target", "fast"), "--target fast is none of"),
        ({}, ("--settings", "model.depth"), "wants NAME=VALUE"),
        ({"seeds": "all"}, (), "seeds wants"),
    ],
)
def test_wrong_experiments_are_one_sentence(store_path, tmp_path, values, words, message):
    file = experiment(tmp_path / "e.yaml", **{"data": str(store_path), **values})
    with pytest.raises(UsageError) as raised:
        plan_of("--experiment", file, "--out", str(tmp_path / "out"), *words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_stores_and_labels_are_checked_before_anything_runs(store_path, tmp_path):
    with pytest.raises(UsageError, match="--data"):
        plan_of("--presets", "mae-tiny", "--out", str(tmp_path / "out"), "--steps", "4")
    with pytest.raises(DataError, match="no finished store"):
        plan_of(*words_for(tmp_path, tmp_path / "out", "--steps", "4"))
    with pytest.raises(DataError, match="no label column 'colour'"):
        plan_of(*words_for(store_path, tmp_path / "out", "--steps", "4", "--label", "colour"))


def test_flags_go_before_the_file(store_path, tmp_path):
    file = experiment(tmp_path / "e.yaml", data="nowhere", seeds=[5], evaluations=9, target="none")
    more = ("--data", str(store_path), "--seeds", "1", "2", "--seconds", "3", "--evaluations", "0", "--target", "31")
    plan = plan_of("--experiment", file, "--out", str(tmp_path / "out"), *more)
    assert (plan.seeds, plan.unit, plan.lengths, plan.evaluations, plan.target) == ((1, 2), "seconds", (3.0,), 0, "31")


def test_the_saved_experiment_is_the_same_plan(store_path, tmp_path):
    plan = plan_of(*words_for(store_path, tmp_path / "out", "--seconds", "4", "--settings", *TINY))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(plan.as_values()))
    assert plan_of("--experiment", str(tmp_path / "again.yaml"), "--out", str(tmp_path / "out")) == plan


def test_arms_take_turns_to_go_first(store_path, tmp_path):
    plan = plan_of(*words_for(store_path, tmp_path / "out", "--steps", "4", "--seeds", "0", "1", "2"))
    assert [f"{cell.arm[0]}{cell.seed}" for cell in plan.order()] == ["m0", "d0", "d1", "m1", "m2", "d2"]


def test_several_lengths_are_runs_of_their_own(store_path, tmp_path):
    arms = {"mae": "mae-tiny", "daae": {"preset": "daae-tiny", "also": [2]}}
    values = {"arms": arms, "data": str(store_path), "steps": [8, 4], "seeds": [0, 1]}
    plan = plan_of("--experiment", experiment(tmp_path / "e.yaml", **values), "--out", str(tmp_path / "out"))
    said = [f"{cell.arm[0]}{cell.length:g}/{cell.seed}" for cell in plan.order()]
    # Seed by seed, from short to long, and who goes first rotates.
    assert said == ["d2/0", "d4/0", "m4/0", "m8/0", "d8/0", "d2/1", "m4/1", "d4/1", "d8/1", "m8/1"]
    assert plan.evaluations == 1
    cell = plan.order()[0]
    assert plan.folder(cell).name == "daae-2st-seed0"
    words = plan.pretrain_words(cell)
    assert words[words.index("--steps") + 1] == "2"
    assert plan.wish("daae", 2).budget.steps == 2
    assert plan.wish("daae").budget.steps == 8
    assert cells(yaml.safe_load(yaml.safe_dump(plan.as_values(), sort_keys=False))) == plan.order()
    assert [[cell.arm for cell in each] for each in compare.rounds(plan, set(plan.order()[:4]))] == [
        ["daae"], ["daae"], ["mae", "daae"], ["daae", "mae"],
    ]  # fmt: skip


def test_also_wants_common_lengths(store_path, tmp_path):
    arms = {"a": {"preset": "mae-tiny", "also": [2], "settings": {"budget.epochs": 4}}}
    file = experiment(tmp_path / "e.yaml", arms=arms, data=str(store_path), steps=None)
    with pytest.raises(UsageError, match="`also` adds to the common lengths"):
        plan_of("--experiment", file, "--out", str(tmp_path / "out"))


def test_records_of_one_length_and_of_several_do_not_mix(plan):
    record = record_of(plan, "mae-tiny")
    with pytest.raises(UsageError, match="holds runs of several lengths, and one is asked for"):
        asked.check_records(plan, [{**record, "length": 200.0}])


def test_unlabelled_images_are_not_scored(unlabelled_path, tmp_path):
    plan = plan_of(*words_for(unlabelled_path, tmp_path / "out", "--steps", "4"))
    assert (plan.labelled, plan.evaluations) == (False, 0)


@pytest.mark.parametrize(("wish", "share"), [("31.5", 0.315), (0.31, 0.31), ("baseline", None), ("none", None)])
def test_targets(wish, share):
    assert target_score(wish) == (None if share is None else pytest.approx(share))


# ------------------------------------------------------------------------------------- against earlier records


def record_of(plan: asked.Plan, arm: str, **changes: Any) -> dict:
    """What a finished run of the plan leaves, from a run folder in the program's format."""
    wish = asked.flat(asked.as_values(plan.wish(arm)))
    folder = plan.folder(Cell(arm, 0))
    if not folder.exists():
        write_run(folder, preset=plan.arms[arm].preset)
    record = compare.make_record(plan, Cell(arm, 0))
    settled = {"device": "cpu", "precision": "fp32", "loader": "ffcv", "budget.steps": 4}
    record["settings"] = {**wish, **settled, **changes}
    record["env"]["cores"] = affinity()
    return record


@pytest.fixture
def plan(store_path, tmp_path) -> asked.Plan:
    settings = ("--settings", "optim.batch=16", "device=cpu")
    return plan_of(*words_for(store_path, tmp_path / "out", "--seconds", "200", *settings))


def test_a_record_of_the_same_plan_agrees(plan):
    asked.check_records(plan, [record_of(plan, "mae-tiny"), record_of(plan, "daae-tiny")])


@pytest.mark.parametrize(
    ("arm", "name", "value", "message"),
    [
        ("mae-tiny", "model.depth", 3, r"arm mae-tiny with other settings: model\.depth \(3 / 6\)"),
        ("daae-tiny", "method.temperature", 0.5, r"other settings: method\.temperature \(0\.5 / 0\.2\)"),
        ("mae-tiny", "budget.seconds", 100.0, r"budget\.seconds \(100\.0 / 200\.0\)"),
        ("mae-tiny", "optim.lr", None, r"optim\.lr \(none / 0\.001\)"),
        ("mae-tiny", "watch.label", "type", r"watch\.label \(type / none\)"),
    ],
)
def test_a_record_of_other_settings_is_refused(plan, arm, name, value, message):
    with pytest.raises(UsageError, match=message):
        asked.check_records(plan, [record_of(plan, arm, **{name: value})])


def test_a_new_arm_has_to_agree_with_the_records_of_others(plan):
    record = record_of(plan, "mae-tiny", **{"optim.weight_decay": 0.3})
    record["arm"] = "earlier"
    with pytest.raises(UsageError, match=r"arm earlier, from which arm mae-tiny differs .*optim\.weight_decay"):
        asked.check_records(plan, [record])
    record["declared"] = ["optim.weight_decay"]
    asked.check_records(plan, [record])


def test_other_images_and_other_machines_are_refused(plan):
    record = record_of(plan, "mae-tiny")
    with pytest.raises(UsageError, match="other images or tests"):
        asked.check_records(plan, [{**record, "fingerprints": {"data": "0" * 16}}])
    with pytest.raises(UsageError, match="timed on 999 cores"):
        asked.check_records(plan, [{**record, "env": {**record["env"], "cores": 999}}])
    for name in ("device", "precision", "loader"):
        other = {**record, "settings": {**record["settings"], name: "other"}}
        with pytest.raises(UsageError, match=f"ran with {name} other"):
            asked.check_bench(other, [record])
    with pytest.raises(UsageError, match="ran with processor faster"):
        asked.check_bench({**record, "env": {**record["env"], "device": "faster"}}, [record])


def test_another_machine_is_refused_before_anything_is_trained_there(plan):
    record = record_of(plan, "mae-tiny")
    here = choose_precision("auto", torch.device("cpu"))
    machine = {**record, "env": {**record["env"], "device": device_name(torch.device("cpu"))}}
    same = {**machine, "settings": {**record["settings"], "precision": here, "loader": "shards"}}
    asked.check_here(plan, same)
    with pytest.raises(
        UsageError, match=r"runs with processor Test CPU, 2 threads; here it is .*Go on where they were"
    ):
        asked.check_here(plan, record)
    with pytest.raises(UsageError, match=rf"runs with precision fp16; here it is {here}"):
        asked.check_here(plan, {**machine, "settings": {**record["settings"], "precision": "fp16"}})
    with pytest.raises(UsageError, match="runs with loader dali; here it is shards"):
        asked.check_here(plan, {**same, "settings": {**same["settings"], "loader": "dali"}})
    with pytest.raises(UsageError, match="runs with --gpus 8; here it is 1"):
        asked.check_here(plan, {**same, "env": {**same["env"], "ranks": 8}})


def test_an_arm_that_cannot_run_is_refused_before_the_first_one_trains(store_path, tmp_path):
    slow = {"preset": "mae-tiny", "settings": {"optim.layer_decay": 2}}
    for first, arm, message in (
        ("mae-tiny", slow, "--optim.layer-decay lies above 0"),
        ("mocov2-tiny", "mocov2-tiny", "--method.queue 1024 holds more keys than there are images"),
    ):
        arms = {"a": first, "b": arm}
        file = experiment(tmp_path / "e.yaml", arms=arms, data=str(store_path))
        with pytest.raises(UsageError, match=message):
            plan_of("--experiment", file, "--out", str(tmp_path / "out"))
    with pytest.raises(DataError, match="has 96 images, fewer than one batch of 128"):
        plan_of(*words_for(store_path, tmp_path / "out", "--steps", "4", "--settings", "optim.batch=128"))


def test_arms_of_one_size_start_from_the_same_encoder(plan):
    """What lets one score of the untrained encoder stand for all arms."""
    wishes = [plan.wish(arm) for arm in plan.arms]
    one, other = (Network(wish.method, wish.model, 3).encoder.state_dict() for wish in wishes)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_records_without_run_folders_still_make_a_study(plan):
    records = [record_of(plan, "mae-tiny"), record_of(plan, "daae-tiny")]
    alone = plan.out.parent / "moved"
    alone.mkdir()
    (alone / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    study = read_study([alone])
    assert [group.arm for group in study.groups] == ["mae-tiny", "daae-tiny"]
    assert study.base.trials[0].final == {"value": 0.34, "standard_error": 0.01, "count": 1600}
    assert study.base.trials[0].rate == pytest.approx(640.0)


def test_a_folder_in_use_or_of_something_else_is_refused(plan, tmp_path):
    def claim(name: str):
        return claimed(tmp_path / name, "comparison", ("records.jsonl",), overwrite=True)

    with claim("busy"), pytest.raises(UsageError, match="in use by process"), claim("busy"):
        pass
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="no comparison"), claim("holiday"):
        pass
    assert (tmp_path / "holiday" / "photo.jpg").exists()


# ------------------------------------------------------------------------------------------------- signals


CHILD = """
import signal, sys, time
def stop(*_):
    print("saving", flush=True); time.sleep({save}); print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, stop); print("ready", flush=True)
time.sleep(60)
"""


def watched(save: float, patience: float, number: int = signal.SIGINT) -> tuple[int, str, float, str]:
    """A child that takes `save` seconds to end, and a signal to ourselves once it listens."""
    with children.PassOn(patience) as stop:
        command = [sys.executable, "-c", CHILD.format(save=save)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        start = time.monotonic()
        code = stop.watch(child)
        seconds = time.monotonic() - start
        with pytest.raises(Preempted) as raised:
            stop.check("it")
        with child.stdout:
            return code, child.stdout.read(), seconds, str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_waited_for(number):
    before = signal.getsignal(number)
    code, said, _, sentence = watched(0.4, 30.0, number)
    assert (code, said) == (75, "saving\nsaved\n")
    assert sentence.startswith(f"it was stopped by {signal.Signals(number).name};")
    assert signal.getsignal(number) is before


def test_a_run_that_does_not_end_is_killed():
    code, said, seconds, _ = watched(30.0, 1.0)
    assert (code, said) == (-signal.SIGKILL, "saving\n")
    assert seconds < 10


def test_a_failing_run_ends_with_its_code_and_reason(tmp_path):
    for code, told in ((2, r"failed with exit code 2 (UsageError: no such preset);"), (4, "failed with exit code 2;")):
        status = {"state": "failed", "code": code, "reason": "UsageError: no such preset"}
        (tmp_path / "status.json").write_text(json.dumps(status))  # of this end, or of one before
        with children.PassOn() as stop, pytest.raises(children.DaaeError) as raised:
            children.call(["train.pretrain", "--preset", "nonsense"], "a seed 0", tmp_path, stop, subprocess.DEVNULL)
        assert raised.value.code == 2
        assert f"a seed 0 {told}" in str(raised.value)


# ------------------------------------------------------------------------------------------------- equal seconds


def test_seconds_become_steps_once_and_together(store_path, tmp_path):
    plan = plan_of(*words_for(store_path, tmp_path / "out", "--seconds", "4", "--settings", *TINY))
    plan.out.mkdir()
    with children.PassOn() as stop:
        paces = measured_paces(plan, stop, quiet=True)
        known = json.loads((plan.out / "pace.json").read_text())
        assert paces == {arm: known[arm]["seconds_per_step"] for arm in plan.arms}
        assert max(paces.values()) < 1
        # What was measured once stays, and an arm that joins is placed by its ratio to one that was there.
        known["mae-tiny"] |= {"seconds_per_step": 2000.0, "measured": [2000.0]}
        (plan.out / "pace.json").write_text(json.dumps({"mae-tiny": known["mae-tiny"]}))
        assert min(measured_paces(plan, stop, quiet=True).values()) > 500
        joined = json.loads((plan.out / "pace.json").read_text())
        assert joined["mae-tiny"]["seconds_per_step"] == 2000.0
        assert 500 < joined["daae-tiny"]["seconds_per_step"] < 20_000
        assert not (plan.out / ".pace.json").exists()
        # Before a further seed all are measured once more; what seconds are divided by stays.
        assert measured_paces(plan, stop, times=3, quiet=True) == {
            arm: each["seconds_per_step"] for arm, each in joined.items()
        }
        again = json.loads((plan.out / "pace.json").read_text())
        assert {arm: len(each["measured"]) for arm, each in again.items()} == {"mae-tiny": 3, "daae-tiny": 3}
        for arm in plan.arms:
            assert again[arm]["measured"][0] == joined[arm]["seconds_per_step"]
            assert max(again[arm]["measured"][1:]) < 1
        # So that medians are of the same moments.
        ratios = [joined[arm]["measured"][0] / joined[arm]["measured"][1] for arm in plan.arms]
        assert ratios[0] == pytest.approx(ratios[1])
        words = ["--presets", "can-tiny", "--data", str(store_path), "--out", str(plan.out), "--seconds", "4"]
        alone = plan_of(*words, "--settings", *TINY)
        with pytest.raises(
            UsageError, match=r"can-tiny cannot be timed in turns with daae-tiny, which .* has: name both"
        ):
            measured_paces(alone, stop, quiet=True)
    for pace, steps in ((4 / 7.4, "7"), (100.0, "1")):
        words = plan.pretrain_words(Cell("mae-tiny", 0), pace)
        assert words[words.index("--seconds") :][:4] == ["--seconds", "4", "--steps", steps]


@pytest.mark.slow
def test_other_settings_are_another_pace(store_path, tmp_path):
    plan = plan_of(*words_for(store_path, tmp_path / "out", "--seconds", "4", "--settings", *TINY))
    plan.out.mkdir()
    slow = dict.fromkeys(plan.arms, 2000.0)
    with children.PassOn() as stop:
        measured_paces(plan, stop, quiet=True)
        known = json.loads((plan.out / "pace.json").read_text())
        for arm, seconds in slow.items():
            known[arm]["seconds_per_step"] = seconds
        (plan.out / "pace.json").write_text(json.dumps(known))
        assert set(measured_paces(plan, stop, quiet=True).values()) == {2000.0}
        other = plan_of(*words_for(store_path, plan.out, "--seconds", "4", "--settings", *TINY, "optim.batch=8"))
        assert max(measured_paces(other, stop, quiet=True).values()) < 1


def test_a_fine_tuning_that_diverges_costs_the_others_nothing(plan, monkeypatch, capsys):
    records = [record_of(plan, "mae-tiny"), record_of(plan, "daae-tiny")]
    asked_of = {"finetune": {"epochs": 1}}
    monkeypatch.setattr(asked.Plan, "asked", lambda self, cell: asked_of)
    called: list[str] = []

    def finetune(folder, cell, device, flags, stop) -> dict:
        called.append(cell.arm)
        if cell.arm == "mae-tiny":
            raise NumericsError("the gradient was not finite")
        return {"leading": {"value": 0.5}}

    monkeypatch.setattr(compare, "finetune", finetune)
    diverged: list[Cell] = []
    with children.PassOn() as stop:
        for _ in range(2):
            compare.question(plan, records, stop, diverged, quiet=True)
    assert called == ["mae-tiny", "daae-tiny"]
    assert diverged == [Cell("mae-tiny", 0)]
    assert "finetune mae-tiny seed 0 ends here" in capsys.readouterr().err
    assert ["asked" in record for record in records] == [False, True]
    error = children.failure(3, "the disk")
    with pytest.raises(children.DaaeError, match="the disk"):
        compare._diverged(error, "a")


def test_a_run_that_told_of_a_step_it_lost_again_does_not_stand_still(plan, monkeypatch):
    """Killed while it was scored: its status names a step behind its last checkpoint."""
    cell = Cell("mae-tiny", 0)
    record_of(plan, "mae-tiny")
    status = plan.folder(cell) / "status.json"
    before = {"state": "running", "step": 100, "last_checkpoint": "step_000000050"}
    status.write_text(json.dumps(before))
    with children.PassOn() as stop:
        after = {**before, "last_checkpoint": "step_000000100"}
        monkeypatch.setattr(compare, "call", lambda *_: status.write_text(json.dumps(after)))
        compare.go_on(plan, cell, None, stop, quiet=True)
        with pytest.raises(children.DaaeError, match="stands still at step 100"):
            compare.go_on(plan, cell, None, stop, quiet=True)


LONG = (True, (
    "an-arm-with-a-name", "0 1 2 3 4", "8 min", "636", "65.4", "36.0 ± 0.4", "+4.3 (+3.1 to +5.5)",
    "not reached in 480 s (2 of 5 seeds)", "at least 2.23 (1.74 to 2.85)", "at least 1.97 (1.52 to 2.55)",
))  # fmt: skip


@pytest.mark.parametrize("columns", [None, 90])
def test_no_table_is_cut_off(plan, monkeypatch, capsys, columns):
    """Nobody sees a pipe's edge; on a narrow terminal there are two tables."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    records = [record_of(plan, "mae-tiny"), record_of(plan, "daae-tiny")]
    plan.out.mkdir(exist_ok=True)
    (plan.out / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(table, "rows", lambda study: iter([LONG]))
    show(read_study([plan.out]))
    said = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert all(cell in said for cell in LONG[1])
    assert said.count("an-arm-with-a-name") == (1 if columns is None else 2)
    assert "…" not in said


# ------------------------------------------------------------------------------------------------- for real


def test_runs_of_several_processes_are_timed_and_trained_so(store_path, tmp_path):
    out = tmp_path / "out"
    words = words_for(store_path, out, "--seconds", "1", "--evaluations", "1", "--gpus", "2", presets=("daae-tiny",))
    with pytest.raises(UsageError, match="--gpus is at least 1, not 0"):
        plan_of(*words_for(store_path, out, "--seconds", "1", "--gpus", "0"))
    command = [sys.executable, "-m", "tools.compare", *words, "--quiet", "--json", "--settings", *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (record,) = read_rows(out / "records.jsonl")
    assert record["env"]["ranks"] == 2
    assert record["env"]["command"].endswith("--gpus 2 --evaluations 1")
    pace = json.loads((out / "pace.json").read_text())["daae-tiny"]["seconds_per_step"]
    assert record["steps"] == max(1, round(1 / pace))


def test_a_run_that_diverges_costs_the_others_nothing(store_path, tmp_path, capfd):
    wild = {"preset": "mae-tiny", "settings": {"optim.lr": 1e30}}
    file = experiment(tmp_path / "e.yaml", arms={"wild": wild, "tame": "mae-tiny"}, steps=40, evaluations=1)
    out = tmp_path / "out"
    words = ["--experiment", file, "--data", str(store_path), "--out", str(out), "--quiet", "--settings", *TINY]
    with pytest.raises(NumericsError, match=r"1 of 2 runs have no score.*: wild seed 0\."):
        compare.main(words)
    printed = capfd.readouterr()
    assert "wild seed 0 ends here" in printed.err
    assert "tame" in printed.out
    assert [record["arm"] for record in read_rows(out / "records.jsonl")] == ["tame"]


def test_a_comparison_that_is_killed_takes_its_run_with_it(store_path, tmp_path):
    """Which saves and ends: nothing trains on unattended, and the same command goes on at once."""
    out = tmp_path / "out"
    more = ("--steps", "100000", "--evaluations", "1", "--settings", *TINY)
    command = [sys.executable, "-m", "tools.compare", *words_for(store_path, out, *more)]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    folder, end = out / "runs/mae-tiny-seed0", time.monotonic() + 120
    try:
        while read_object(folder / "status.json").get("step", 0) < 20:
            assert time.monotonic() < end
            time.sleep(0.1)
        (child,) = psutil.Process(killed.pid).children()
    finally:
        killed.kill()
        killed.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:  # whoever inherits it may not collect it
            assert time.monotonic() < end + 30
            time.sleep(0.1)
    status = read_object(folder / "status.json")
    assert (status["state"], status["code"]) == ("preempted", 75)
    assert status["last_checkpoint"] == f"step_{status['step']:09d}"


def test_a_real_comparison_from_a_signal_to_its_report(store_path, tmp_path, capfd):
    out = tmp_path / "out"
    more = ("--steps", "6", "--evaluations", "2", "--target", "baseline", "--settings", *TINY)
    command = [sys.executable, "-m", "tools.compare", *words_for(store_path, out, *more)]

    # Ctrl-C as soon as the first run has started.
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    line = first.stderr.readline()
    assert line == "[1/2] mae-tiny seed 0\n"
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75
    assert "stopped by SIGINT" in said.splitlines()[-1]
    assert not (out / "records.jsonl").exists()

    # The same command does the rest.
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    turns = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert turns == [f"[{n}/2] {arm}-tiny seed 0" for n, arm in ((1, "mae"), (2, "daae"), (2, "daae"), (1, "mae"))]
    result = json.loads(done.stdout)
    assert set(result["arms"]) == {"mae-tiny", "daae-tiny"}
    records = read_rows(out / "records.jsonl")
    assert [(each["arm"], each["seed"]) for each in records] == [("daae-tiny", 0), ("mae-tiny", 0)]
    fingerprint = Store.open(store_path).fingerprint
    for record in records:
        assert (record["steps"], record["images"]) == (6, 96)
        assert record["settings"]["model.depth"] == 1
        assert record["fingerprints"] == {"data": fingerprint}
        assert record["env"]["data"] == fingerprint
        assert [row["step"] for row in record["evaluations"]] == [3, 6]
        assert 0 < record["evaluation"]["leading"]["count"] < 96
        assert set(record["evaluation"]["baselines"]) == {"pixels", "untrained"}
        assert record["images_per_second"] > 0
        assert record["env"]["command"].startswith(f"daae pretrain --preset {record['arm']} --config ")
    assert records[0]["digest"] != records[1]["digest"]
    assert records[0]["evaluation"]["baselines"] == records[1]["evaluation"]["baselines"]
    assert result["arms"]["daae-tiny"]["leading"] == [records[0]["evaluation"]["leading"]["value"]]

    # Once more there is nothing to do, and no run starts: this process could not even wait for one.
    before = (out / "records.jsonl").read_bytes()
    assert compare.main([*words_for(store_path, out, *more)]) == 0
    said = capfd.readouterr()
    assert "mae-tiny" in said.out
    assert "raw 32 px pixels" in said.out
    assert "[1/2]" not in said.err
    assert (out / "records.jsonl").read_bytes() == before

    # Other settings are refused; the report takes the folder.
    with pytest.raises(UsageError, match=r"model\.depth \(1 / 2\)"):
        compare.main([*words_for(store_path, out, *more), "model.depth=2"])
    assert report.main([str(out), "--json"]) == 0
    page = (out / "report.html").read_text()
    assert json.loads(capfd.readouterr().out)["bytes"] < 3e6
    assert "experiment.yaml" in page
    assert page.count("data:image/png") == 2


def test_a_finished_run_is_asked_what_is_declared_later_once(store_path, tmp_path, capfd):
    out = tmp_path / "out"
    first = experiment(tmp_path / "a.yaml", arms={"a": "mae-tiny"}, steps=2, evaluations=1)
    words = ["--data", str(store_path), "--label", "class", "--out", str(out), "--settings", *TINY]
    assert compare.main(["--experiment", first, "--quiet", *words]) == 0
    (before,) = read_rows(out / "records.jsonl")
    assert "asked" not in before
    evaluate = {"label_share": [0.5], "agreement": 0.5}
    tuning = {"epochs": 1, "batch": 16, "magnitude": 0, "folds": True}
    more = experiment(
        tmp_path / "b.yaml", arms={"a": "mae-tiny"}, steps=2, evaluations=1, evaluate=evaluate, finetune=tuning,
        notes=["Asked late."],
    )  # fmt: skip
    # As if the code of that time had seen something else in the run.
    leading = before["evaluation"]["leading"]
    elsewhere = {**before, "evaluation": {**before["evaluation"], "leading": {**leading, "value": 0.99}}}
    (out / "records.jsonl").write_text(json.dumps(elsewhere) + "\n")
    capfd.readouterr()
    assert compare.main(["--experiment", more, *words]) == 0
    said = capfd.readouterr().err
    assert "evaluate a seed 0\n" in said
    assert "finetune a seed 0\n" in said
    now = f"note: a seed 0 scores {100 * leading['value']:.1f} now, and scored 99.0 before, by code "
    assert now in said
    (after,) = read_rows(out / "records.jsonl")
    assert after["asked"] == {
        "evaluate": {"label_share": [0.5], "agreement": 0.5},
        "finetune": tuning | {"epochs": 1.0},
    }
    assert after["evaluation"]["leading"] == before["evaluation"]["leading"]
    probes = after["evaluation"]["scores"]["held-out"]["class"]
    assert probes["knn1 50%"]["draws"] == 3
    assert set(after["evaluation"]["agreement"]["encoder"]) == {"held-out"}
    assert after["finetune"]["epochs"] == 1
    tuned = sorted((out / "runs/a-seed0").glob("finetuned-*-fold?/finetune.json"))
    parts = [json.loads(path.read_text())["leading"] for path in tuned]
    assert len(parts) == 5
    leading, count = after["finetune"]["leading"], sum(part["count"] for part in parts)
    assert leading["count"] == count == 96  # every picture once
    assert leading["value"] == pytest.approx(sum(part["value"] * part["count"] for part in parts) / count)
    assert {**after, "evaluation": 0} == {
        **before, "evaluation": 0, "asked": after["asked"], "asked_by": code_revision(), "finetune": after["finetune"],
    }  # fmt: skip
    for file in (more, first):  # all of it is known, and who asks for less forgets nothing
        assert compare.main(["--experiment", file, *words]) == 0
        assert "a seed 0" not in capfd.readouterr().err
        assert read_rows(out / "records.jsonl") == [after]
        kept = yaml.safe_load((out / "experiment.yaml").read_text())
        assert (kept["evaluate"], kept["notes"]) == (evaluate, ["Asked late."])


def test_questions_that_would_be_refused_later_are_refused_at_once(store_path, tmp_path):
    file = experiment(tmp_path / "e.yaml", data=str(store_path), finetune={"layer_decay": 2})
    with pytest.raises(UsageError, match="--layer-decay above 0 and at most 1"):
        plan_of("--experiment", file, "--out", str(tmp_path / "out"))
