"""Steps beside those of others and beside cheaper ones: who is timed, with what settings, and the tables of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from model import attention, decoder, vit
from model.network import Network
from pipeline.errors import DataError
from tools import profile, results
from tools.profiling import step_peers
from tools.profiling.peer_process import rates
from tools.profiling.step_peers import KNOBS, OURS, PEERS, Task, ours, run_of
from tools.profiling.step_records import AS_IT_IS
from tools.profiling.techniques import TECHNIQUES, Technique
from train.command import run
from train.rehearsal import Machine

SIZE = Task(OURS, "mae-vitb16", 8, "cpu", "fp32")
TINY = replace(SIZE, preset="mae-tiny", batch=4)


def test_knobs_cost_what_was_worked_out_for_vit_b():
    expected = {
        "as published": 1.45, "decoder heads of 64": 1.45, "half the decoder's depth": 1.17,
        "half the decoder's width": 1.04, "half of the hidden patches decoded": 1.23, "a quarter of them decoded": 1.13,
        "half the depth, half decoded": 1.07, "a row of patches less in the small view": 1.33,
        "a row of patches more": 1.58, "half of the small view left out": 1.22,
        "no gradient through the small view": 1.15, "a momentum encoder behind it": 1.15,
    }  # fmt: skip
    assert expected.keys() == KNOBS.keys()
    plain = run_of(SIZE)
    for name, ratio in expected.items():
        wish = run_of(replace(SIZE, objective="daae", settings=KNOBS[name](plain.model)))
        assert wish.method.macs(wish.model) / plain.method.macs(plain.model) == pytest.approx(ratio, abs=0.006), name


@pytest.mark.usefixtures("one_thread")
def test_every_knob_takes_a_step():
    for name, knob in KNOBS.items():
        settings = knob(run_of(TINY).model)
        assert next(ours(replace(TINY, objective="daae", settings=settings))) == TINY.batch, name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [name for name in PEERS if name != OURS])
def test_every_peer_takes_a_step(name):
    package = name.partition(",")[0]
    if package != OURS:
        pytest.importorskip(package)
    assert next(PEERS[name](TINY)) == TINY.batch


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_a_step_without_a_technique_is_the_same_step(name, monkeypatch):
    """But for rounding, and for the activation's own formula; and the technique is really left out."""
    for owner, patched in ((vit.Encoder, "embed"), (vit.Encoder, "forward"), (vit, "matched"), (decoder, "matched")):
        monkeypatch.setattr(owner, patched, getattr(owner, patched))
    monkeypatch.setitem(attention.WAYS, "products", attention.WAYS["products"])
    monkeypatch.setattr(Network, "compile", lambda self, **_: None)  # minutes, and nothing of ours
    seen: dict[str, list] = {"embedded": [], "encoded": [], "type": []}

    def watched(owner: Any, method: str, key: str, what: Callable[[Any], Any]) -> None:
        whole = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda self, x, *more: seen[key].append(what(x)) or whole(self, x, *more))

    watched(vit.PatchEmbed, "forward", "embedded", lambda patches: patches.shape[1])
    watched(vit.Encoder, "encode", "encoded", lambda tokens: len(tokens))
    watched(vit.Block, "forward", "type", lambda tokens: tokens.dtype)
    task = replace(TINY, objective="daae", precision="bf16")

    def step(task: Task, technique: Technique) -> tuple[float, dict[str, Any]]:
        machines: list[Machine] = []

        def change(machine: Machine) -> None:
            technique.undo_in(machine)
            machines.append(machine)

        technique.undo()
        for each in seen.values():
            each.clear()
        torch.manual_seed(0)
        next(ours(task, attention=technique.attention, change=change))
        stepper = machines[0].stepper
        facts = {
            "embedded": seen["embedded"][:2], "calls": seen["encoded"][:2], "type": seen["type"][0],
            "fused": stepper.optimizer.param_groups[0]["fused"], "attention": stepper.attention,
            "tape": attention.WAYS["products"] is not attention.attend_by_products,
            "gelu": stepper.network.encoder.blocks[0].mlp.act.approximate,
        }  # fmt: skip
        return stepper.norm.item(), facts

    plain, usual = step(task, Technique(""))
    assert usual == {
        "embedded": [16, 16], "calls": [2 * TINY.batch], "type": torch.bfloat16, "fused": True, "attention": "",
        "tape": False, "gelu": "none",
    }  # fmt: skip
    without, facts = step(replace(task, peer=name, **TECHNIQUES[name].changes), TECHNIQUES[name])
    expected = {
        "bf16 instead of fp32": {"type": torch.float32},
        "attention by two products (bf16)": {"attention": "any"},
        "attention as one entry of the tape": {"tape": True},
        "both views in one encoder call": {"calls": [TINY.batch] * 2},
        "hidden patches left out before the embedding": {"embedded": [64, 16]},
        "bf16 between blocks": {"type": torch.float32},
        "GELU by erf, not tanh": {"gelu": "tanh"},
        "AdamW in one kernel": {"fused": False},
    }  # fmt: skip
    assert facts == usual | expected.get(name, {})
    assert without == pytest.approx(plain, rel=0.05 if name in expected and name != "AdamW in one kernel" else 1e-6)
    attention.choose("")


