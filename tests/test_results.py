"""Tables in README and docs are what the kept records give, and nobody's memory of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.errors import DataError
from tests.study_folders import write_run
from tools import results
from tools.compare import make_record
from tools.comparing.experiment import Compare, plan_experiment
from tools.comparing.records import Cell
from train.command import parse


def test_every_table_on_a_page_is_what_its_records_give():
    assert results.BLOCK.search((results.ROOT / "README.md").read_text()), "README shows no kept comparison"
    for page in results.pages():
        assert results.filled(page.read_text()) == page.read_text(), f"{page}: run `python -m tools.results --write`"


def test_a_table_is_filled_in_between_its_lines(store_path: Path, tmp_path: Path, monkeypatch):
    kept = tmp_path / "records" / "pair"
    words = ["--presets", "mae-tiny", "daae-tiny", "--data", str(store_path), "--seconds", "200", "--out", str(kept)]
    words += ["--settings", "optim.batch=16"]
    plan = plan_experiment(parse(Compare, words, prog="daae compare"))
    curves, lines = {"mae-tiny": (0.24, 0.28, 0.32), "daae-tiny": (0.24, 0.32, 0.36)}, []
    for arm, scores in curves.items():
        write_run(plan.folder(Cell(arm, 0)), preset=arm, curve=tuple(zip((50, 100, 200), scores, strict=True)))
        lines.append(json.dumps(make_record(plan, Cell(arm, 0))) + "\n")
    (kept / "records.jsonl").write_text("".join(lines))
    (kept / "experiment.yaml").write_text(yaml.safe_dump(plan.as_values(), sort_keys=False))
    (kept / "pace.json").write_text("{}")
    monkeypatch.setattr(results, "KEPT", tmp_path / "records")
    before = "words\n<!-- results of pair -->\nold\n<!-- end of results -->\nmore\n"
    page = results.filled(before)
    assert page.startswith("words\n<!-- results of pair -->\nridge on subcategory, mean of fluent and emojione, %:\n")
    assert page.endswith("<!-- end of results -->\nmore\n")
    assert "old" not in page
    assert "| `daae-tiny` | 0 | 200 s | 640 | 2 | 36.0 ± 1.0 | +4.0 | 100 s | 2.00 (one seed) |  |" in page
    assert "| untrained encoder |  |  |  |  | 24.0 ± 1.0 |  |  |  |  |" in page
    assert results.filled(page) == page
    brief = results.filled(before.replace("pair", "pair in brief"))
    assert "|  | score | times as fast | in turns |" in brief
    assert "| mae-tiny | 32.0 ± 1.0 |  |  |" in brief
    assert "| daae-tiny | 36.0 ± 1.0 | 2.00 (one seed) |  |" in brief
    assert "Without training: raw 32 px pixels 22.0 ± 1.0, untrained encoder 24.0 ± 1.0." in brief
    shutil.rmtree(kept / "runs")  # a record alone gives the same table
    assert results.filled(before) == page
    monkeypatch.setattr(results, "KEPT", tmp_path / "again")
    results.keep(kept)
    assert results.filled(before) == page  # and so does what is kept of a folder of `daae compare`
    texts = "".join(path.read_text() for path in (tmp_path / "again/pair").iterdir())
    assert str(tmp_path) not in texts
    assert f"--data {store_path.parent.name}/{store_path.name} --out pair/runs/daae-tiny-seed0 " in texts
    with pytest.raises(DataError, match="nowhere is not there"):
        results.filled(before.replace("pair", "nowhere"))
