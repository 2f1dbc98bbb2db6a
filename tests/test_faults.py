"""Long fault tests, `make faults`: killed again and again, a run still ends where an uninterrupted one ends."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.test_pretrain import flags, read_json, start, weights
from train.json_files import read_rows
from train.pretrain import main

KILLS = 20
STEPS = 400


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_where_an_uninterrupted_one_ends(store_path: Path, tmp_path: Path):
    assert main(flags("daae-tiny", store_path, tmp_path / "whole", "--steps", str(STEPS))) == 0
    out, moments = tmp_path / "killed", random.Random(0)
    # A checkpoint about every tenth of a second: many of the kills strike while one is being written.
    command = flags("daae-tiny", store_path, out, "--steps", str(STEPS), "--watch.checkpoint-minutes", "0.002")
    kills = 0
    while kills < KILLS:
        process = start(*command)
        before = last_step(out)
        until = time.monotonic() + 120
        while last_step(out) <= before and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.6))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        kills += 1
    assert kills >= 5
    assert main(command) == 0
    assert read_json(out / "status.json")["state"] == "done"
    steps = [row["step"] for row in read_rows(out / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    whole, killed = weights(tmp_path / "whole", STEPS), weights(out, STEPS)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not list((out / "checkpoints").glob(".step_*")), "a half-written checkpoint stayed behind"


def last_step(out: Path) -> int:
    rows = read_rows(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0
