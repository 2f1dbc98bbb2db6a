"""Two processes that train one network: the same numbers as one, and no way for one to keep the other waiting."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.sampling import epoch_order
from tests.conftest import COUNT
from tests.rank_process import APART, CASES, gradients, singles
from tests.test_pretrain import flags, read_json, weights
from train.journal import read_rows
from train.pretrain import main

# Threads of their own for each: two on one core's worth wait for one another in every product.
PATIENCE = 120


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def start(words: list[str], count: int = 2, **more: str) -> list[subprocess.Popen]:
    """`python -m tests.rank_process WORDS`, `count` times, as torchrun starts them."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rank_process", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1", **more,
            },
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each, all of them within PATIENCE."""
    end, results = time.monotonic() + PATIENCE, []
    try:
        for each in processes:
            _, words = each.communicate(timeout=max(1.0, end - time.monotonic()))
            results.append((each.returncode, words))
    finally:
        for each in processes:
            each.kill()
    return results


def test_two_ranks_equal_one_with_the_joint_batch(tmp_path):
    for code, words in finish(start(["gradients", str(tmp_path)])):
        assert code == 0, words
    for method, dtype in CASES:
        alone, tolerance = gradients(method, 0, 1, dtype), 1e-6 if dtype == torch.float64 else 1e-5
        # In float32 what cancels (a bias before a batch norm) is judged by the size of what it is a sum of.
        least = 1e-3 if dtype == torch.float64 else max(each.abs().max().item() for each in alone.values()) / 4
        for rank in range(2):
            mine = torch.load(tmp_path / f"{method}-{rank}-{dtype}.pt", weights_only=True)
            assert mine.keys() == alone.keys()
            for name, value in alone.items():
                if value.is_floating_point():
                    scale = max(value.abs().max().item(), least)
                    assert (mine[name] - value).abs().max().item() <= tolerance * scale, (method, rank, dtype, name)
    alone, parts = singles(0, 1), [torch.load(tmp_path / f"singles-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.allclose(parts[0]["loss"] + parts[1]["loss"], alone["loss"], atol=1e-12)
    assert torch.allclose(torch.cat([each["gradient"] for each in parts], dim=1), alone["gradient"], atol=1e-12)
    # Kept apart, batch norms see a process' own rows only, and the loss is another one.
    apart = torch.load(tmp_path / f"{APART}-0-{torch.float64}.pt", weights_only=True)
    assert abs(apart["loss"] - gradients("daae", 0, 1, torch.float64)["loss"]) > 1e-3
    assert torch.equal(gradients(APART, 0, 1, torch.float64)["loss"], gradients("daae", 0, 1, torch.float64)["loss"])


def ids_taken(path: Path, ranks: int) -> list[list[int]]:
    """Sample ids of each global step, in whatever order the ranks had them."""
    lines = [[json.loads(line) for line in Path(f"{path}{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [sorted(itertools.chain(*parts)) for parts in zip(*lines, strict=True)]


def test_whatever_the_number_of_ranks_a_step_has_the_same_samples_and_weights_agree(store_path, tmp_path):
    def words(name: str, *more: str) -> list[str]:
        return flags("daae-tiny", store_path, tmp_path / name, "--steps", "9", "--loader", "shards", *more)

    chain = []
    for part, (ranks, limit) in enumerate([(2, 3), (1, 3), (2, 3)]):
        steps, command = tmp_path / f"ids-{part}-", words("chain", "--limit-steps", str(limit))
        for code, stderr in finish(start(["train", "none", "0", *command], ranks, STEPS_TAKEN=str(steps))):
            assert code == 0, stderr
        chain += ids_taken(steps, ranks)
    assert main(words("one")) == 0
    orders = [epoch_order(0, epoch, COUNT) for epoch in range(2)]
    assert chain == [sorted(orders[step // 6][16 * (step % 6) :][:16].tolist()) for step in range(9)]
    one, other = (weights(tmp_path / run, 9) for run in ("one", "chain"))
    for name, value in one.items():
        if value.ndim > 1:  # the bias of keys has no gradient but rounding errors, which Adam makes steps of
            assert (value - other[name]).norm() <= 1e-3 * value.norm(), name
    rows, others = (read_rows(tmp_path / run / "metrics.jsonl") for run in ("one", "chain"))
    at_nine = [each[-1] for each in (rows, others)]
    assert at_nine[0]["step"] == at_nine[1]["step"] == 9
    assert at_nine[0]["images"] == at_nine[1]["images"] == 9 * 16
    assert at_nine[0]["loss"] == pytest.approx(at_nine[1]["loss"], rel=1e-4)


@pytest.mark.parametrize(("fault", "words"), [
    pytest.param("die", r"rank 1 .*(no sign of life|could not finish)", marks=pytest.mark.slow),
    pytest.param("stop", "rank 1 on .* no sign of life", marks=pytest.mark.slow),
    ("raise", "rank 1 stopped: ZeroDivisionError: seven"),
])  # fmt: skip
def test_a_lost_rank_ends_the_others_within_ten_seconds(store_path, tmp_path, fault, words):
    command = flags("daae-tiny", store_path, tmp_path / "run", "--steps", "10000", "--loader", "shards")
    processes = start(["train", fault, "5", *command], STEPS_TAKEN=str(tmp_path / "ids-"))
    try:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "ids-1").exists() or len((tmp_path / "ids-1").read_text().splitlines()) < 5:
            assert time.monotonic() < end
            time.sleep(0.1)
        struck = time.monotonic()
        _, stderr = processes[0].communicate(timeout=60)
        took = time.monotonic() - struck
    finally:
        for each in processes:
            each.kill()
    assert processes[0].returncode == 6, stderr
    assert re.search(words, stderr), stderr
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["code"]) == ("failed", 6)
    assert "rank 1" in status["reason"]
    assert took < 30  # ten on a machine that does nothing else


def test_a_signal_at_one_rank_stops_all_at_the_same_step(store_path, tmp_path):
    command = flags("daae-tiny", store_path, tmp_path / "run", "--steps", "10000", "--loader", "shards")
    results = finish(start(["train", "term", "5", *command], STEPS_TAKEN=str(tmp_path / "ids-")))
    assert [code for code, _ in results] == [75, 75], results
    taken = [len(Path(tmp_path / f"ids-{rank}").read_text().splitlines()) for rank in range(2)]
    assert taken[0] == taken[1]
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["code"], status["step"]) == ("preempted", 75, taken[0])
    assert status["last_checkpoint"] == f"step_{taken[0]:09d}"


def test_a_loss_that_is_no_number_on_one_rank_stops_all_before_any_weight_changes(store_path, tmp_path):
    command = flags("daae-tiny", store_path, tmp_path / "run", "--steps", "100", "--loader", "shards")
    results = finish(start(["train", "nan", "4", *command], STEPS_TAKEN=str(tmp_path / "ids-")))
    assert [code for code, _ in results] == [4, 4], results
    status = read_json(tmp_path / "run" / "status.json")
    assert status["code"] == 4
    captures = sorted((tmp_path / "run" / "debug").glob("*.json"))
    assert len(captures) == 2
    assert not read_json(captures[0])["weights_not_finite"]


def test_ranks_that_were_started_differently_are_named(store_path, tmp_path):
    port = str(free_port())
    processes = []
    for rank, seed in enumerate(("1", "2")):
        command = flags("daae-tiny", store_path, tmp_path / "run", "--steps", "4", "--seed", seed)
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "train.pretrain", *command], env=environment, stderr=subprocess.PIPE, text=True
        ))  # fmt: skip
    results = finish(processes)
    assert [code for code, _ in results] == [2, 2]
    assert "rank 1 differs from rank 0 in settings" in results[0][1]
    assert not (tmp_path / "run").exists()


def test_one_command_starts_all_ranks_and_returns_the_code_of_the_run(store_path, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "tools.cli", "pretrain", "--gpus", "2",
        *flags("daae-tiny", store_path, out, "--steps", "4", "--loader", "shards"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: 4 steps, 64 images") == 1
    assert read_json(out / "env.json")["ranks"] == 2


@pytest.mark.slow
def test_what_all_ranks_refuse_is_said_once(store_path, tmp_path):
    command = [sys.executable, "-m", "tools.cli", "pretrain", "--gpus", "2"]
    command += [*flags("daae-tiny", store_path, tmp_path / "run", "--steps", "4"), "--batch", "15"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert refused.returncode == 2
    assert refused.stderr == "error: --batch 15 cannot be shared out evenly among 2 processes.\n"


def test_a_batch_that_cannot_be_shared_out_is_refused(store_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    from pipeline.errors import UsageError

    with pytest.raises(UsageError, match="--batch 16 cannot be shared out evenly among 3 processes"):
        main(flags("mae-tiny", store_path, tmp_path / "run", "--steps", "2"))
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
