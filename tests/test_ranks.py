"""Two processes that train one network: the same numbers as one, and no way for one to keep the other waiting."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError, UsageError
from pipeline.sampling import epoch_order
from tests.conftest import COUNT
from tests.rank_process import APART, CASES, ROUNDED, STEPPED, STEPS, TAKEN, gradients, singles, stepper_of, take_steps
from tests.test_pretrain import flags, read_json, weights
from tools import export
from train import checkpoint, divided_files, evaluate
from train.json_files import read_rows
from train.pretrain import main
from train.ranks import Ranks

# Threads of their own for each: two on one core's worth wait for one another in every product.
PATIENCE = 120
EXACT = ("--precision", "fp32")  # where a sum's order is to change its last digits and no more


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


def finish(processes: list[subprocess.Popen], patience: float = PATIENCE) -> list[tuple[int, str]]:
    """(exit code, stderr) of each, all of them within so many seconds."""
    end, results = time.monotonic() + patience, []
    try:
        for each in processes:
            _, words = each.communicate(timeout=max(1.0, end - time.monotonic()))
            results.append((each.returncode, words))
    finally:
        for each in processes:
            each.kill()
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What two processes have found out together about a batch that is half theirs."""
    out = tmp_path_factory.mktemp("two-ranks")
    for code, words in finish(start(["gradients", str(out)])):
        assert code == 0, words
    return out


@pytest.mark.parametrize("method", [method for method, dtype in CASES if dtype == torch.float32])
def test_no_unit_lies_where_rounding_decides_whether_it_passes(method):
    """Or float32 gradients would differ by all that the unit lets through, on some machines."""
    nearest = []

    def look(module, inputs, _) -> None:
        if isinstance(module, torch.nn.ReLU):
            nearest.append(inputs[0].detach().abs().min().item())

    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        gradients(method, 0, 1, torch.float64)
    finally:
        hook.remove()
    assert min(nearest, default=1.0) > 2e-5


