"""Each loss against its printed formula, and the numbers that it must have at its extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.heads import Predictor, Projector, effective_rank, feature_spread, pair_health
from model.losses import (
    info_nce,
    masked_mse,
    normalise_patches,
    nt_xent,
    queue_info_nce,
    regression,
    sinkhorn,
    sup_con,
    swapped_prediction,
    symmetric_info_nce,
)
from tests import textbook


def pair(batch: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = torch.randn(2, batch, width, generator=torch.Generator().manual_seed(0))
    return one, other


def test_both_directions_of_info_nce_are_averaged():
    query, key = pair()
    both = textbook.info_nce(query, key, temperature=0.2) + textbook.info_nce(key, query, temperature=0.2)
    assert symmetric_info_nce(query, key, temperature=0.2).item() == pytest.approx(both / 2, abs=1e-5)


def test_a_collapsed_encoder_scores_log_batch():  # L1
    same = torch.ones(32, 8)
    assert info_nce(same, same, temperature=0.1).item() == pytest.approx(math.log(32), abs=1e-5)
    assert symmetric_info_nce(same, same, temperature=0.1).item() == pytest.approx(math.log(32), abs=1e-5)


def test_a_perfect_encoder_scores_what_orthogonal_pairs_score():
    eye = torch.eye(16)
    assert info_nce(eye, eye, temperature=0.1).item() == pytest.approx(math.log(1 + 15 * math.exp(-10)), rel=1e-3)


LABEL = torch.tensor([0, 1, 0, 2, 1, 0])
QUEUE = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(3)).double(), dim=1)
# Two views in, a scalar out: ours and the printed one.
PAIR_LOSSES = {
    "info_nce": (info_nce, textbook.info_nce, {"temperature": 0.1}),
    "nt_xent": (nt_xent, textbook.nt_xent, {"temperature": 0.2}),
    "sup_con": (
        lambda one, other, **more: sup_con(torch.stack([one, other]), LABEL, **more),
        lambda one, other, **more: textbook.sup_con(torch.stack([one, other]), LABEL, **more),
        {"temperature": 0.1},
    ),
    "queue_info_nce": (
        lambda one, other, **more: queue_info_nce(one, other, QUEUE, **more),
        lambda one, other, **more: textbook.queue_info_nce(one, other, QUEUE, **more),
        {"temperature": 0.2},
    ),
    "regression": (regression, textbook.regression, {}),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_of_two_views_match_their_printed_formulas(name):
    mine, printed, options = PAIR_LOSSES[name]
    one, other = pair()
    assert mine(one * 3, other * 0.1, **options).item() == pytest.approx(printed(one, other, **options), abs=1e-5)
    exact = mine(one.double(), other.double(), **options)
    assert exact.dtype == torch.float64
    assert exact.item() == pytest.approx(printed(one, other, **options), abs=1e-12)


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "queue_info_nce", "regression"])
def test_losses_of_two_views_ignore_the_order_of_the_batch(name):  # L12; sup_con, with its labels, below
    mine, _, options = PAIR_LOSSES[name]
    one, other = pair()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert mine(one[order], other[order], **options).item() == pytest.approx(mine(one, other, **options).item())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_of_two_views_are_computed_in_float32_under_autocast(name):
    mine, _, options = PAIR_LOSSES[name]
    one, other = pair()
    exact = mine(one, other, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mine(one, other, **options), exact)


@pytest.mark.parametrize(("batch", "expected"), [(16, 0.00136107), (256, 0.0228900)])
def test_nt_xent_at_its_extremes(batch, expected):  # L2, L3
    same = torch.ones(batch, 8)
    assert nt_xent(same, same, temperature=0.1).item() == pytest.approx(math.log(2 * batch - 1), abs=1e-5)
    eye = torch.eye(batch, dtype=torch.float64)
    assert nt_xent(eye, eye, temperature=0.1).item() == pytest.approx(expected, rel=1e-5)


def test_a_collapsed_encoder_beside_a_queue_scores_log_of_all_keys():  # L4
    same = torch.ones(4, 8)
    queue = torch.nn.functional.normalize(torch.ones(64, 8), dim=1)
    assert queue_info_nce(same, same, queue, temperature=0.2).item() == pytest.approx(math.log(65), abs=1e-5)


def test_sup_con_with_a_class_for_each_image_is_nt_xent():  # L5
    one, other = (each.double() for each in pair())
    features = torch.stack([one, other])
    assert sup_con(features, torch.arange(6), temperature=0.2).item() == pytest.approx(
        nt_xent(one, other, temperature=0.2).item(), abs=1e-14
    )


def test_sup_con_of_one_class_that_collapsed_scores_log_of_all_others():  # L6
    value = sup_con(torch.ones(3, 8, 4), torch.zeros(8, dtype=torch.int64), temperature=0.1)
    assert value.item() == pytest.approx(math.log(23), abs=1e-5)


def test_sup_con_knows_classes_only_by_who_shares_them():  # L12, T-E4
    features = torch.stack(pair())
    loss = sup_con(features, LABEL, temperature=0.1).item()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert sup_con(features[:, order], LABEL[order], temperature=0.1).item() == pytest.approx(loss)
    assert sup_con(features, torch.tensor([7, 3, 5])[LABEL], temperature=0.1).item() == loss


@pytest.mark.parametrize(("base", "factor"), [(None, 1), (0.1, 1), (0.07, 1 / 0.7), (0.2, 0.5)])
def test_sup_con_is_multiplied_by_its_temperature_over_the_base_one(base, factor):
    features = torch.stack(pair()).double().requires_grad_()
    printed = textbook.sup_con(features.detach(), LABEL, temperature=0.1)
    plain = sup_con(features, LABEL, temperature=0.1)
    found = sup_con(features, LABEL, temperature=0.1, base_temperature=base)
    assert found.item() == pytest.approx(factor * printed, rel=1e-12)
    mine, expected = (torch.autograd.grad(each, features)[0] for each in (found, plain))
    assert torch.allclose(mine, factor * expected, rtol=1e-12)


def test_sup_con_leaves_out_anchors_without_a_positive():
    one, _ = pair()
    alone = torch.tensor([0, 1, 0, 2, 3, 0])
    features = one[None].requires_grad_()
    loss = sup_con(features, alone, temperature=0.1)
    assert loss.item() == pytest.approx(textbook.sup_con(features.detach(), alone, temperature=0.1), abs=1e-5)
    nobody = sup_con(features, torch.arange(6), temperature=0.1)
    assert nobody.item() == 0
    (gradient,) = torch.autograd.grad(loss + nobody, features)
    assert torch.isfinite(gradient).all()


def test_regression_is_between_0_and_4_and_pulls_the_prediction_alone():  # L8
    one, other = pair()
    assert regression(one, one * 5).item() == pytest.approx(0, abs=1e-6)
    assert regression(one, -one).item() == pytest.approx(4, abs=1e-6)
    one.requires_grad_()
    other.requires_grad_()
    (regression(one, other) + queue_info_nce(one, other, QUEUE, temperature=0.2)).backward()
    assert one.grad is not None
    assert other.grad is None


def test_losses_equal_those_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    features, image = torch.stack(pair(16, 32)), torch.arange(16)
    theirs = losses.NTXentLoss(temperature=0.2)(features.flatten(0, 1), image.repeat(2)).item()
    assert nt_xent(*features, temperature=0.2).item() == pytest.approx(theirs, abs=1e-5)
    label = image % 5
    theirs = losses.SupConLoss(temperature=0.1)(features.flatten(0, 1), label.repeat(2)).item()
    assert sup_con(features, label, temperature=0.1).item() == pytest.approx(theirs, abs=1e-5)
    query, key = features
    # Equal labels that are not one tensor: of each query only its own key is a positive, and no key is left out.
    theirs = losses.NTXentLoss(temperature=0.2)(query, image, ref_emb=key, ref_labels=image.clone()).item()
    assert info_nce(query, key, temperature=0.2).item() == pytest.approx(theirs, abs=1e-5)


def test_losses_equal_those_of_lightly():
    theirs = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    one, other = pair(16, 32)
    nt_xents = theirs.NTXentLoss(temperature=0.2)(one, other)
    assert nt_xent(one, other, temperature=0.2).item() == pytest.approx(nt_xents.item(), abs=1e-5)
    bank = theirs.NTXentLoss(temperature=0.2, memory_bank_size=(64, 32))
    bank(one, other)  # draws the bank's first rows
    queue = bank.memory_bank.bank.clone()
    found = queue_info_nce(one, other, torch.nn.functional.normalize(queue, dim=1), temperature=0.2)
    assert found.item() == pytest.approx(bank(one, other).item(), abs=1e-5)
    assert regression(one, other).item() == pytest.approx(2 + 2 * theirs.NegativeCosineSimilarity()(one, other).item())
    scores = [torch.nn.functional.normalize(each, dim=1) @ torch.eye(32)[:, :20] for each in (one, other, one + other)]
    codes = [sinkhorn(each, epsilon=0.05, rounds=3) for each in scores[:2]]
    swapped = theirs.SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)(scores[:2], scores[2:])
    assert swapped_prediction(scores, codes, temperature=0.1).item() == pytest.approx(swapped.item(), abs=1e-4)


def test_info_nce_ignores_scale_and_the_order_of_the_batch():  # L12
    query, key = pair()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    loss = symmetric_info_nce(query, key, temperature=0.2)
    assert symmetric_info_nce(query[order] * 3, key[order] * 0.1, temperature=0.2).item() == pytest.approx(loss.item())


class Logits(TorchFunctionMode):
    """What is given to a softmax meanwhile, kept with its gradient."""

    def __init__(self):
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.cross_entropy, Tensor.log_softmax):
            args[0].retain_grad()
            self.kept.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "queue_info_nce", "sup_con"])
def test_gradient_of_logits_sums_to_zero_in_each_row(name):  # L13
    mine, _, options = PAIR_LOSSES[name]
    one, other = (each.double().requires_grad_() for each in pair())
    with Logits() as seen:
        loss = mine(one, other, **options)
    loss.backward()
    (logits,) = seen.kept
    assert logits.grad is not None
    assert logits.grad.abs().sum(dim=1).min() > 1e-3
    assert logits.grad.sum(dim=1).abs().max() < 1e-12


def test_info_nce_is_computed_in_float32_under_autocast():
    query, key = pair(32, 64)
    exact = symmetric_info_nce(query, key, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(symmetric_info_nce(query, key, temperature=0.1), exact)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_masked_mse_matches_the_printed_formula(norm_pix, dtype, error):  # L12
    generator = torch.Generator().manual_seed(0)
    target, predicted = torch.randn(2, 2, 5, 12, generator=generator).to(dtype)
    hidden = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    rows = hidden.nonzero()[:, 1].view(2, 3)
    index = rows[:, :, None].expand(-1, -1, 12)
    mine = masked_mse(predicted.gather(1, index), target.gather(1, index), norm_pix=norm_pix)
    assert mine.dtype == dtype
    assert mine.item() == pytest.approx(textbook.masked_mse(predicted, target, hidden, norm_pix=norm_pix), rel=error)
    turned = masked_mse(predicted.gather(1, index).flip(0), target.gather(1, index).flip(0), norm_pix=norm_pix)
    assert turned.item() == pytest.approx(mine.item(), rel=error)


@pytest.mark.parametrize(("values", "expected"), [(768, 0.998698), (192, 0.994792), (48, 0.979167)])
def test_predicting_zero_under_norm_pix_scores_just_below_one(values, expected):  # L9
    patches = torch.randn(64, 9, values, generator=torch.Generator().manual_seed(0))
    assert masked_mse(torch.zeros_like(patches), patches, norm_pix=True).item() == pytest.approx(expected, abs=2e-6)


def test_a_constant_patch_has_target_zero_and_a_finite_gradient():  # L10
    patches = torch.full((1, 2, 48), 0.7)
    assert normalise_patches(patches).abs().max() == 0
    predicted = torch.zeros(1, 2, 48, requires_grad=True)
    masked_mse(predicted, patches, norm_pix=True).backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()


def test_projector_norms_each_call_by_itself_and_ends_without_scale():
    head = Projector(8, 16, 4)
    out = head(torch.randn(64, 8) * 5 + 3)
    assert out.mean(dim=0).abs().max() < 1e-5
    assert out.std(dim=0, unbiased=False).tolist() == pytest.approx([1.0] * 4, abs=1e-3)
    assert [name for name, _ in head.named_parameters()] == [
        "layers.0.weight", "layers.1.weight", "layers.1.bias", "layers.3.weight",
    ]  # fmt: skip
    layer = Projector(8, 16, 4, norm="layer")(torch.randn(3, 8))
    assert layer.mean(dim=1).abs().max() < 1e-5


def test_a_head_has_a_bias_where_no_norm_takes_it_away():
    def shapes(head: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {name.removeprefix("layers."): tuple(each.shape) for name, each in head.named_parameters()}

    deep = shapes(Projector(8, 16, 4, depth=3))  # MoCo v3
    assert [name for name in deep if name.endswith("weight") and len(deep[name]) == 2] == [
        "0.weight", "3.weight", "6.weight"
    ]  # fmt: skip
    assert deep["3.weight"] == (16, 16)
    assert not {"0.bias", "3.bias", "6.bias"} & deep.keys()
    bare = shapes(Projector(8, 16, 4, "none"))  # MoCo v2
    assert bare == {"0.weight": (16, 8), "0.bias": (16,), "3.weight": (4, 16), "3.bias": (4,)}
    byol = shapes(Projector(8, 16, 4, last_norm=False))
    assert "0.bias" not in byol
    assert byol["3.bias"] == (4,)
    assert shapes(Predictor(4, 16))["3.weight"] == (4, 16)


def test_pair_health_tells_a_perfect_a_random_and_a_collapsed_encoder_apart():
    eye = torch.eye(16)
    perfect = pair_health(eye, eye * 3)
    assert [perfect[name].item() for name in ("pair_accuracy", "pair_cosine", "other_cosine")] == [1, 1, 0]
    collapsed = pair_health(torch.ones(16, 8), torch.ones(16, 8))
    assert collapsed["pair_accuracy"].item() == pytest.approx(1 / 16)
    assert collapsed["spread"].item() == pytest.approx(0, abs=1e-6)
    label = torch.arange(16) // 4
    shared = pair_health(eye, eye.roll(1, 0), label)
    assert shared["pair_accuracy"].item() == 12 / 16  # each finds its neighbour, and every fourth has a stranger there
    assert pair_health(eye, eye, torch.zeros(16))["other_cosine"] == 0


def test_spread_is_one_for_noise_and_zero_for_a_collapse():
    noise = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert feature_spread(noise).item() == pytest.approx(1, abs=0.02)
    assert feature_spread(torch.ones(16, 64)).item() == pytest.approx(0, abs=1e-6)


def test_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 24, generator=generator)
    line = torch.randn(40, 1, generator=generator) * one  # embeddings that differ, along one direction only
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(40, 24)).item() == pytest.approx(1)
    rows, columns = (torch.linalg.qr(torch.randn(size, 6, generator=generator)).Q for size in (40, 24))
    for values in (torch.full((6,), 3.0), torch.tensor([8.0, 4, 2, 1, 1, 0])):
        shares = [value / values.sum().item() for value in values.tolist() if value]
        expected = math.exp(-sum(share * math.log(share) for share in shares))
        assert effective_rank(rows * values @ columns.T).item() == pytest.approx(expected, rel=1e-4)
    assert effective_rank(rows.T).item() == pytest.approx(6, rel=1e-5)
    # What a norm over the batch hides: a spread of one, along one direction.
    normed = torch.nn.functional.batch_norm(torch.outer(one, other), None, None, training=True)
    assert feature_spread(normed).item() > 0.8
    assert effective_rank(normed).item() == pytest.approx(1, abs=0.01)
