"""Each loss against its printed formula, and the numbers that it must have at its extremes."""

from __future__ import annotations

import math

import pytest
import torch

from model.heads import Projector, feature_spread
from model.losses import info_nce, masked_mse, normalise_patches, symmetric_info_nce
from tests import textbook


def pair(batch: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = torch.randn(2, batch, width, generator=torch.Generator().manual_seed(0))
    return one, other


def test_info_nce_matches_the_printed_formula():
    query, key = pair()
    assert info_nce(query, key, temperature=0.1).item() == pytest.approx(
        textbook.info_nce(query, key, temperature=0.1), abs=1e-5
    )
    both = textbook.info_nce(query, key, temperature=0.2) + textbook.info_nce(key, query, temperature=0.2)
    assert symmetric_info_nce(query, key, temperature=0.2).item() == pytest.approx(both / 2, abs=1e-5)


def test_a_collapsed_encoder_scores_log_batch():  # L1
    same = torch.ones(32, 8)
    assert info_nce(same, same, temperature=0.1).item() == pytest.approx(math.log(32), abs=1e-5)
    assert symmetric_info_nce(same, same, temperature=0.1).item() == pytest.approx(math.log(32), abs=1e-5)


def test_a_perfect_encoder_scores_what_orthogonal_pairs_score():
    eye = torch.eye(16)
    assert info_nce(eye, eye, temperature=0.1).item() == pytest.approx(math.log(1 + 15 * math.exp(-10)), rel=1e-3)


def test_info_nce_ignores_scale_and_the_order_of_the_batch():  # L12
    query, key = pair()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    loss = symmetric_info_nce(query, key, temperature=0.2)
    assert symmetric_info_nce(query[order] * 3, key[order] * 0.1, temperature=0.2).item() == pytest.approx(loss.item())


def test_gradient_of_logits_sums_to_zero_in_each_row():  # L13
    logits = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, torch.arange(5)).backward()
    assert logits.grad is not None
    assert logits.grad.sum(dim=1).abs().max() < 1e-12


def test_info_nce_is_computed_in_float32_under_autocast():
    query, key = pair(32, 64)
    exact = symmetric_info_nce(query, key, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(symmetric_info_nce(query, key, temperature=0.1), exact)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_masked_mse_matches_the_printed_formula(norm_pix):
    generator = torch.Generator().manual_seed(0)
    target, predicted = torch.randn(2, 2, 5, 12, generator=generator)
    hidden = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    rows = hidden.nonzero()[:, 1].view(2, 3)
    index = rows[:, :, None].expand(-1, -1, 12)
    mine = masked_mse(predicted.gather(1, index), target.gather(1, index), norm_pix=norm_pix)
    assert mine.item() == pytest.approx(textbook.masked_mse(predicted, target, hidden, norm_pix=norm_pix), rel=1e-5)


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


def test_spread_is_one_for_noise_and_zero_for_a_collapse():
    noise = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert feature_spread(noise).item() == pytest.approx(1, abs=0.02)
    assert feature_spread(torch.ones(16, 64)).item() == pytest.approx(0, abs=1e-6)