@pytest.fixture
def timed(monkeypatch) -> dict[str, dict]:
    """Nothing is timed: the first contender makes 30 images/s, the others 20, whoever that is; who was asked for."""
    asked: dict[str, dict] = {}

    def measure(commands: dict[str, list[str]], seconds: float, say) -> dict[str, dict]:
        asked.update({name: json.loads(words[1]) for name, words in commands.items()})
        shares = [10] + [15] * (len(commands) - 1)
        return {
            name: rates([{"images": 300, "seconds": share * slow, "cpu_seconds": 1.0} for slow in (1, 2, 4)])
            for name, share in zip(commands, shares, strict=True)
        }

    monkeypatch.setattr(step_peers, "measure", measure)
    return asked


def told(capsys, *more: str) -> dict:
    words = ["--step", "--preset", "mae-vits16", "--device", "cpu", "--precision", "fp32", "--quiet", "--json", *more]
    assert profile.main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_a_record_of_peers_makes_a_table(timed, tmp_path: Path, monkeypatch, capsys):
    found = told(capsys, "--peers", "--batch", "8", "--compile")
    there = [name for name in PEERS if name.startswith(OURS) or find_spec(name.partition(",")[0]) is not None]
    assert [name for name in found["peers"] if not name.endswith(", compiled")] == there
    assert f"{OURS}, compiled" in found["peers"]
    assert timed[f"{OURS}, compiled"] == {**timed[OURS], "compiled": True}
    assert (timed[OURS]["preset"], timed[OURS]["batch"], timed[OURS]["compiled"]) == ("mae-vits16", 8, False)
    # Peers are timed as they come, but for the rows that say so; ours as it trains, but for one. And ours each time.
    takes_memory_as_ours = {name for name, task in timed.items() if task["kept"]}
    plain = {name for name in timed if "malloc" not in name}
    assert {name for name in plain if name.startswith(OURS)} <= takes_memory_as_ours
    assert takes_memory_as_ours - plain == {name for name in timed if name.endswith("malloc as ours")}
    assert not any(timed[name]["kept"] for name in plain if not name.startswith(OURS))
    assert all(each["beside"] == found["peers"][OURS]["beside"] for each in found["peers"].values())
    kept = tmp_path / "steps"
    kept.mkdir()
    found["gemm_tflops"] = 1.0
    (kept / "vits16.json").write_text(json.dumps(found))
    monkeypatch.setattr(results, "KEPT", tmp_path)
    page = results.filled("<!-- results of steps -->\n<!-- end of results -->\n")
    # 10.99 GFLOP an image: 15 and 10 images/s are 16 and 11 % of a TFLOP/s.
    assert "|  | mae-vits16, images/s (MFU) | ours is |" in page
    assert "| ours | 15 (16%) |  |" in page
    assert "| ours, decoder heads of 64 | 10 (11%) | 1.50 (1.50 to 1.50) |" in page
    assert "<details><summary>Machine, versions, commands</summary>\n\n- mae-vits16: " in page
    assert "fp32, batch 8, at most 1 TFLOP/s; Python" in page
    with pytest.raises(DataError, match="is not there"):
        results.filled("<!-- results of nothing -->\n<!-- end of results -->\n")
    (kept / "vits16.json").write_text("{}")
    with pytest.raises(DataError, match="holds no records of one kind"):
        results.filled(page)


