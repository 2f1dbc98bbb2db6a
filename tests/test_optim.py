"""Optimizers beside AdamW, layer-wise rates, and the average of the encoder's weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.network import Network
from model.objectives.mae import MAE
from tests.conftest import SMALL
from tests.test_pretrain import flags
from tests.test_step import batch_of, small_run, stepper_of
from tools.export import main as export
from train.checkpoint import newest
from train.config import Optim
from train.muon import Muon, newton_schulz, orthogonal
from train.optim import layer_of, layer_scales, parameter_groups
from train.pretrain import main

CPU = torch.device("cpu")
MUON = Optim(batch=16, lr=1e-3, optimizer="muon")


def test_layer_wise_rates_are_those_of_the_published_recipe():
    scales = layer_scales(12, 0.65)
    assert len(scales) == 14
    assert scales[0] == pytest.approx(0.003697, rel=1e-3)
    assert scales[1] == pytest.approx(0.005688, rel=1e-3)
    assert scales[12] == pytest.approx(0.65)
    assert scales[13] == 1.0
    assert [layer_of(f"encoder.{name}", 12) for name in ("cls_token", "patch_embed.proj.weight")] == [0, 0]
    assert [layer_of(f"encoder.blocks.{i}.mlp.fc1.bias", 12) for i in (0, 11)] == [1, 12]
    assert [layer_of(name, 12) for name in ("encoder.norm.bias", "parts.decoder.blocks.0.norm1.bias")] == [13, 13]


@pytest.mark.parametrize("optim", [Optim(), Optim(layer_decay=0.7), MUON, replace(MUON, layer_decay=0.7)])
def test_every_trained_parameter_is_in_one_group_that_knows_its_layer(optim):
    network = Network(MAE(), SMALL, 0)
    plain, matrices = parameter_groups(network, optim)
    names = {id(each): name for name, each in network.named_parameters()}
    placed = [(names[id(each)], group) for group in plain + matrices for each in group["params"]]
    assert sorted(name for name, _ in placed) == sorted(names.values())
    for name, group in placed:
        assert group["lr_scale"] == pytest.approx(optim.layer_decay ** (SMALL.depth + 1 - layer_of(name, SMALL.depth)))
        assert (group["weight_decay"] == 0) == (".weight" not in name or "norm" in name)
    moved = {name for group in matrices for name in (names[id(each)] for each in group["params"])}
    assert moved == ({n for n in names.values() if ".blocks." in n and n.endswith("weight") and "norm" not in n}
                     if optim.optimizer == "muon" else set())  # fmt: skip


def test_the_rate_of_a_layer_reaches_its_weights():
    slow, even = (stepper_of(small_run(layer_decay=decay)) for decay in (0.5, 1.0))
    before = {name: value.clone() for name, value in slow.network.named_parameters()}
    for stepper in (slow, even):
        stepper(batch_of(small_run()), 1e-3)
    # The first step of Adam is as long as the rate, whatever the gradient; decay adds to it in proportion.
    for name, scale in (("encoder.cls_token", 1 / 8), ("encoder.blocks.1.mlp.fc1.weight", 1 / 2)):
        mine, theirs = (dict(each.network.named_parameters())[name] - before[name] for each in (slow, even))
        assert torch.allclose(mine, scale * theirs, rtol=1e-3, atol=1e-7), name


def test_newton_schulz_keeps_singular_vectors_and_evens_out_singular_values():
    torch.manual_seed(0)
    for shape in ((3, 24, 40), (2, 40, 24), (1, 32, 32)):
        matrices = torch.randn(shape, dtype=torch.float64)
        turned = newton_schulz(matrices)
        for before, after in zip(matrices, turned, strict=True):
            left, _, right = torch.linalg.svd(before, full_matrices=False)
            inside = left.T @ after @ right.T
            assert (inside - inside.diag().diag()).abs().max() < 1e-9
            assert 0.6 < inside.diag().min() <= inside.diag().max() < 1.3


def test_queries_keys_and_values_are_turned_apart():
    torch.manual_seed(0)
    update = torch.randn(3 * 16, 16, dtype=torch.float64)
    (whole,) = orthogonal([update], 3)
    for piece, part in zip(whole.chunk(3), update.chunk(3), strict=True):
        assert torch.allclose(piece, newton_schulz(part[None])[0], atol=1e-12)


def test_muon_equals_torchs_and_moves_everything_else_as_adamw():
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    theirs = copy.deepcopy(mine)
    adamw = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]

    matrices, vectors = split(mine)
    group = {"params": matrices, "pieces": 1, "lr": 1e-2, "weight_decay": 0.1}
    one = Muon([group], torch.optim.AdamW(vectors, fused=True, **adamw))
    matrices, vectors = split(theirs)
    reference = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(vectors, **adamw)
    inputs, start = torch.randn(64, 16), copy.deepcopy(mine)
    for _ in range(5):
        for model, optimizers in ((mine, [one]), (theirs, [reference, rest])):
            model(inputs).square().mean().backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    # torch multiplies in bfloat16, ours on a CPU in float32.
    for first, second, origin in zip(mine.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (first - second).norm() <= 0.03 * (second - origin).norm()


def test_muon_leaves_a_refused_step_out_to_the_bit():
    run = replace(small_run(), optim=MUON)
    stepper, batch = stepper_of(run), batch_of(run)
    assert isinstance(stepper.optimizer, Muon)
    stepper(batch, 1e-3)

    def everything() -> dict[str, Tensor]:
        state = {f"{id(p)} {k}": v.clone() for p, each in stepper.optimizer.state.items() for k, v in each.items()}
        return state | {name: value.clone() for name, value in stepper.network.named_parameters()}

    before = everything()
    matrix = stepper.network.encoder.blocks[0].get_submodule("mlp.fc1").weight
    hook = matrix.register_hook(lambda gradient: gradient * float("nan"))
    stepper(batch, 1e-3)
    hook.remove()
    after = everything()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(name.endswith("momentum") for name in before)
    stepper(batch, 1e-3)
    assert not torch.equal(matrix, before["encoder.blocks.0.mlp.fc1.weight"])


def test_fp16_scales_for_muon_too():
    run = replace(small_run(), optim=MUON, precision="fp16")
    stepper, batch = stepper_of(run), batch_of(run)
    stepper(batch, 1e-3)
    assert stepper.refused.read() == (0, 0)
    matrix = stepper.network.encoder.blocks[0].get_submodule("mlp.fc1").weight
    assert torch.isfinite(matrix).all()


def test_the_average_follows_slowly_and_is_what_is_scored():
    run = replace(small_run(), optim=Optim(batch=16, lr=1e-3, ema=0.5))
    stepper, batch = stepper_of(run), batch_of(run)
    expected = stepper.network.encoder.cls_token.detach().clone()
    for step in range(1, 15):
        stepper(batch, 1e-3)
        slow = min(0.5, (1 + step) / (10 + step))
        expected = slow * expected + (1 - slow) * stepper.network.encoder.cls_token.detach()
    trained = stepper.network.encoder
    with stepper.scored(stepper.network) as network:
        assert torch.allclose(network.encoder.cls_token, expected, atol=1e-6)
    assert stepper.network.encoder is trained
    assert not torch.allclose(trained.cls_token, expected, atol=1e-6)


def test_a_run_with_all_of_it_resumes_to_the_bit_and_exports_its_average(store_path, tmp_path):
    def words(name: str, *more: str) -> list[str]:
        options = "--optim.optimizer muon --optim.layer-decay 0.8 --optim.ema 0.9 --evaluations 1".split()
        return flags("mae-tiny", store_path, tmp_path / name, "--steps", "6", *options, *more)

    assert main(words("whole")) == 0
    assert main(words("parts", "--limit-steps", "3")) == 0
    assert main(words("parts")) == 0
    whole, parts = (newest(tmp_path / name / "checkpoints", print) for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    for read in (lambda point: point.weights(), lambda point: point.average(), lambda point: point.moments()):
        one, other = read(whole), read(parts)
        assert one.keys() == other.keys()
        assert len(one) > 0
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(name.endswith("/momentum") for name in whole.moments())
    scored = whole.scored()
    assert torch.equal(scored["encoder.cls_token"], whole.average()["encoder.cls_token"])
    assert not torch.equal(scored["encoder.cls_token"], whole.weights()["encoder.cls_token"])
    assert torch.equal(scored["parts.decoder.mask_token"], whole.weights()["parts.decoder.mask_token"])
    assert export([str(tmp_path / "whole")]) == 0
    exported = load_file(tmp_path / "whole" / "export" / "model.safetensors")
    assert torch.equal(exported["cls_token"], scored["encoder.cls_token"])
