"""One optimizer step: equal to the plain one however it is cut, refused where it must be, and accounted for."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import weakref
from dataclasses import replace

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import attention
from model.attention import WAYS, Lengths, attend_by_products, choose, listening
from model.network import Network
from model.objectives import OBJECTIVES, Outcome
from model.objectives.daae import DAAE
from model.objectives.mae import MAE
from pipeline.errors import ResourceError, UsageError
from pipeline.views import Batch
from tests.conftest import SMALL
from train.attention import settle_attention
from train.config import Optim, Run, Speed, as_values
from train.device import autocast, choose_device, choose_precision, find_device, memory_gb, resolve
from train.ledger import TRAINING, Ledger
from train.loop import as_settled
from train.presets import open_preset
from train.step import Refused, Stepper, noise, views_of
from train.stop import CutShort, Stop

CPU = torch.device("cpu")
SMALL_DAAE = DAAE(head_hidden=32, head_out=16)


def small_run(method=SMALL_DAAE, **changes) -> Run:
    speed = {name: changes.pop(name) for name in ("compile", "graphs", "recompute", "attention") if name in changes}
    rates = {name: changes.pop(name) for name in ("accumulate", "clip_grad", "layer_decay") if name in changes}
    optim = Optim(batch=16, lr=1e-3, **rates)
    run = Run(objective="daae", method=method, model=SMALL, optim=optim, speed=Speed(**speed), device="cpu")
    return replace(run, **{"precision": "fp32", **changes})


def stepper_of(run: Run) -> Stepper:
    stepper = Stepper(run, CPU)
    stepper.prepare()
    return stepper


def batch_of(run: Run, seed: int = 3, count: int = 16) -> Batch:
    torch.manual_seed(seed)
    return noise(run, count, CPU)


def weights(stepper: Stepper) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stepper.network.state_dict().items()}


def test_a_step_equals_one_written_out():
    run = small_run()
    stepper, batch = stepper_of(run), batch_of(run)
    network = Network(run.method, run.model, run.seed).train()
    groups = [
        {"params": [p for n, p in network.named_parameters() if p.ndim > 1 and "token" not in n], "weight_decay": 0.05},
        {"params": [p for n, p in network.named_parameters() if p.ndim <= 1 or "token" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        stepper(batch, 1e-3)
        loss = sum(network(views_of(run, batch), batch.label).terms.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in network.state_dict().items():
        assert torch.equal(value, stepper.network.state_dict()[name]), name


@pytest.mark.parametrize("changes", [
    {"recompute": True}, {"accumulate": 4, "method": MAE()},
    pytest.param({"compile": True}, marks=pytest.mark.slow),  # a C compiler works for half a minute
])  # fmt: skip
def test_what_saves_memory_or_time_changes_rounding_at_most(changes):
    batch, found = batch_of(small_run()), []
    for change in ({"method": changes.get("method", SMALL_DAAE)}, changes):
        stepper = stepper_of(small_run(**change))
        stepper(batch, 1e-3)
        found.append((stepper.norm, weights(stepper)))
    (norm, plain), (other_norm, other) = found
    assert other_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for name, value in plain.items():
        # A step of Adam is the sign of the gradient: where that is rounding alone, it goes anywhere.
        assert (value - other[name]).abs().float().mean() <= 2e-5, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [MAE(), SMALL_DAAE])
def test_a_loss_is_compiled_into_one_graph(method, precision):
    """By torch's own tracer, without a compiler behind it: what it captures is run as it is. In bf16 attention and
    norms have a formula of their own for that."""
    run = small_run(method, precision=precision)
    batch, found = batch_of(run), []
    views = views_of(run, batch)
    for traced in (False, True):
        network = Network(run.method, run.model, run.seed).train()
        loss = torch.compile(network, backend="eager", fullgraph=True, dynamic=False) if traced else network
        with autocast(CPU, precision):
            terms = loss(views, batch.label).terms
        sum(terms.values()).backward()
        found.append((terms, {name: each.grad for name, each in network.named_parameters() if each.grad is not None}))
    (terms, gradients), (others, compiled) = found
    most = max(gradient.norm() for gradient in gradients.values())
    for name, value in terms.items():
        assert torch.equal(value, others[name]) if precision == "fp32" else value.allclose(others[name], rtol=5e-3)
    for name, gradient in gradients.items():
        apart = (gradient - compiled[name]).norm()
        assert apart <= (1e-6 if precision == "fp32" else 0.02) * max(gradient.norm(), most / 4), name


def test_what_a_cuda_graph_returns_is_copied_before_the_next_one_writes_over_it(monkeypatch):
    """The graph itself is the GPU's (tests/test_cuda.py): here the loss writes to one place as it would."""
    run = small_run(compile=True, graphs=True)
    asked: list[dict] = []
    monkeypatch.setattr(Network, "compile", lambda self, **how: asked.append(how))
    stepper, place = stepper_of(run), torch.zeros(())
    assert asked == [{"dynamic": False, "mode": "reduce-overhead"}]
    sound = stepper.network.forward

    def loss(views, label):
        outcome = sound(views, label)
        place.copy_(outcome.terms["reconstruct"].detach())
        return Outcome(outcome.terms, {**outcome.watched, "reconstruct": place}, outcome.features)

    stepper.network.forward = loss
    found = [stepper(batch_of(run, seed), 1e-2)[0] for seed in (1, 2)]
    assert all(each.watched["reconstruct"] == each.terms["reconstruct"] for each in found)
    assert found[0].terms["reconstruct"] != found[1].terms["reconstruct"]
    for wrong, said in (({}, "goes with --compile"), ({"compile": True, "accumulate": 2}, "and --accum-iter")):
        with pytest.raises(UsageError, match=rf"--speed\.graphs {said}"):
            small_run(graphs=True, **wrong).check()


