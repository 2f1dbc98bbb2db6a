"""The table of methods: every one is there, described, and costs what the formula says."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.attention import attend_by_products
from model.network import Network
from model.objectives import OBJECTIVES
from model.shape import Shape
from pipeline.errors import UsageError
from pipeline.views import make_views
from tests.test_pretrain import flags
from tools import methods
from train.config import Run
from train.json_files import read_rows
from train.pretrain import main as pretrain
from train.step import noise

ROOT = Path(__file__).parent.parent


def test_every_method_is_described_with_its_cost_beside_mae(capsys):
    assert methods.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(OBJECTIVES)
    assert {name for name, row in found.items() if row["supervised"]} == {"supcon", "selfcon"}
    # Section by section the multiply-accumulates of a ViT-B/16 at 224 px, MAE 9.675 G: two whole views are 35.1 G.
    expected = {
        "mae": 1.0, "daae": 1.45, "simclr": 3.63, "supcon": 3.63, "mocov2": 2.42, "swav": 5.6, "mixedae": 1.02,
        "can": 28.08 / 9.675, "selfcon": 21.93 / 9.675, "clsa": 2.75,
    }  # fmt: skip
    for name, cost in expected.items():
        assert found[name]["cost"] == pytest.approx(cost, rel=0.02), name
    assert found["daae"]["views"] == "224 (75% hidden), 112"
    assert found["daae"]["tokens"] == 49 + 49
    assert found["can"]["views"] == "2 x 224 (50% hidden)"
    assert found["can"]["tokens"] == 98 + 98
    assert found["swav"]["views"] == "2 x 224, 6 x 96"
    assert found["swav"]["tokens"] == 2 * 196 + 6 * 36
    assert found["clsa"]["views"] == "2 x 224, 96"
    assert found["clsa"]["tokens"] == 2 * 196 + 36


@pytest.mark.usefixtures("one_thread")
def test_steps_are_measured_beside_maes(capsys, monkeypatch):
    monkeypatch.setattr("train.device.choose_precision", lambda wish, device: "fp32")  # bf16 keeps weights twice
    assert methods.main(["--measure", "--only", "selfcon", "supcon", "--size", "tiny", "--batch", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = told["methods"]
    assert list(found) == ["mae-tiny", "selfcon-tiny", "supcon-tiny"]
    mae, exits, views = found.values()
    assert (mae["flops"], mae["seconds"]["median"]) == (1, 1)
    assert views["gflop_per_image"] / mae["gflop_per_image"] == pytest.approx(views["flops"])
    assert views["speed"] == pytest.approx(views["flops"] / views["seconds"]["median"])
    # Six blocks of one view and one of the exit's, against six of two views: 7 / 12 = 0.583; SelfCon's paper has 0.59.
    assert exits["saved_mb"] / views["saved_mb"] == pytest.approx(7 / 12, abs=0.03)
    with pytest.raises(UsageError, match=r"--only selfcom is no method\. Did you mean selfcon"):
        methods.main(["--measure", "--only", "selfcom"])


def test_the_table_is_for_people(capsys):
    assert methods.main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in OBJECTIVES)
    assert "arXiv 2006.09882" in said


def test_the_method_that_the_docs_write_out_trains_like_any_other(store_path: Path, tmp_path: Path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(), re.DOTALL)
    module = types.ModuleType("simsiam")
    monkeypatch.setitem(sys.modules, "simsiam", module)
    exec(code, vars(module))
    monkeypatch.setattr("model.vit.attend", attend_by_products)  # torch 2.11 does not count the fused one on a CPU
    method = module.SimSiam(head_hidden=64, head_out=64, predictor_hidden=16)
    shape = Shape(side=64, patch=8, width=64, depth=3, heads=2, decoder_width=32, decoder_depth=2, decoder_heads=2)
    network = Network(method, shape, 0).train()
    batch = noise(Run(objective="simsiam", method=method, model=shape, precision="fp32"), 8, torch.device("cpu"))
    views = make_views(batch, method.views(shape), patch=8, seed=0)
    with FlopCounterMode(display=False) as counter:
        outcome = network(views, batch.label)
    assert counter.get_total_flops() / 2 / 8 == pytest.approx(method.macs(shape), rel=0.01)
    assert 0 < outcome.terms["regression"].item() < 4
    monkeypatch.setitem(OBJECTIVES, "simsiam", module.SimSiam)
    small = ["--method.head-hidden", "32", "--method.head-out", "32", "--method.predictor-hidden", "8"]
    out = tmp_path / "run"
    assert pretrain(flags("simclr-tiny", store_path, out, "--objective", "simsiam", "--steps", "3", *small)) == 0
    assert read_rows(out / "metrics.jsonl")[-1]["regression"] < 4
