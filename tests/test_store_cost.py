"""`tools.profiling.store_cost`: which stores it makes and runs it starts, and what it says of their scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tools.converting.flags import Convert
from tools.profiling import store_cost
from train.command import parse, run
from train.pretrain import read_flags

SCORES = {  # side -> score by seed
    65535: (0.50, 0.60, 0.70), 500: (0.52, 0.61, 0.75), 400: (0.40, 0.52, 0.58)
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would have run as a process, in order: its flags are read as it would read them, its result is made up."""
    made: list[tuple] = []

    def call(words: list[str], what: str, folder: Path, stop: object) -> None:
        folder.mkdir(parents=True)
        if words[0] == "tools.convert":
            flags = parse(Convert, words[1:], prog=words[0])
            made.append((flags.src, flags.max_side, flags.quality))
            (folder / "shard-00000.tar").write_bytes(bytes(1000 * flags.quality))
            return
        wish, _, _ = read_flags(words[1:])
        assert wish.data is not None
        assert (wish.preset, wish.budget.epochs) == ("daae-vitti16", 4)
        assert wish.watch.tests == (folder.parents[1] / "stores/val",)
        side = int(wish.data.name.split("-")[1])
        made.append((wish.data.name, wish.seed))
        leading = {"value": SCORES[side][wish.seed], "standard_error": 0.02}
        (folder / "evaluation.json").write_text(json.dumps({"leading": leading, "leading_name": "ridge"}))
        (folder / "env.json").write_text(json.dumps({"device": "a machine", "code": "0123"}))

    monkeypatch.setattr(store_cost, "call", call)
    return made


def test_scores_are_compared_seed_by_seed_with_the_first_stores(calls: list[tuple], tmp_path: Path, capsys):
    words = ["in/train", "in/val", "--out", str(tmp_path)]
    assert run(store_cost.main, [*words, "--json"]) == 0
    assert calls[:4] == [
        ("in/val", 65535, 95), ("in/train", 65535, 95), ("in/train", 500, 90), ("in/train", 400, 85)
    ]  # fmt: skip
    names = ["train-65535-q95", "train-500-q90", "train-400-q85"]
    assert calls[4:] == [(name, seed) for seed in range(3) for name in names]  # a machine that slows down slows all
    told = json.loads(capsys.readouterr().out)
    assert told["environment"] == {"device": "a machine", "code": "0123"}
    whole, large, small = told["stores"]
    assert [(one["max_side"], one["quality"], one["bytes"]) for one in (whole, large, small)] == [
        (None, 95, 95_000), (500, 90, 90_000), (400, 85, 85_000)
    ]  # fmt: skip
    assert small["scores"] == pytest.approx([40, 52, 58])
    assert (whole["difference"], whole["difference_error"]) == (0, 0)
    assert (whole["mean"], whole["standard_error"]) == pytest.approx((60, 10 / math.sqrt(3)))
    # -10, -8 and -12 points: a mean of -10, a deviation of 2, whatever the seeds' own spread is.
    assert (small["difference"], small["difference_error"]) == pytest.approx((-10, 2 / math.sqrt(3)))
    assert large["difference"] == pytest.approx(8 / 3)
    assert large["test_error"] == pytest.approx(2)
    store_cost.show(told["stores"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ridge, %; ± standard error over seeds"
    assert lines[3] == (
        "400 px    q85       0.1 MB  40.0 52.0 58.0  mean 50.0 ± 5.3 (test set ± 2.0)  difference -10.0 ± 1.2"
    )


def test_one_seed_has_no_standard_error(calls: list[tuple], tmp_path: Path, capsys):
    assert (
        run(store_cost.main, ["a", "b", "--out", str(tmp_path), "--seeds", "2", "--choices", "500:90", "400:85"]) == 0
    )
    assert len(calls) == 5
    assert capsys.readouterr().out.splitlines()[2].endswith("58.0  mean 58.0 (test set ± 2.0)  difference -17.0")
    assert store_cost.standard_error([58.0]) is None


def test_a_choice_that_is_none_is_refused(calls: list[tuple], tmp_path: Path, capsys):
    assert run(store_cost.main, ["a", "b", "--out", str(tmp_path / "out"), "--choices", "500"]) == 2
    assert capsys.readouterr().err == "error: --choices wants SIDE:QUALITY, not '500'.\n"
    assert calls == []
    assert not (tmp_path / "out").exists()