def test_a_record_of_knobs_makes_a_table(timed, tmp_path: Path, capsys):
    found = told(capsys, "--knobs")
    assert found["knobs"].keys() == KNOBS.keys()
    half = found["knobs"]["half of the hidden patches decoded"]
    assert half["settings"] == {"decoded_share": 0.5}
    assert half["rates"].keys() == half["flops"].keys() == {"mae", "daae", "mae with the same"}
    assert found["knobs"]["no gradient through the small view"]["rates"].keys() == {"mae", "daae"}
    assert timed["daae"]["objective"] == "daae"
    (tmp_path / "vits16.json").write_text(json.dumps(found))
    page = results.markdown(tmp_path)
    assert "|  | vits16: DAAE / MAE | FLOPs | / MAE with the same | FLOPs |" in page
    assert "| as published | 1.50 (1.50 to 1.50) | 1.60 |  |  |" in page
    # 1.44 of MAE's FLOPs, and MAE's own are 0.84 of what they were.
    assert "| half of the hidden patches decoded | 1.50 (1.50 to 1.50) | 1.44 | 1.00 (1.00 to 1.00) | 1.72 |" in page


def test_a_record_of_techniques_makes_a_table(timed, tmp_path: Path, capsys):
    words = ["--step", "--preset", "mae-vits16", "--device", "cpu", "--precision", "bf16", "--quiet", "--json"]
    assert profile.main([*words, "--techniques"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["techniques"]) == [AS_IT_IS, *TECHNIQUES]
    assert {task["objective"] for task in timed.values()} == {"daae"}
    assert [name for name, task in timed.items() if task["precision"] == "fp32"] == ["bf16 instead of fp32"]
    assert [name for name, task in timed.items() if not task["kept"]] == ["memory kept, in huge pages"]
    assert [name for name, task in timed.items() if task["compiled"]] == ["--compile (off)"]
    (tmp_path / "vits16.json").write_text(json.dumps(found))
    page = results.markdown(tmp_path)
    assert "|  | foretold | vits16 |" in page
    assert "| DAAE's step as it is |  | 15 images/s |" in page
    # Without it a step takes half as long again; with what is off it does too, so that it is no gain.
    assert "| attention by two products (bf16) | 1.4 to 1.6 | 1.50 (1.50 to 1.50) |" in page
    assert "| --compile (off) | 1.04 to 1.3 | 0.67 (0.67 to 0.67) |" in page
    assert run(profile.main, [*words, "--techniques", "--compile"]) == 2
    assert "is of an eager step in bf16" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["--knobs"], "--trace, --knobs and --techniques go with --step"),
    (["--techniques"], "--trace, --knobs and --techniques go with --step"),
    (["--step", "--knobs", "--peers"], "--step takes one of --peers, --knobs, --techniques"),
    (["--step", "--techniques", "--png", "a.png"], "--step takes one of --peers, --knobs, --techniques"),
    (["--step", "--peers", "--preset", "daae-tiny"], "takes a size, as --preset mae-vits16 names one"),
])  # fmt: skip
def test_wishes_that_do_not_go_together_are_refused(words, said, capsys):
    assert run(profile.main, words) == 2
    assert said in capsys.readouterr().err