class NothingRead(TorchDispatchMode):
    """Refuses what asks a tensor for its value (item, bool, float) or makes a size of values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


# MixedAE looks for the largest weights by NumPy, where there is no device to wait for.
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "mixedae"])
def test_nothing_in_a_step_reads_a_value(name):
    run = replace(open_preset(f"{name}-tiny"), model=SMALL, device="cpu", precision="bf16")
    stepper = stepper_of(run)
    batch = replace(batch_of(run), label=torch.arange(16) % 5)
    with NothingRead(), pytest.raises(AssertionError):
        stepper.norm.item()
    with NothingRead():
        stepper(batch, 1e-3, (0.1, 0.2))
    assert stepper.refused.read() == (0, 0)


def test_a_step_whose_gradient_is_not_finite_changes_nothing():
    run = small_run()
    stepper, batch = stepper_of(run), batch_of(run)
    stepper(batch, 1e-3)
    before = weights(stepper)
    moments = {id(p): {k: v.clone() for k, v in state.items()} for p, state in stepper.optimizer.state.items()}
    weight = stepper.network.encoder.norm.weight
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    for _ in range(2):
        stepper(batch, 1e-3)
    hook.remove()
    assert stepper.refused.read() == (2, 2)
    for name, value in stepper.network.named_parameters():
        assert torch.equal(value, before[name]), name
    for parameter, state in stepper.optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(value, moments[id(parameter)][key]), key
    stepper(batch, 1e-3)
    assert stepper.refused.read() == (0, 2)
    assert not torch.equal(weight, before["encoder.norm.weight"])


def test_refused_steps_are_counted_in_a_row_and_in_all():
    refused = Refused(CPU)
    for finite, expected in [(True, (0, 0)), (False, (1, 1)), (False, (2, 2)), (True, (0, 2)), (False, (1, 3))]:
        refused.count(torch.tensor(finite))
        assert refused.read() == expected


def test_clipping_bounds_what_the_optimizer_sees_and_the_norm_is_that_before_it():
    run = small_run(clip_grad=0.01)
    stepper, batch = stepper_of(run), batch_of(run)
    seen = []
    stepper.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for p in stepper.network.parameters()]).item())
    )
    stepper(batch, 1e-3)
    assert seen == [pytest.approx(0.01, rel=1e-3)]
    assert stepper.norm.item() > 0.1


def test_fp16_scales_its_loss_and_refuses_what_overflows():
    run = small_run(precision="fp16")
    stepper, batch = stepper_of(run), batch_of(run)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # no gradient of float16 bears this
    before = weights(stepper)
    stepper(batch, 1e-3)
    assert stepper.refused.read() == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in stepper.network.named_parameters())
    assert stepper.scaler.get_scale() == 2.0**39
    stepper.scaler.update(2.0**10)
    stepper(batch, 1e-3)
    assert stepper.refused.read() == (0, 1)
    plain = stepper_of(small_run())
    plain(batch, 1e-3)
    assert stepper.norm.item() == pytest.approx(plain.norm.item(), rel=0.05)


def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(monkeypatch):
    whole = Stepper._step

    def small_memory(self, batch, lr, parts):
        if len(batch.id) // parts > 5:
            raise torch.OutOfMemoryError("fake")
        return whole(self, batch, lr, parts)

    monkeypatch.setattr(Stepper, "_step", small_memory)
    run = small_run()
    said = r"a step of 16 images does not fit cpu .* 5 do: use --accum-iter 4, or --batch 5"
    with pytest.raises(ResourceError, match=said):
        stepper_of(run)(batch_of(run), 1e-3)
    monkeypatch.setattr(Stepper, "_step", lambda *_: (_ for _ in ()).throw(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")))
    with pytest.raises(ResourceError, match=r"does not fit cpu .* No smaller one does either: .* smaller encoder"):
        stepper_of(run)(batch_of(run), 1e-3)
    monkeypatch.setattr(Stepper, "_step", lambda *_: (_ for _ in ()).throw(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        stepper_of(run)(batch_of(run), 1e-3)


CROWDED = """
import dataclasses, resource, psutil, torch
from pipeline.errors import ResourceError
from train.presets import open_preset
from train.step import Stepper, noise
torch.set_num_threads(1)
cpu, run = torch.device("cpu"), dataclasses.replace(open_preset("mae-tiny"), device="cpu", precision="fp32")
stepper = Stepper(dataclasses.replace(run, optim=dataclasses.replace(run.optim, batch=8192)), cpu)
stepper.prepare()
stepper(noise(run, 64, cpu), 0.0)  # what a step of any size needs is there
batch = noise(run, 8192, cpu)
limit = psutil.Process().memory_info().vms + 2 * 10**9
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    stepper(batch, 0.0)
except ResourceError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_batch_that_memory_does_not_hold_is_answered_with_one_that_it_does():
    done = subprocess.run([sys.executable, "-c", CROWDED], capture_output=True, text=True, timeout=300)
    said = re.fullmatch(
        r"a step of 8,192 images does not fit cpu \(peak ([\d.]+) of [\d.]+ GB\)\. ([\d,]+) do: use --accum-iter "
        r"(\d+), or --batch ([\d,]+)\.\n", done.stdout,
    )  # fmt: skip
    assert said, (done.stdout, done.stderr)
    assert 1 < float(said[1]) < 10
    assert 64 < int(said[2].replace(",", "")) < 8192
    assert 8192 / int(said[3]) <= int(said[2].replace(",", ""))