def test_two_ranks_equal_one_with_the_joint_batch(two_ranks):
    for method, dtype in CASES:
        alone, tolerance = gradients(method, 0, 1, dtype), 1e-6 if dtype == torch.float64 else 1e-5
        # In float32 what cancels (a bias before a batch norm) is judged by the size of what it is a sum of.
        norms = [each.norm().item() for name, each in alone.items() if name != "loss" and not name.startswith("buffer")]
        least = 1e-3 if dtype == torch.float64 else max(norms) / 4
        for rank in range(2):
            mine = torch.load(two_ranks / f"{method}-{rank}-{dtype}.pt", weights_only=True)
            assert mine.keys() == alone.keys()
            for name, value in alone.items():
                if value.is_floating_point():
                    scale = max(value.norm().item(), least)
                    assert (mine[name] - value).norm() <= tolerance * scale, (method, rank, dtype, name)
    alone, parts = singles(0, 1), [torch.load(two_ranks / f"singles-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.allclose(parts[0]["loss"] + parts[1]["loss"], alone["loss"], atol=1e-12)
    assert torch.allclose(torch.cat([each["gradient"] for each in parts], dim=1), alone["gradient"], atol=1e-12)
    # Kept apart, batch norms see a process' own rows only, and the loss is another one.
    apart = torch.load(two_ranks / f"{APART}-0-{torch.float64}.pt", weights_only=True)
    assert abs(apart["loss"] - gradients("daae", 0, 1, torch.float64)["loss"]) > 1e-3
    assert torch.equal(gradients(APART, 0, 1, torch.float64)["loss"], gradients("daae", 0, 1, torch.float64)["loss"])


@pytest.mark.parametrize(("name", "dtype"), TAKEN)
def test_steps_of_two_ranks_are_those_of_one_whether_weights_are_divided_or_not(two_ranks, name, dtype):
    alone = take_steps(stepper_of(STEPPED[name], Ranks(), dtype, divided=False), dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    largest = max(value.norm().item() for key, value in alone.items() if key.startswith("gradient"))
    for way in ("whole", "divided"):
        found = torch.load(two_ranks / f"{name}-{way}-{dtype}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        assert {"loss", "norm", "gradient encoder.cls_token", "weight encoder.cls_token"} < found.keys()
        for key, value in alone.items():
            if dtype == torch.float32 and key.startswith("weight") and value.ndim < 2:
                continue  # the bias of keys has no gradient but rounding errors, which Adam makes steps of
            if value.is_floating_point():
                # What cancels to nearly nothing is judged by the size of what it is a sum of.
                scale = max(value.norm().item(), largest / 4 if key.startswith("gradient") else 0.0)
                assert (found[key] - value).norm() <= tolerance * scale, (way, key)


def test_gradients_that_travel_in_bfloat16_are_those_of_one_but_for_rounding(two_ranks):
    (name, dtype), way = ROUNDED
    alone = take_steps(stepper_of(STEPPED[name], Ranks(), dtype, divided=False), dtype)
    found = torch.load(two_ranks / f"{name}-{way}-{dtype}.pt", weights_only=True)
    for key in [key for key in alone if key.startswith("gradient") and alone[key].ndim > 1]:
        apart = (found[key] - alone[key]).norm() / alone[key].norm()
        assert 1e-4 < apart < 1e-2, key


@pytest.mark.slow  # a C compiler works for a minute
def test_blocks_compiled_beside_other_ranks_take_the_same_steps(tmp_path):
    name, dtype = "twice", torch.float32
    alone = take_steps(stepper_of(STEPPED[name], Ranks(), dtype, divided=False), dtype)
    for code, words in finish(start(["compiled", str(tmp_path)]), 600):
        assert code == 0, words
    for way in ("whole", "divided"):
        found = torch.load(tmp_path / f"compiled-{way}.pt", weights_only=True)
        assert found.pop("compilations") >= 1
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            if value.is_floating_point() and value.ndim > 1:
                assert (found[key] - value).norm() <= 1e-4 * value.norm(), (way, key)


def test_gradients_travel_once_a_step_however_many_parts_it_has(two_ranks):
    sent = read_json(two_ranks / "sent.json")
    assert sent["1"] == sent["4"] == [1]  # buckets, in each of a few steps: all gradients are smaller than one


def test_checkpoints_of_divided_weights_are_read_whole_and_verified(two_ranks, tmp_path):
    parts, whole = (checkpoint.verify(checkpoint.place(two_ranks / kind, STEPS)) for kind in ("shards", "whole"))
    assert (parts.sharded, whole.sharded) == (True, False)
    assert len(list((parts.path / "shards").iterdir())) == 2
    for one, other in ((parts.weights(), whole.weights()), (parts.moments(), whole.moments())):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert {"encoder.cls_token/exp_avg", "encoder.cls_token/step"} < parts.moments().keys()
    with pytest.raises(DataError, match=r"shards does not fit the run: .*encoder\.new"):
        divided_files.read({"model/encoder.new": torch.zeros(2)}, parts.path / "shards")
    for number, harm in enumerate((flip_a_bit, Path.unlink, lambda part: shutil.copy(part, part.with_name("another")))):
        copy = Path(shutil.copytree(parts.path, tmp_path / str(number)))
        harm(sorted((copy / "shards").iterdir())[0])
        with pytest.raises(DataError, match=r"is damaged \(.*shards/"):
            checkpoint.verify(copy)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def ids_taken(path: Path, ranks: int) -> list[list[int]]:
    """Sample ids of each global step, in whatever order the ranks had them."""
    lines = [[json.loads(line) for line in Path(f"{path}{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [sorted(itertools.chain(*parts)) for parts in zip(*lines, strict=True)]


@pytest.mark.parametrize("shard", ["--speed.no-shard", pytest.param("--speed.shard", marks=pytest.mark.slow)])
def test_whatever_the_number_of_ranks_a_step_has_the_same_samples_and_weights_agree(store_path, tmp_path, shard):
    def words(name: str, *more: str) -> list[str]:
        return flags("daae-tiny", store_path, tmp_path / name, "--steps", "9", "--loader", "shards", *EXACT, *more)

    chain = []
    for part, (ranks, limit) in enumerate([(2, 3), (1, 3), (2, 3)]):
        steps, command = tmp_path / f"ids-{part}-", words("chain", "--limit-steps", str(limit), shard)
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


@pytest.mark.parametrize(("fault", "words", "code"), [
    pytest.param("die", r"rank 1 .*(no sign of life|could not finish)", 6, marks=pytest.mark.slow),
    pytest.param("stop", "rank 1 on .* no sign of life", 6, marks=pytest.mark.slow),
    ("raise", "rank 1 stopped: ZeroDivisionError: seven", 6),
    ("damage", "rank 1 stopped: sample seven is damaged.", 3),  # whichever rank meets it
])  # fmt: skip
def test_a_lost_rank_ends_the_others_within_ten_seconds(store_path, tmp_path, fault, words, code):
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
    assert processes[0].returncode == code, stderr
    assert re.search(words, stderr), stderr
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["code"]) == ("failed", code)
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


def test_a_gradient_that_is_no_number_on_one_rank_stops_all_before_any_weight_changes(store_path, tmp_path):
    command = flags("daae-tiny", store_path, tmp_path / "run", "--steps", "100", "--loader", "shards")
    results = finish(start(["train", "nan", "4", *command], STEPS_TAKEN=str(tmp_path / "ids-")))
    assert [code for code, _ in results] == [4, 4], results
    status = read_json(tmp_path / "run" / "status.json")
    assert status["code"] == 4
    assert "the gradient was not finite for 4 steps in a row" in status["reason"]
    captures = sorted((tmp_path / "run" / "debug").glob("*.json"))
    assert len(captures) == 2
    assert not read_json(captures[0])["weights_not_finite"]


@pytest.mark.parametrize("shard", ["--speed.shard", pytest.param("--speed.no-shard", marks=pytest.mark.slow)])
def test_ranks_go_back_together_and_pass_the_bad_data(store_path, tmp_path, shard):
    out = tmp_path / "run"
    more = "--steps 8 --loader shards --watch.rollbacks 1 --watch.checkpoint-minutes 0 --evaluations 1".split()
    command = flags("daae-tiny", store_path, out, *more, shard)
    results = finish(start(["train", "bad data", "3", *command], STEPS_TAKEN=str(tmp_path / "ids-")))
    assert [code for code, _ in results] == [0, 0], results
    said = (out / "train.log").read_text()
    assert "Back to step 4, and on with the batches behind those of step 6 (rollback 1 of 1)." in said
    assert len(list((out / "debug").glob("nonfinite_6*.json"))) == 2
    # Batches 3 to 5 gave nothing; steps 5 to 8 are taken with what comes behind them.
    orders = [epoch_order(0, epoch, COUNT) for epoch in range(2)]
    places = [*range(6), 6, 7, 8, 9]
    expected = [sorted(orders[place // 6][16 * (place % 6) :][:16].tolist()) for place in places]
    assert ids_taken(tmp_path / "ids-", 2) == expected
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [2, 4, 6, 8]
    # Where weights are divided a checkpoint on the way holds what each rank held. The last one is whole, and scored.
    on_the_way, last = (checkpoint.verify(path) for path in checkpoint.list_steps(out / "checkpoints"))
    assert (on_the_way.sharded, last.sharded) == (shard == "--speed.shard", False)
    assert (last.state["shift"], last.state["rollbacks"]) == (2, 1)
    (scored,) = read_rows(out / "evaluations.jsonl")
    assert evaluate.main([str(out), "--no-baselines", "--device", "cpu", "--json"]) == 0
    assert read_json(out / "evaluation.json")["leading"]["value"] == scored["leading"]
    assert export.main([str(out), "--checkpoint", "6"]) == 0


def test_ranks_that_were_started_differently_are_named(store_path, unlabelled_path, tmp_path):
    port = str(free_port())
    processes = []
    for rank, (data, seed) in enumerate([(store_path, "1"), (unlabelled_path, "2")]):
        command = flags("daae-tiny", data, tmp_path / "run", "--steps", "4", "--seed", seed)
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "train.pretrain", *command], env=environment, stderr=subprocess.PIPE, text=True
        ))  # fmt: skip
    results = finish(processes)
    assert [code for code, _ in results] == [2, 2]
    assert re.search(r"rank 1 differs from rank 0 in seed: 2 there, 1 here; data: \w+ there, \w+ here", results[0][1])
    assert not (tmp_path / "run").exists()


def test_one_command_starts_all_ranks_and_returns_the_code_of_the_run(store_path, tmp_path):
    out, words = tmp_path / "run", ("--steps", "4", "--loader", "shards", "--accum-iter", "2", *EXACT)
    command = [
        sys.executable,
        "-m",
        "tools.cli",
        "pretrain",
        "--gpus",
        "2",
        *flags("mae-tiny", store_path, out, *words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: 4 steps, 64 images") == 1
    if not torch.cuda.is_available():
        assert "note: there is no GPU here; 2 processes share the" in done.stderr
    assert read_json(out / "env.json")["ranks"] == 2
    # Each accumulates two parts and averages once; the four parts together are the batch of one.
    assert main(flags("mae-tiny", store_path, tmp_path / "one", *words)) == 0
    one, other = weights(tmp_path / "one", 4), weights(out, 4)
    for name, value in one.items():
        if value.ndim > 1:
            assert (value - other[name]).norm() <= 1e-3 * value.norm(), name


HERE = ("--standalone", "--nproc-per-node", "2")


def torchrun(tmp_path: Path, options: list[str], module: list[str], **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, "-m", *module],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STEPS_TAKEN": str(tmp_path / "ids-"), **more},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--speed.shard",)])
def test_torchrun_starts_ranks_again_of_which_one_was_killed(store_path, tmp_path, more):
    out = tmp_path / "run"
    steps = ("--steps", "12", "--loader", "shards", *EXACT)
    often = (*steps, "--watch.checkpoint-minutes", "0", *more)
    command = ["tests.rank_process", "train", "die", "7", *flags("daae-tiny", store_path, out, *often)]
    ((code, said),) = finish([torchrun(tmp_path, [*HERE, "--max-restarts", "1"], command)])
    assert code == 0, said
    assert "resumed" in (out / "train.log").read_text()
    orders = [epoch_order(0, epoch, COUNT) for epoch in range(2)]
    expected = [sorted(orders[step // 6][16 * (step % 6) :][:16].tolist()) for step in range(12)]
    assert ids_taken(tmp_path / "ids-again-", 2) == expected[6:]
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert main(flags("daae-tiny", store_path, tmp_path / "one", *steps)) == 0
    one, other = (weights(run, 12) for run in (tmp_path / "one", out))
    for name, value in one.items():
        if value.ndim > 1:
            assert (value - other[name]).norm() <= 1e-3 * value.norm(), name


@pytest.mark.slow
def test_a_stopped_rank_0_is_named_by_the_other(store_path, tmp_path):
    """Though it is the one that writes the run: the agent keeps the store in which ranks beat."""
    words = flags("daae-tiny", store_path, tmp_path / "run", "--steps", "10000", "--loader", "shards")
    process = torchrun(tmp_path, [*HERE], ["tests.rank_process", "train", "stop", "5", *words], STRUCK="0")
    ((code, said),) = finish([process])
    assert code != 0
    assert re.search(r"rank 0 on \S+ has given no sign of life for 6 s", said), said
    # Rank 1 waited for it in the step under way, and took no other.
    assert len((tmp_path / "ids-1").read_text().splitlines()) <= 6


@pytest.mark.slow
def test_two_machines_train_one_run(store_path, tmp_path):
    """Two agents of torchrun with a process each, as an sbatch file starts them; here on one machine."""
    out, place = tmp_path / "run", f"127.0.0.1:{free_port()}"
    agents = []
    for _ in range(2):
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
        options += ["--rdzv-endpoint", place, "--local-addr", "127.0.0.1"]
        words = flags("daae-tiny", store_path, out, "--steps", "6", "--loader", "shards", *EXACT)
        agents.append(torchrun(tmp_path, options, ["tests.rank_process", "train", "none", "0", *words]))
    for code, said in finish(agents):
        assert code == 0, said
    assert read_json(out / "env.json")["ranks"] == 2
    order = epoch_order(0, 0, COUNT)
    assert ids_taken(tmp_path / "ids-", 2) == [sorted(order[16 * step :][:16].tolist()) for step in range(6)]


def test_the_file_for_slurm_is_a_script_that_a_shell_reads():
    script = Path(__file__).parents[1] / "tools" / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "gpus"])
def test_the_signal_that_announces_the_end_of_a_job_reaches_the_ranks(store_path, tmp_path, launcher):
    out = tmp_path / "run"
    words = flags("daae-tiny", store_path, out, "--steps", "10000", "--loader", "shards")
    if launcher == "gpus":
        process = subprocess.Popen([sys.executable, "-m", "tools.cli", "pretrain", "--gpus", "2", *words])
    else:
        script = (Path(__file__).parents[1] / "tools" / "slurm.sbatch").read_text()
        options = re.findall(r"--(?:max-restarts|signals-to-handle|shutdown-timeout) \S+", script)
        process = torchrun(tmp_path, [*HERE, *" ".join(options).split()], ["train.pretrain", *words])
    try:
        end = time.monotonic() + PATIENCE
        while not (out / "metrics.jsonl").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
    finally:
        process.kill()
    status = read_json(out / "status.json")
    assert (status["state"], status["code"]) == ("preempted", 75)
    assert process.returncode == (75 if launcher == "gpus" else 1)
    assert status["last_checkpoint"] == f"step_{status['step']:09d}"
    assert "resumed" not in (out / "train.log").read_text()


@pytest.mark.slow
def test_what_all_ranks_refuse_is_said_once(store_path, tmp_path):
    command = [sys.executable, "-m", "tools.cli", "pretrain", "--gpus", "2"]
    command += [*flags("daae-tiny", store_path, tmp_path / "run", "--steps", "4"), "--batch", "15"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert refused.returncode == 2
    assert refused.stderr.endswith("error: --batch 15 cannot be shared out evenly among 2 processes.\n")
    assert refused.stderr.count("error:") == 1


def test_a_batch_that_cannot_be_shared_out_is_refused(store_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="--batch 16 cannot be shared out evenly among 3 processes"):
        main(flags("mae-tiny", store_path, tmp_path / "run", "--steps", "2"))
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
