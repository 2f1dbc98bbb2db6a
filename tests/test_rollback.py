"""A run that meets gradients that are not finite goes back to a checkpoint and on behind the data that gave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.errors import NumericsError, UsageError
from pipeline.views import Batch
from tests.rank_process import poison, spoilt
from tests.test_pretrain import flags, moments, read_json, timeless, weights
from train import checkpoint, folder
from train.json_files import read_rows
from train.pretrain import main
from train.schedule import learning_rate
from train.step import Stepper


@pytest.fixture
def bad_data(monkeypatch):
    """A function that takes which batches' loss is to be no number."""
    whole = Stepper.__call__

    def spoil(bad: Callable[[Batch], bool]) -> None:
        def step(self: Stepper, batch: Batch, *more):
            return (poison if bad(batch) else whole)(self, batch, *more)

        monkeypatch.setattr(Stepper, "__call__", step)

    return spoil


def command(store: Path, out: Path, *more: str, preset: str = "daae-tiny") -> list[str]:
    often = ("--watch.checkpoint-minutes", "0", "--watch.log-every", "1")
    return flags(preset, store, out, "--steps", "9", *often, *more)


@pytest.mark.parametrize("preset", ["daae-tiny", "mocov2-tiny"])  # the latter remembers keys
def test_a_run_goes_back_passes_the_bad_data_and_resumes_to_the_bit(store_path, tmp_path, bad_data, preset):
    bad_data(lambda batch: spoilt(batch, first=2))
    out, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(store_path, out, "--watch.rollbacks", "1", preset=preset)) == 0
    # Steps 3 and 4 were refused and saved, as one bad step is; the third in a row was one too many.
    said = (out / "train.log").read_text()
    assert "debug/nonfinite_5.json tells what that was. No such step was taken. Back to step 4" in said
    assert "behind those of step 5 (rollback 1 of 1)" in said
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    # Rows of steps that were not taken tell no loss rather than one of 0.
    assert [row["step"] for row in rows if "loss" not in row] == [3, 4]
    # The rate is that of the step, whichever batch it gets.
    optim = folder.run_settings(out).optim
    assert [row["lr"] for row in rows] == [learning_rate(optim, step, 9, 0.05 * 9) for step in range(9)]
    last = checkpoint.newest(out / "checkpoints", pytest.fail)
    assert last is not None
    assert (last.step, last.state["shift"], last.state["rollbacks"]) == (9, 1, 1)
    assert last.state["clock"]["images"] == 10 * 16, "what was undone was computed all the same"
    # Stopped among the steps that are refused, and behind the rollback, it ends the same.
    for limit in ("4", "2", "9"):
        assert main(command(store_path, parts, "--watch.rollbacks", "1", "--limit-steps", limit, preset=preset)) == 0
    for kind in (weights, moments):
        one, other = kind(out, 9), kind(parts, 9)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert timeless(read_rows(parts / "metrics.jsonl")) == timeless(rows)
    if preset == "mocov2-tiny":  # a batch of keys a step went into its 32 places, and none of the look at the bad one
        assert weights(out, 9)["parts.queue.oldest"] == 9 * 16 % 32


def test_a_fault_that_stays_stops_the_run_after_as_many_rollbacks_as_are_allowed(store_path, tmp_path, bad_data):
    bad_data(lambda batch: batch.epoch > 0 or spoilt(batch, first=2, count=4))
    out = tmp_path / "run"
    with pytest.raises(NumericsError, match=r"not finite for 3 steps in a row at step 7.* The last checkpoint is in"):
        main(command(store_path, out, "--watch.rollbacks", "1"))
    assert (out / "train.log").read_text().count("Back to step") == 1
    assert read_json(out / "status.json")["code"] == 4
    assert all(torch.isfinite(value).all() for value in weights(out, 6).values())


def test_without_a_checkpoint_there_is_no_way_back(store_path, tmp_path, bad_data):
    bad_data(lambda _: True)
    often = ("--watch.log-every", "3", "--watch.rollbacks", "5")
    with pytest.raises(NumericsError, match="in a row at step 3"):
        main(flags("daae-tiny", store_path, tmp_path / "run", "--steps", "9", *often))
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == []
    with pytest.raises(UsageError, match=r"--watch\.rollbacks is at least 0, not -1"):
        main(flags("daae-tiny", store_path, tmp_path / "other", "--steps", "9", "--watch.rollbacks", "-1"))


def test_one_process_has_nothing_to_divide_and_says_so_once(store_path, tmp_path):
    assert main(flags("mae-tiny", store_path, tmp_path / "run", "--steps", "2", "--speed.shard")) == 0
    assert (tmp_path / "run" / "train.log").read_text().count("one process has nothing to divide") == 1
    assert weights(tmp_path / "run", 2)
