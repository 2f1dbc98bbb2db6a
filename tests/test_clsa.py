"""CLSA: distributions over a bank of keys, where gradients go, views of several sizes, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses import bank_contrast, bank_cosines, distribution_matching
from model.memory import Queue
from model.network import Network
from model.objectives.clsa import CLSA
from model.objectives.mocov2 import MoCoV2
from model.shape import encoder_macs, head_macs
from pipeline.errors import UsageError
from pipeline.views import Patches
from tests import textbook
from tests.conftest import SMALL
from tests.networks import COUNTED, LABEL, counted_macs, overfit, views_of
from tests.test_pretrain import flags
from train.json_files import read_rows
from train.presets import TINY, VIT_B, open_preset
from train.pretrain import main

SINGLE = CLSA(head_out=16, queue=32, strong=(0.5,))
MULTI = replace(SINGLE, weak=(1.0, 0.5), strong=(1.0, 0.5, 0.25))
SEVENTHS = tuple(sevenths / 7 for sevenths in (7, 6, 5, 4, 3))


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(views: int, rows: int = 6, keys: int = 26, seed: int = 0) -> list[Tensor]:
    bank = F.normalize(vectors(keys, seed=1), dim=1)
    return [each @ bank.T for each in F.normalize(vectors(views, rows, seed=seed), dim=2)]


def terms_of(network: Network, views: dict[str, Patches]) -> dict[str, Tensor]:
    return network(views, LABEL).terms


# --- losses -----------------------------------------------------------------------------------------------------------


def test_both_losses_match_their_printed_formulas():
    weak, strong, key = list(vectors(2, 6)), list(vectors(3, 6, seed=1)), vectors(6, seed=2)
    queue = F.normalize(vectors(20, seed=3), dim=1)
    near = bank_cosines([*weak, *strong], key * 3, queue)
    assert near[0].shape == (6, 26)
    expected = textbook.bank_contrast(weak, key, queue, temperature=0.2)
    assert bank_contrast(near[:2], temperature=0.2).item() == pytest.approx(expected, abs=1e-12)
    expected = textbook.distribution_matching(weak, strong, key, queue, temperature=0.1)
    assert distribution_matching(near[:2], near[2:], temperature=0.1).item() == pytest.approx(expected, abs=1e-12)
    halved = bank_cosines([each.float() for each in (*weak, *strong)], key.float(), queue.float())
    with torch.autocast("cpu", torch.bfloat16):
        again = bank_cosines([each.float() for each in (*weak, *strong)], key.float(), queue.float())
        assert all(torch.equal(*each) for each in zip(halved, again, strict=True))
        found = distribution_matching(again[:2], again[2:], temperature=0.1).item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_gradient_of_strong_logits_is_the_difference_of_distributions():  # T-A1
    (weak,), (strong,) = cosines(1), cosines(1, seed=2)
    strong.requires_grad_()
    distribution_matching([weak], [strong], temperature=0.2).backward()
    difference = torch.softmax(strong.detach() / 0.2, dim=1) - torch.softmax(weak / 0.2, dim=1)
    assert strong.grad is not None
    assert (strong.grad - difference / 0.2 / len(weak)).abs().max() < 1e-15
    assert strong.grad.sum(dim=1).abs().max() < 1e-15


def test_the_least_is_the_entropy_of_the_weak_distribution():  # T-A2
    (weak,), strong = cosines(1), cosines(50, seed=2)
    entropy = torch.special.entr(torch.softmax(weak / 0.2, dim=1)).sum(dim=1).mean()
    assert distribution_matching([weak], [weak], temperature=0.2).item() == pytest.approx(entropy.item(), abs=1e-14)
    gaps = [(distribution_matching([weak], [each], temperature=0.2) - entropy).item() for each in strong]
    assert min(gaps) > 0.5
    near = distribution_matching([weak], [weak + 1e-3 * strong[0]], temperature=0.2) - entropy
    assert 0 < near.item() < 1e-4


def test_a_bank_of_equal_keys_tells_nothing():  # T-A5
    same = torch.ones(4, 8)
    near = bank_cosines([vectors(4).float(), vectors(4, seed=1).float()], same, F.normalize(torch.ones(60, 8), dim=1))
    assert distribution_matching(near[:1], near[1:], temperature=0.2).item() == pytest.approx(math.log(64), abs=1e-5)
    assert bank_contrast(near, temperature=0.2).item() == pytest.approx(math.log(64), abs=1e-5)


def test_what_is_very_unlikely_stays_finite():
    """At a temperature of 0.005 exp(-2 / 0.005) is 0 in float32, whose logarithm is none."""
    weak, strong = torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]], requires_grad=True)
    loss = distribution_matching([weak], [strong], temperature=0.005)
    assert loss.item() == pytest.approx(400)
    (gradient,) = torch.autograd.grad(loss, strong)
    assert gradient.tolist() == [[-200.0, 200.0]]


# --- where gradients go -----------------------------------------------------------------------------------------------


def test_weak_views_and_keys_get_no_gradient_of_the_distributions():  # T-A3
    views, network = views_of(MULTI), Network(MULTI, SMALL, 0)
    for view in views.values():
        view.pixels.requires_grad_()
    terms = terms_of(network, views)
    terms["distribution"].backward(retain_graph=True)
    moved = {name for name, view in views.items() if view.pixels.grad is not None and view.pixels.grad.abs().max() > 0}
    assert moved == {"strong0", "strong1", "strong2"}
    for view in views.values():
        view.pixels.grad = None
    terms["contrast"].backward()
    moved = {name for name, view in views.items() if view.pixels.grad is not None and view.pixels.grad.abs().max() > 0}
    assert moved == {"weak0", "weak1"}


def test_equal_weak_and_strong_views_have_nothing_to_learn_from_one_another():  # T-A4
    views, network = views_of(replace(SINGLE, strong=(1.0,))), Network(SINGLE, SMALL, 0).double()
    exact = {name: Patches(view.pixels.double(), view.grid) for name, view in views.items()}
    sizes = {}
    for name in ("same", "other"):
        network.zero_grad()
        pair = exact | {"strong0": exact["weak0"]} if name == "same" else exact
        terms_of(network, pair)["distribution"].backward()
        sizes[name] = max(p.grad.abs().max().item() for p in network.parameters() if p.grad is not None)
    assert sizes["same"] < 1e-15 < 1e-6 < sizes["other"]


def test_sums_are_the_published_ones_and_means_those_over_views_and_pairs():
    views, networks = views_of(MULTI), [Network(replace(MULTI, reduction=kind), SMALL, 0) for kind in ("sum", "mean")]
    summed, mean = (terms_of(network, views) for network in networks)
    assert summed["contrast"].item() == pytest.approx(2 * mean["contrast"].item(), rel=1e-6)
    assert summed["distribution"].item() == pytest.approx(6 * mean["distribution"].item(), rel=1e-6)
    half = terms_of(Network(replace(MULTI, distribution_weight=0.5), SMALL, 0), views)
    assert half["distribution"].item() == pytest.approx(summed["distribution"].item() / 2, rel=1e-6)


def test_the_bank_of_a_network_is_its_batch_and_its_queue():
    views, network = views_of(MULTI), Network(replace(MULTI, reduction="mean"), SMALL, 0)
    queue = network.parts["queue"]
    assert isinstance(queue, Queue)
    with torch.no_grad():
        embedded = {  # the copies begin as what they follow
            name: network.parts["projector"](network.encoder(view)[0][:, 1:].mean(dim=1))
            for name, view in views.items()
        }
        found = terms_of(network, views)
    key = embedded.pop("key")
    weak, strong = ([each for name, each in embedded.items() if name.startswith(kind)] for kind in ("weak", "strong"))
    expected = textbook.bank_contrast(weak, key, queue.rows, temperature=0.2)
    assert found["contrast"].item() == pytest.approx(expected, abs=1e-5)
    expected = textbook.distribution_matching(weak, strong, key, queue.rows, temperature=0.2)
    assert found["distribution"].item() == pytest.approx(expected, abs=1e-5)


def test_the_queue_takes_unit_keys_of_whole_batches_the_oldest_first():  # T-A6
    network, seen = Network(replace(SINGLE, queue=48), SMALL, 0).train(), []
    queue = network.parts["queue"]
    assert isinstance(queue, Queue)
    network.parts["momentum_projector"].register_forward_hook(lambda _, __, key: seen.append(F.normalize(key, dim=1)))
    for step in range(4):
        terms_of(network, views_of(SINGLE, seed=step))
        network.objective.after_step(network, step / 4)
        assert queue.rows.shape == (48, 16)
        assert torch.allclose(queue.rows.norm(dim=1), torch.ones(48), atol=1e-6)
    assert torch.allclose(queue.rows, torch.cat([seen[3], seen[1], seen[2]]), atol=1e-6)


# --- views and work ---------------------------------------------------------------------------------------------------


def test_views_are_the_published_ones():
    moco, full = MoCoV2().views(VIT_B)["one"], CLSA().views(VIT_B)
    assert list(full) == ["weak0", "strong0", "key"]
    assert full["weak0"] == full["key"] == moco
    assert full["strong0"] == replace(moco, side=96, area=full["strong0"].area, strong=5)
    assert full["strong0"].area == pytest.approx((0.086, 0.429), abs=1e-3)
    several = CLSA(weak=SEVENTHS, strong=SEVENTHS).views(VIT_B)
    for kind, changes in (("weak", 0), ("strong", 5)):
        views = [view for name, view in several.items() if name.startswith(kind)]
        assert [view.side for view in views] == [224, 192, 160, 128, 96]
        assert [view.area[0] for view in views] == pytest.approx([0.2, 0.172, 0.143, 0.114, 0.086], abs=1e-3)
        assert [view.area[1] for view in views] == pytest.approx([1, 0.86, 0.715, 0.571, 0.429], abs=3e-3)
        assert {view.strong for view in views} == {changes}


def test_sides_that_are_no_whole_patches_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"--method\.strong 0\.4286 makes views of 27 of 64 pixels, no multiple of "):
        CLSA().views(TINY)
    with pytest.raises(UsageError, match=r"--method\.weak 0\.45 .* Use 0\.4286 \(96 pixels\) or 0\.5 \(112 pixels\)\."):
        CLSA(weak=(1.0, 0.45)).views(VIT_B)
    with pytest.raises(UsageError, match=r"--method\.strong 0\.01 .* Use 0\.07143 \(16 pixels\)\."):
        CLSA(strong=(0.01,)).macs(VIT_B)
    assert CLSA(strong=(0.07143, 0.43)).views(VIT_B)["strong1"].side == 96


@pytest.mark.parametrize(("method", "words"), [
    (replace(SINGLE, weak=()), r"--method\.weak is one or several sides"),
    (replace(SINGLE, strong=(0.5, 1.5)), r"--method\.strong is one or several sides .* each up to 1"),
    (replace(SINGLE, changes=0), r"--method\.changes 0 leaves nothing"),
    (replace(SINGLE, queue=40), r"--method\.queue 40 is no multiple of --batch 16"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(method, words):
    with pytest.raises(UsageError, match=words):
        method.check(16)


def test_presets_train_single_and_multi_crop_as_moco_v3_trains_vits():
    published, several = (open_preset(f"clsa-vitb16-in1k-{name}") for name in ("200", "200-multi"))
    for run in (published, several):
        assert run.optim.peak_lr() == pytest.approx(2.4e-3)
        assert (run.optim.betas, run.optim.weight_decay, run.budget.epochs) == ((0.9, 0.999), 0.1, 200)
        run.check()
    assert len(several.method.views(several.model)) == 11
    # Section by section the work of a ViT-B: 26.6 and 101.9 GMAC in trained-forward units.
    assert published.method.macs(VIT_B) / 1e9 == pytest.approx(26.61, rel=0.01)
    assert several.method.macs(VIT_B) / 1e9 == pytest.approx(101.86, rel=0.01)
    for name, sides in (("vits16", [224, 96, 224]), ("tiny", [64, 32, 64])):
        run = open_preset(f"clsa-{name}")
        run.check()
        assert [view.side for view in run.method.views(run.model).values()] == sides


@pytest.mark.parametrize("method", [SINGLE, MULTI])
def test_formula_counts_what_torch_multiplies(method):
    key = encoder_macs(COUNTED, 64) + head_macs(64, 64, 16)  # looked at without a gradient, counted a third
    expected = method.macs(COUNTED) + 2 * key / 3
    assert counted_macs(method, COUNTED, LABEL[:8]) == pytest.approx(expected, rel=0.01)


# --- learning and its failure ----------------------------------------------------------------------------------------


def test_thirty_steps_on_one_batch_halve_the_contrast_and_bring_the_strong_view_along():
    # As in MoCo v2's test, a norm in the head: an encoder that knows nothing makes keys that are all too alike.
    method = replace(SINGLE, head_norm="batch", jitter=(0.0,) * 4, gray=0.0, blur=(0.0, 0.0))
    first, *_, last = overfit(Network(method, SMALL, 0), views_of(method), 30)
    assert last["contrast"] < math.log(16 + 32) / 2 < first["contrast"]
    gaps = [each["distribution"] - each["weak_entropy"] for each in (first, last)]
    assert 0 <= gaps[1] < gaps[0]
    assert last["pair_accuracy"] == 1
    assert last["weak_entropy"] < first["weak_entropy"]


def test_the_known_failure_is_seen_in_the_metrics():
    """Embeddings that say nothing are as near to each key: entropy ln(B + K), no spread."""
    network = Network(SINGLE, SMALL, 0)
    with torch.no_grad():
        for parameter in network.parts["projector"].parameters():
            parameter.zero_()
    outcome = network(views_of(SINGLE), LABEL)
    assert outcome.watched["weak_entropy"].item() == pytest.approx(math.log(48), rel=1e-6)
    assert outcome.terms["distribution"].item() == pytest.approx(math.log(48), rel=1e-6)
    assert outcome.watched["pair_accuracy"].item() == pytest.approx(1 / 16)


def test_a_run_of_several_crops_writes_what_tells_its_health(store_path, tmp_path):
    several = "--method.weak 1 0.5 --method.strong 0.5 0.25 --method.reduction mean".split()
    assert main(flags("clsa-tiny", store_path, tmp_path / "run", "--steps", "2", *several)) == 0
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(row["contrast"] + row["distribution"])
    assert 0 < row["weak_entropy"] < math.log(48)
    assert {"pair_accuracy", "pair_cosine", "other_cosine", "spread"} <= row.keys()