def test_what_a_failed_step_held_is_gone_when_smaller_ones_are_tried(monkeypatch):
    held: list[weakref.ref] = []

    def crowded(self, batch, parts):
        alive = sum(each() is not None for each in held)
        activations = torch.zeros(len(batch.id))
        held.append(weakref.ref(activations))
        if alive or len(batch.id) > 8:
            raise RuntimeError("not enough memory: you tried to allocate")
        return [Outcome({"loss": activations.sum()}, {}, activations)]

    monkeypatch.setattr(Stepper, "backward", crowded)
    run = small_run()
    with pytest.raises(ResourceError, match=r"does not fit .* 8 do: use --accum-iter 2"):
        stepper_of(run)(batch_of(run), 1e-3)


def test_memory_is_the_most_that_this_process_has_had():
    held = torch.ones(64 << 20)
    there = psutil.Process().memory_info().rss
    assert there > held.nbytes
    del held
    peak, whole = memory_gb(CPU)
    assert there / 1e9 - 0.05 <= peak <= whole  # pages are counted in bundles


@pytest.mark.parametrize("rank", ["0", "2"])
def test_more_processes_than_gpus_are_refused_by_all_of_them(monkeypatch, rank):
    for name, value in {"LOCAL_RANK": rank, "RANK": rank, "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for wish in ("auto", "cuda"):
        with pytest.raises(ResourceError, match=r"3 processes want a GPU each, and this machine has 2\. Use --gpus 2"):
            choose_device(wish)


def test_every_process_has_a_gpu_of_its_own_also_by_the_settings_of_a_run_with_one(monkeypatch):
    for name, value in {"LOCAL_RANK": "2", "RANK": "2", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [find_device(wish) for wish in ("auto", "cuda", "cuda:0")] == [torch.device("cuda", 2)] * 3


def test_bf16_is_not_emulated_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    gpu = torch.device("cuda", 0)
    assert [choose_precision(wish, gpu) for wish in ("auto", "fp16", "fp32")] == ["fp16", "fp16", "fp32"]
    with pytest.raises(ResourceError, match=r"--precision bf16: cuda:0 has no units for it\. Use --precision fp16"):
        choose_precision("bf16", gpu)


def test_what_was_settled_on_one_gpu_is_chosen_anew_on_another(monkeypatch):
    run = small_run(attention="auto")
    saved = as_values(replace(small_run(attention="12x50x64=flash"), precision="bf16", loader="shards"))
    stays, moved = (as_settled(run, saved, CPU, moved=moved) for moved in (False, True))
    assert (stays.speed.attention, moved.speed.attention) == ("12x50x64=flash", "auto")
    assert (moved.precision, moved.loader) == ("bf16", "shards")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ResourceError, match="has no units for it"):
        as_settled(run, saved, torch.device("cuda", 0), moved=True)


def test_position_codes_are_made_before_a_graph_is_traced():
    stepper = stepper_of(small_run(compile=True))
    grids = {view.side // SMALL.patch for view in stepper.run.method.views(SMALL).values()}
    assert len(grids) == 2
    assert {grid for grid, _ in stepper.network.encoder.positions._made} == grids


def test_without_a_compiler_compiling_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    resolve(small_run(), None)
    with pytest.raises(ResourceError, match=r"--compile needs g\+\+, and there is none"):
        resolve(small_run(compile=True), None)


# --- signals ----------------------------------------------------------------------------------------------------------


def test_work_that_may_be_lost_is_not_begun_once_a_signal_has_come():
    with Stop(quiet=True) as stop:
        with stop.at_once():
            begun = True
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(CutShort), stop.at_once():
            begun = False
    assert begun
    with Stop(quiet=True) as stop, pytest.raises(CutShort), stop.at_once():
        signal.raise_signal(signal.SIGUSR1)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _usual_attention():
    yield
    choose("")


@pytest.mark.parametrize("way", ["flash", "cudnn"])
def test_full_precision_never_meets_a_kernel_of_half_of_it(way):
    """What is drawn or checked in float32 beside a run in bf16 attends over the run's own lengths."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 17, 8) for _ in range(3))
    usual = attention.attend(query, key, value)
    choose(f"2x17x8={way}")
    assert torch.equal(attention.attend(query, key, value), usual)
    if way == "cudnn":  # a CPU has none
        with pytest.raises(RuntimeError):
            attention.attend(*(each.bfloat16() for each in (query, key, value)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_to_attend_is_the_same(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 17, 8, dtype=dtype) for _ in range(3))
    expected = torch.softmax(query @ key.transpose(-2, -1) / 8**0.5, dim=-1) @ value
    for way in ("any", "products"):
        assert torch.allclose(WAYS[way](query, key, value), expected, atol=1e-6), way


def test_a_way_is_chosen_for_lengths_or_for_all_or_refused():
    shape = (2, 2, 17, 8)
    query = torch.randn(shape)
    called = []
    before = dict(WAYS)
    WAYS["products"] = lambda *inputs: called.append("products") or attend_by_products(*inputs)
    try:
        attention.attend(query, query, query)
        assert called == []
        choose("2x17x8=products 2x5x8=any")
        attention.attend(query, query, query)
        attention.attend(query[:, :, :5], query[:, :, :5], query[:, :, :5])
        assert called == ["products"]
        choose("products")
        attention.attend(query[:, :, :5], query[:, :, :5], query[:, :, :5])
        assert called == ["products"] * 2
    finally:
        WAYS.update(before)
    for wrong in ("slow", "2x17=any", "2x17x8=slow"):
        with pytest.raises(UsageError, match=r"--speed\.attention"):
            choose(wrong)


def test_lengths_of_a_loss_are_heard():
    run = small_run()
    stepper, batch = stepper_of(run), batch_of(run)
    with listening() as heard:
        stepper.network(views_of(run, batch), batch.label)
    # 16 patches: 4 seen in the masked view, 4 in the small one, both in one call; 1 + 16 in the decoder.
    assert heard == {Lengths(32, 2, 5, 16), Lengths(16, 2, 17, 16)}


def test_a_way_is_taken_for_a_tenth_less_and_what_fails_is_left_out(monkeypatch):
    clock, lengths = [0.0], Lengths(8, 2, 17, 8)
    monkeypatch.setattr(attention, "_now", lambda device: clock[0])

    def costing(seconds: float):
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            clock[0] += seconds
            return query + key + value

        return attend

    def missing(*_):
        raise RuntimeError("no such kernel")

    ways = {"any": costing(1.0), "products": costing(0.95), "efficient": costing(0.85), "flash": missing}
    for way in WAYS:
        monkeypatch.setitem(WAYS, way, ways.get(way, missing))
    assert attention.fastest(lengths, CPU, torch.float32) == "efficient"
    monkeypatch.setitem(WAYS, "efficient", costing(0.92))
    assert attention.fastest(lengths, CPU, torch.float32) == "any"
    assert attention.fastest(lengths, CPU, torch.bfloat16) == "products"  # the usual one there, which is as fast


def test_the_fastest_way_is_one_of_them_and_a_cpu_goes_by_rule():
    assert attention.fastest(Lengths(8, 2, 17, 8), CPU, torch.float32, rounds=1) in WAYS
    assert settle_attention(stepper_of(small_run())) == ""
    assert settle_attention(stepper_of(small_run(attention="products"))) == "products"


def test_steps_in_turns_keep_their_own_way_to_attend(monkeypatch):
    used = []
    monkeypatch.setitem(WAYS, "products", lambda *inputs: used.append(1) or attend_by_products(*inputs))
    steppers = [stepper_of(small_run(attention=way)) for way in ("products", "any")]
    for each in steppers:
        settle_attention(each)
    batch, counts = batch_of(small_run()), []
    for _ in range(2):
        for each in steppers:
            before = len(used)
            each(batch, 0.0)
            counts.append(len(used) - before)
    assert counts == [3, 0, 3, 0]  # two blocks of the encoder, one of the decoder


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_a_second_counts_for_the_innermost_part(monkeypatch):
    clock = itertools.count(start=0.0, step=1.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    ledger = Ledger("cpu")
    with ledger("losses"):  # 0
        with ledger("encoder"):  # 1
            pass  # 2
        with ledger("decoder"):  # 3
            pass  # 4
    # 5
    with ledger("backward"):  # 6
        pass  # 7
    assert ledger.read() == {"losses": 3.0, "encoder": 1.0, "decoder": 1.0, "backward": 1.0}
    with ledger.aside("evaluation"), ledger("encoder"):
        pass
    assert ledger.read()["encoder"] == 1.0
    again = Ledger("cpu")
    again.load(ledger.read())
    assert again.read() == ledger.read()


def test_every_part_of_a_step_is_in_the_ledger():
    run = small_run()
    stepper, batch = stepper_of(run), batch_of(run)
    stepper(batch, 1e-3)
    spent = stepper.ledger.read()
    assert set(spent) == set(TRAINING) - {"data wait"}
    assert min(spent.values()) > 0


def test_dropping_tokens_of_the_small_view_is_counted_and_seen():
    whole, half = SMALL_DAAE, replace(SMALL_DAAE, small_drop=0.5)
    assert half.macs(SMALL) < whole.macs(SMALL)
    run = small_run(half)
    views = views_of(run, batch_of(run))
    assert (views["small"].tokens, views["holed"].tokens) == (2, 4)
    stepper = stepper_of(run)
    stepper(batch_of(run), 1e-3)
    assert stepper.refused.read() == (0, 0)
