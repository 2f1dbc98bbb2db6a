"""MAE and DAAE as specified: what each term sees, where its gradient goes, and that both learn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.network import Network
from model.objectives import OBJECTIVES
from model.objectives.clsa import CLSA
from model.objectives.daae import DAAE
from model.objectives.mae import MAE, reconstruction
from pipeline.errors import UsageError
from tests.conftest import SMALL
from tests.networks import COUNTED, LABEL, counted_macs, gradients, overfit, views_of
from train.config import Optim
from train.optim import parameter_groups
from train.presets import AUGMENTATION_ROWS, PRESETS


def test_daae_shows_the_encoder_equally_many_tokens_of_both_views():  # T-D3
    large = dataclasses.replace(SMALL, side=224, patch=16)
    views = DAAE().views(large)
    assert views["small"].side == 112
    assert views["holed"].jitter == (0, 0, 0, 0)
    for shape, tokens in ((SMALL, 4), (large, 49)):  # (224 / 16)^2 (1 - 0.75) = (112 / 16)^2 = 49
        made = views_of(DAAE(), count=2, shape=shape)
        assert made["holed"].tokens == made["small"].tokens == tokens


def test_without_contrast_daae_is_mae():  # T-D4
    views = views_of(DAAE())
    mae, daae = Network(MAE(), SMALL, 0), Network(DAAE(contrast_weight=0.0), SMALL, 0)
    decoder = {name: weight for name, weight in mae.state_dict().items() if name.startswith("parts.decoder")}
    daae.load_state_dict(decoder, strict=False)
    theirs, mine = mae({"holed": views["holed"]}, LABEL), daae(views, LABEL)
    assert mine.terms["reconstruct"].item() == pytest.approx(theirs.terms["reconstruct"].item(), rel=1e-5)
    assert mine.watched["info_nce"] > 0
    expected = gradients(mae, theirs.terms["reconstruct"])
    for name, gradient in gradients(daae, sum(mine.terms.values())).items():
        if name in expected:
            assert torch.allclose(gradient, expected[name], atol=1e-6), name
        else:
            assert gradient.abs().max() == 0, name


def test_the_small_view_does_not_know_the_mask():  # T-D2
    one, other = views_of(DAAE(), mask_seed=0), views_of(DAAE(), mask_seed=1)
    network = Network(DAAE(), SMALL, 0).eval()
    assert one["holed"].keep is not None
    assert other["holed"].keep is not None
    assert not torch.equal(one["holed"].keep, other["holed"].keep)
    first, second = (network.encoder(view, one["small"])[1] for view in (one["holed"], other["holed"]))
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("options", [{"target": "stop"}, {"target": "ema"}, {"feature": "asym_pred"}])
def test_no_gradient_through_the_small_view_where_it_is_cut(options):  # T-D5
    views = views_of(DAAE(**options))
    views["small"].pixels.requires_grad_()
    network = Network(DAAE(**options), SMALL, 0)
    network(views, LABEL).terms["contrast"].backward()
    assert views["small"].pixels.grad is None
    assert network.encoder.cls_token.grad is not None
    both = views_of(DAAE())
    both["small"].pixels.requires_grad_()
    Network(DAAE(), SMALL, 0)(both, LABEL).terms["contrast"].backward()
    assert both["small"].pixels.grad is not None
    assert both["small"].pixels.grad.abs().max() > 0


def test_ema_target_starts_equal_follows_and_leaks_nothing():
    objective = DAAE(target="ema", momentum=0.9)
    network = Network(objective, SMALL, 0)
    copy = network.parts["momentum_encoder"]
    before = {name: weight.clone() for name, weight in network.encoder.named_parameters()}
    for (name, mine), theirs in zip(copy.named_parameters(), network.encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    with torch.no_grad():
        network.encoder.cls_token.add_(1.0)
    objective.after_step(network, 0.5)
    moved = dict(copy.named_parameters())["module.cls_token"]
    assert torch.allclose(moved, before["cls_token"] + 0.1, atol=1e-6)
    trained = {id(p) for group in parameter_groups(network, Optim())[0] for p in group["params"]}
    assert not any(id(p) in trained for p in copy.parameters())


def test_asym_reads_the_decoder_and_trains_it_by_contrast():
    network = Network(DAAE(feature="asym"), SMALL, 0)
    network(views_of(DAAE()), LABEL).terms["contrast"].backward()
    grad = network.parts["decoder"].embed.weight.grad
    assert grad is not None
    assert grad.abs().max() > 0
    symmetric = Network(DAAE(), SMALL, 0)
    symmetric(views_of(DAAE()), LABEL).terms["contrast"].backward()
    assert symmetric.parts["decoder"].embed.weight.grad is None


def test_contrastive_only_has_no_decoder():
    network = Network(DAAE(reconstruct_weight=0.0), SMALL, 0)
    assert "decoder" not in network.parts
    assert list(network(views_of(DAAE()), LABEL).terms) == ["contrast"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_seed_gives_every_method_the_same_encoder_unless_it_says_otherwise(name):
    """Scores of the untrained encoder are handed from one arm of a comparison to the next by this."""
    objective = OBJECTIVES[name]()
    one, other = (Network(each, SMALL, 0).encoder.state_dict() for each in (MAE(), objective))
    assert all(torch.equal(one[key], other[key]) for key in one) is not objective.own_start


def test_shares_that_leave_nothing_to_do_are_refused():
    for objective, words in (
        (MAE(mask_ratio=0.0), r"--method.mask-ratio 0: lies between 0 and 1"),
        (MAE(mask_ratio=1.0), r"--method.mask-ratio 1: lies"),
        (DAAE(mask_ratio=-0.5), r"--method.mask-ratio -0.5: lies"),
        (MAE(decoded_share=0.0), r"--method.decoded-share 0: a share above 0, at most 1"),
        (DAAE(decoded_share=1.5), r"--method.decoded-share 1.5: a share"),
        (DAAE(reconstruct_weight=0.0, feature="asym"), r"--method.reconstruct-weight 0 leaves none"),
        (DAAE(feature="asym", target="stop"), r"--method.target stop: the small view's head is trained by nothing"),
        (DAAE(feature="asym", target="ema"), r"--method.target ema: the small view's head"),
    ):
        with pytest.raises(UsageError, match=words):
            objective.check(16)


def test_without_a_decoder_nothing_need_be_hidden():
    objective = DAAE(reconstruct_weight=0.0, mask_ratio=0.0)
    objective.check(16)
    terms = Network(objective, SMALL, 0)(views_of(objective), LABEL).terms
    assert list(terms) == ["contrast"]
    assert terms["contrast"].isfinite()


def test_a_masked_patch_is_a_target_and_never_an_input():  # T-M4, L11
    objective = MAE()
    view = views_of(objective)["holed"]
    network = Network(objective, SMALL, 0).eval()
    (code,) = network.encoder(view)
    assert view.hidden is not None
    changed = view.pixels.clone()
    index = view.hidden[:, :, None].expand(-1, -1, changed.shape[-1])
    changed.scatter_(1, index, 5.0)
    other = dataclasses.replace(view, pixels=changed)
    assert torch.equal(network.encoder(other)[0], code)
    loss, moved = (network({"holed": each}, LABEL).terms["reconstruct"] for each in (view, other))
    assert loss.item() != pytest.approx(moved.item(), rel=1e-3)


def test_decoding_half_scores_a_random_half_and_estimates_the_same_loss():
    view = views_of(MAE())
    network = Network(MAE(), SMALL, 0).eval()
    half = Network(MAE(decoded_share=0.5), SMALL, 0).eval()
    assert view["holed"].hidden is not None
    assert view["holed"].hidden.shape[1] == 12
    full_loss, half_loss = network(view, LABEL).terms["reconstruct"], half(view, LABEL).terms["reconstruct"]
    assert half_loss.item() == pytest.approx(full_loss.item(), rel=0.1)
    assert half_loss.item() != full_loss.item()
    assert MAE(decoded_share=0.5).macs(SMALL) < MAE().macs(SMALL)


def test_repainting_some_of_the_images_scores_these_alone():
    half, whole = DAAE(repainted=0.5, head_hidden=32, head_out=16), DAAE(head_hidden=32, head_out=16)
    network, views = Network(whole, SMALL, 0), views_of(whole)
    code, _ = network.encoder(views["holed"], views["small"])
    expected = reconstruction(network, code[:8], views["holed"].first(8), 1.0, True)
    assert len(views["holed"].first(8).hidden) == 8
    found = half.loss(network, views, LABEL).terms
    plain = whole.loss(network, views, LABEL).terms
    assert found["reconstruct"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["reconstruct"].item() != plain["reconstruct"].item()
    assert torch.equal(found["contrast"], plain["contrast"])
    for wrong, said in (
        ({"repainted": 0.0}, "a share above 0"),
        ({"repainted": 0.5, "feature": "asym"}, "of every image"),
    ):
        with pytest.raises(UsageError, match=said):
            DAAE(**wrong).check(16)


@pytest.mark.parametrize("repainted", [1.0, 0.5])
def test_formula_counts_what_torch_multiplies(repainted):  # MAE's: tests/test_model.py
    method = DAAE(head_hidden=32, head_out=16, repainted=repainted)
    assert counted_macs(method, COUNTED, LABEL[:8]) == pytest.approx(method.macs(COUNTED), rel=0.01)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_terms_are_finite_and_every_trained_part_gets_a_gradient(name):
    # Three sevenths of 32 pixels are no whole patches.
    objective = CLSA(strong=(0.5,)) if name == "clsa" else OBJECTIVES[name]()
    network = Network(objective, SMALL, 0)
    outcome = network(views_of(objective), LABEL)
    sum(outcome.terms.values()).backward()
    assert all(torch.isfinite(term) for term in outcome.terms.values())
    assert (outcome.features is None) == (name == "mae")  # which compares no images
    if outcome.features is not None:
        assert outcome.features.shape == (16, SMALL.width)
        assert not outcome.features.requires_grad
        assert not torch.equal(outcome.features[0], outcome.features[1])
    for parameter_name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize(
    ("objective", "factor"),
    [(MAE(), 0.8), (DAAE(), 0.8), (DAAE(reconstruct_weight=0.0, contrast_weight=1.0), 0.5)],
)
def test_forty_steps_on_one_batch_lower_the_loss(objective, factor):
    rows = overfit(Network(objective, SMALL, 0), views_of(objective), 40)
    assert rows[-1]["loss"] < factor * rows[0]["loss"]


def test_weight_decay_spares_vectors_and_tokens_and_every_parameter_is_in_one_group():
    network = Network(DAAE(), SMALL, 0)
    (plain, decayed), matrices = parameter_groups(network, Optim())
    assert matrices == []
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert plain["lr_scale"] == decayed["lr_scale"] == 1
    names = {id(p): n for n, p in network.named_parameters()}
    free = {names[id(p)] for p in plain["params"]}
    assert {"encoder.cls_token", "parts.decoder.mask_token", "encoder.norm.weight"} <= free
    assert all(n in free for n, p in network.named_parameters() if p.ndim == 1)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_slides_augmentation_rows_are_presets():
    rows = {name: PRESETS[f"daae-tiny-{name}"]().method for name in AUGMENTATION_ROWS}
    assert rows["resize"].share_crop
    assert rows["crop"].area == (0.2, 1.0)
    assert rows["crop"].jitter == (0, 0, 0, 0)
    assert rows["colour"].gray == 0.2
    assert rows["crop08"].area == (0.08, 1.0)
