"""The table of methods: every one is there, described, and costs what the formula says."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from model.network import Network
from model.objectives import OBJECTIVES
from pipeline.errors import UsageError
from tests.networks import COUNTED, LABEL, counted_macs, views_of
from tests.test_pretrain import flags
from tools import methods, results
from tools.profiling import method_costs
from tools.profiling.method_costs import Cost
from train.json_files import read_rows
from train.pretrain import main as pretrain
from train.timing import Spread

ROOT = Path(__file__).parent.parent


def test_every_method_is_described_with_its_cost_beside_mae(capsys):
    assert methods.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [*OBJECTIVES, "adainf"]
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
    # A recipe: what it looks at and what that costs are its method's.
    assert "simclr" in found["adainf"]["idea"]
    assert all(found["adainf"][each] == found["simclr"][each] for each in ("views", "tokens", "cost", "supervised"))
    assert found["adainf"]["paper"] != found["simclr"]["paper"]


@pytest.mark.usefixtures("one_thread")
def test_steps_are_measured_beside_maes(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a GPU's kernels keep other things
    words = "--measure --only selfcon supcon --size tiny --batch 4 --json".split()
    assert methods.main([*words, "--precision", "fp32"]) == 0  # bf16 keeps weights twice
    told = json.loads(capsys.readouterr().out)
    assert (told["batch"], told["precision"]) == (4, "fp32")
    assert told["environment"]["device"]
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


def test_a_record_of_costs_makes_a_table(tmp_path: Path, monkeypatch, capsys):
    asked = []

    def measure(names: list[str], size: str, batch: int, precision: str) -> list[Cost]:
        """Nothing is timed: each takes twice the FLOPs of the one before it, in three times the seconds."""
        asked.append((names, size, batch, precision))
        gflop = {"tiny": 1.0, "vits16": 10.0}[size]
        return [
            Cost(f"{name}-{size}", gflop * 2**at, 2.0**at, Spread(3.0**at, 2.0**at, 4.0**at), 8 / 3**at, 29.28 * 2**at)
            for at, name in enumerate(["mae", *names])
        ]

    monkeypatch.setattr(method_costs, "measure", measure)
    kept = tmp_path / "costs"
    kept.mkdir()
    for size, only in (("vits16", ["can"]), ("tiny", ["can", "simclr"])):
        words = ["--measure", "--only", *only, "--size", size, "--batch", "8", "--precision", "fp32", "--json"]
        assert methods.main(words) == 0
        (kept / f"{size}.json").write_text(capsys.readouterr().out)
    assert asked == [(["can"], "vits16", 8, "fp32"), (["can", "simclr"], "tiny", 8, "fp32")]
    monkeypatch.setattr(results, "KEPT", tmp_path)
    page = results.filled("<!-- results of costs -->\n<!-- end of results -->\n")
    assert "|  | tiny: FLOPs | seconds | speed | kept | vits16: FLOPs | seconds | speed | kept |" in page
    assert "| --- | ---: | ---: |" in page
    one = "1.00 | 1.00 (1.00 to 1.00) | 1.00 | 29.3"
    assert f"| mae | {one} | {one} |" in page
    assert "| can | 2.00 | 3.00 (2.00 to 4.00) | 0.67 | 58.6 | 2.00 | 3.00 (2.00 to 4.00) | 0.67 | 58.6 |" in page
    assert "| simclr | 4.00 | 9.00 (4.00 to 16.00) | 0.44 | 117 |  |  |  |  |" in page
    assert "<details><summary>Machine, versions, commands</summary>\n\n- tiny: " in page
    assert ", fp32, batch 8; Python " in page
    assert results.filled(page) == page


def test_the_table_is_for_people(capsys):
    assert methods.main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*OBJECTIVES, "adainf"))
    assert "arXiv 2006.09882" in said


def test_the_docs_have_the_table_as_the_code_gives_it():
    page = (ROOT / "docs/methods.md").read_text()
    assert results.METHODS.search(page)
    assert results.filled(page) == page, "run `python -m tools.results --write`"
    for row in methods.rows():
        assert f"| `{row.name}` | {row.idea} | {row.views} | {row.tokens} | {row.cost:.2f} | " in page


def test_the_method_that_the_docs_write_out_trains_like_any_other(store_path: Path, tmp_path: Path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(), re.DOTALL)
    module = types.ModuleType("simsiam")
    monkeypatch.setitem(sys.modules, "simsiam", module)
    exec(code, vars(module))
    method = module.SimSiam(head_hidden=64, head_out=64, predictor_hidden=16)
    assert counted_macs(method, COUNTED, LABEL[:8]) == pytest.approx(method.macs(COUNTED), rel=0.01)
    outcome = Network(method, COUNTED, 0)(views_of(method, shape=COUNTED), LABEL)
    assert 0 < outcome.terms["regression"].item() < 4
    monkeypatch.setitem(OBJECTIVES, "simsiam", module.SimSiam)
    small = ["--method.head-hidden", "32", "--method.head-out", "32", "--method.predictor-hidden", "8"]
    out = tmp_path / "run"
    assert pretrain(flags("simclr-tiny", store_path, out, "--objective", "simsiam", "--steps", "3", *small)) == 0
    assert read_rows(out / "metrics.jsonl")[-1]["regression"] < 4
