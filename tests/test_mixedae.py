"""MixedAE: pictures are mixed and taken apart, patches attend to the nearest keys, and learn to find their kind."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from model.attention import among_largest, attend_by_products, attend_top
from model.heads import feature_spread
from model.losses import homologous_contrast
from model.mixing import mix_pictures, recognised, sources, unmix
from model.network import Network
from model.objectives.mixedae import MixedAE
from pipeline.errors import UsageError
from pipeline.sampling import View
from pipeline.views import Patches, check_views, draw_mask, group_size, make_views, take
from tests import textbook
from tests.conftest import SMALL
from tests.networks import COUNTED, LABEL, batch, counted_macs, overfit, views_of
from tests.test_pretrain import flags, weights
from tests.test_step import batch_of, small_run, stepper_of
from train.config import Optim, Run
from train.data import check_data
from train.optim import parameter_groups
from train.presets import VIT_B
from train.pretrain import main


def masked(count: int, grid: int, group: int, values: int = 6) -> Patches:
    pixels = torch.randn(count, grid**2, values, generator=torch.Generator().manual_seed(0))
    return Patches(pixels, grid, *draw_mask(torch.arange(count) * 7, grid**2, grid**2 // group, 3, group))


def test_every_cell_belongs_to_one_of_four_and_each_has_49():  # T-X1
    view = masked(8, 14, 4)
    assert view.keep is not None
    assert view.hidden is not None
    assert view.keep.shape == (8, 49)
    assert torch.equal(view.keep.reshape(2, 196).sort(dim=1).values, torch.arange(196).expand(2, 196))
    assert torch.equal(torch.cat([view.keep, view.hidden], 1).sort(1).values, torch.arange(196).expand(8, 196))
    # The first of the hidden ones are a random part of them: they are another sample's, in that one's order.
    assert torch.equal(view.hidden[0, :49], view.keep[1])
    assert torch.equal(view.hidden[3, :49], view.keep[0])


def test_mixed_and_taken_apart_each_picture_has_its_own_patches_and_places():  # T-X1
    view = masked(8, 14, 4)
    mixed = mix_pictures(view, 4)
    assert mixed.pixels.shape == (2, 196, 6)
    assert view.keep is not None
    assert mixed.keep is not None
    for sample in range(8):
        cells = view.keep[sample]
        assert torch.equal(mixed.pixels[sample // 4, cells], view.pixels[sample, cells])
    tokens = torch.cat([torch.arange(2.0).view(2, 1, 1).expand(2, 1, 6), mixed.visible()], dim=1)
    apart = unmix(tokens, 4)
    assert torch.equal(apart[:, 1:], view.visible())
    assert apart[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(unmix(torch.cat([mixed.keep[:, :1], mixed.keep], 1)[:, :, None], 4)[:, 1:, 0], view.keep)


def test_a_groups_order_depends_on_its_own_members_and_their_order_alone():
    ids, other = torch.arange(8), torch.tensor([0, 1, 2, 3, 7, 6, 5, 4])
    keep, swapped = (draw_mask(each, 16, 4, 3, 4)[0] for each in (ids, other))
    assert torch.equal(keep[:4], swapped[:4])
    assert not torch.equal(keep[4:], swapped[4:])
    assert torch.equal(torch.cat([draw_mask(part, 16, 4, 3, 4)[0] for part in ids.split(4)]), keep)
    many = draw_mask(torch.arange(8000), 16, 4, 3, 4)[0].reshape(2000, 4, 4)
    for sample in range(4):
        share = torch.bincount(many[:, sample].flatten(), minlength=16).double() / 2000
        assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_attention_has_exactly_k_keys_and_all_of_them_are_plain_attention():  # T-X2
    query, key = torch.randn(2, 2, 3, 17, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    eye = torch.eye(17).expand(2, 3, 17, 17)
    matrix, kept = attend_top(query, key, eye, 4)
    assert torch.equal(matrix > 0, kept)
    assert kept[:, :, 1:].sum(dim=-1).unique().tolist() == [4]
    assert kept[:, :, 0].all()  # the class token looks at everything
    assert torch.allclose(matrix.sum(dim=-1), torch.ones(2, 3, 17), atol=1e-6)
    logits = query @ key.transpose(-2, -1)
    assert (logits.masked_fill(~kept, math.inf).amin(-1) >= logits.masked_fill(kept, -math.inf).amax(-1)).all()
    value = torch.randn(2, 3, 17, 8)
    assert torch.allclose(attend_top(query, key, value, 17)[0], attend_by_products(query, key, value), atol=1e-6)
    ties, _ = attend_top(torch.zeros(1, 1, 17, 8), torch.zeros(1, 1, 17, 8), eye[:1, :1], 4)
    assert (ties[:, :, 1:] > 0).sum(dim=-1).unique().tolist() == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_are_those_of_topk(dtype):
    values = torch.randn(3, 2, 40, 50, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for k in (1, 12, 50):
        top = values.topk(k, dim=-1).indices
        assert torch.equal(among_largest(values, k), torch.zeros_like(values, dtype=torch.bool).scatter_(-1, top, True))
    values[0, 0, 0, :7] = float("nan")  # a run that has failed is stopped by its gradient, not here
    assert (among_largest(values, 12).sum(dim=-1) == 12).all()


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_attention_to_the_top_keys_and_its_gradients_are_the_formulas(dtype, apart):
    """Beside autograd in float64 on the same numbers and the same keys."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, 20, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(2, 3, 20, 8, generator=generator).to(dtype)
    out, kept = attend_top(*given, 5)
    out.backward(grad)
    query, key, value = (each.detach().double().requires_grad_() for each in given)
    logits = query @ key.transpose(-2, -1) * 8**-0.5
    expected = torch.softmax(logits.masked_fill(~kept, -torch.inf), dim=-1) @ value
    expected.backward(grad.double())
    assert (out.double() - expected).norm() <= apart * expected.norm()
    for mine, theirs in zip(given, (query, key, value), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).norm() <= apart * theirs.grad.norm()


def test_the_keys_are_chosen_in_float32_whatever_autocast_says():
    query, key, value = torch.randn(3, 2, 2, 33, 16, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(0)
    expected = attend_top(query.float(), key.float(), value.float(), 8)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, kept = attend_top(query, key, value, 8)
    assert out.dtype == torch.bfloat16
    assert torch.equal(kept, expected)


def test_equal_tokens_score_log_of_the_others():  # T-X3
    same = torch.ones(2, 196, 8)
    loss = homologous_contrast(same, sources(196, 4, same.device), temperature=0.25)
    assert loss.item() == pytest.approx(math.log(195), abs=1e-5)


@pytest.mark.parametrize(("count", "least"), [(196, 3.88588), (16, 1.11774)])
def test_tokens_that_are_told_apart_at_best_lie_at_the_corners_of_a_tetrahedron(count, least):
    """Own ones at a cosine of 1, all others at -1 / 3: ln(k - 1 + (n - k) exp(-(1 + 1 / 3) / tau)), k = n / 4."""
    source, corners = sources(count, 4, torch.device("cpu")), torch.eye(4) - 0.25
    loss = homologous_contrast(corners[source][None], source, temperature=0.25)
    assert loss.item() == pytest.approx(least, abs=1e-5)


def test_each_token_has_48_of_its_kind():  # T-X4
    source = sources(196, 4, torch.device("cpu"))
    label = source[:, None] == source[None, :]
    assert label.shape == (196, 196)
    assert torch.equal(label, label.T)
    assert label.sum(dim=1).unique().tolist() == [49]
    assert label.fill_diagonal_(False).sum(dim=1).unique().tolist() == [48]


@pytest.mark.parametrize("group", [1, 2, 4])  # T-X5: with a group of one every other token is a positive
def test_homologous_contrast_matches_the_printed_formula(group):  # L12
    tokens = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    source = sources(8, group, tokens.device)
    expected = sum(textbook.homologous_contrast(each, source.tolist(), temperature=0.25) for each in tokens) / 2
    assert homologous_contrast(tokens, source, temperature=0.25).item() == pytest.approx(expected, abs=1e-5)
    for batch_of_two in (tokens.double(), tokens.double().flip(0)):
        exact = homologous_contrast(batch_of_two, source, temperature=0.25)
        assert exact.dtype == torch.float64
        assert exact.item() == pytest.approx(expected, abs=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        half = homologous_contrast(3 * tokens, source, temperature=0.25)
    assert half.item() == pytest.approx(expected, abs=1e-5)


def test_recognition_is_a_quarter_by_chance_and_one_at_best():  # T-X6
    source = sources(196, 4, torch.device("cpu"))
    chance = torch.rand(4, 3, 197, 197, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(4, 3, 197, 197, dtype=torch.bool).scatter_(-1, chance.topk(49).indices, True)
    assert recognised(kept, source).item() == pytest.approx(0.25, abs=0.005)
    best = torch.zeros(1, 1, 197, 197, dtype=torch.bool)
    best[..., 1:, 1:] = source[:, None] == source[None, :]
    best[:, :, 0] = True
    assert recognised(best, source).item() == 1


def test_what_a_picture_hides_is_a_target_and_never_an_input():
    network, view = Network(MixedAE(), SMALL, 0).eval(), views_of(MixedAE())["mixed"]
    assert view.hidden is not None
    changed = view.pixels.scatter(1, view.hidden[:, :, None].expand(-1, -1, view.pixels.shape[-1]), 5.0)
    other = replace(view, pixels=changed)
    first, second = (network.objective.code(network, each) for each in (view, other))
    assert torch.equal(first, second)
    one, two = (network({"mixed": each}, LABEL).terms["reconstruct"] for each in (view, other))
    assert one.item() != pytest.approx(two.item(), rel=1e-3)


def test_tokens_carry_their_own_cell_and_their_place_in_the_group(monkeypatch):
    network, view = Network(MixedAE(), SMALL, 0), views_of(MixedAE())["mixed"]
    seen = []
    monkeypatch.setattr(network.encoder, "encode", lambda tokens, *_: seen.append(tokens) or [tokens.repeat(1, 2, 1)])
    with pytest.raises(RuntimeError):  # nothing attended
        network.objective.code(network, view)
    marks = network.parts["segments"].segment_token
    expected = network.encoder.embed(view).view(4, 4, 4, 32) + marks[None, :, None]
    assert torch.allclose(seen[0], expected.view(4, 16, 32), atol=1e-6)


def test_terms_are_the_papers_and_mixing_leaves_other_groups_alone():
    objective = MixedAE(homologous_weight=0.5)
    network, view = Network(objective, SMALL, 0), views_of(objective)["mixed"]
    whole = network({"mixed": view}, LABEL)
    assert list(whole.terms) == ["reconstruct", "homologous"]
    assert whole.terms["homologous"].item() == pytest.approx(0.5 * whole.watched["homologous_contrast"].item())
    parts = [
        network({"mixed": Patches(view.pixels[at], 4, view.keep[at], view.hidden[at])}, LABEL)
        for at in (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16))
        if view.keep is not None and view.hidden is not None
    ]
    for name, term in whole.terms.items():
        assert sum(part.terms[name] for part in parts).item() / 4 == pytest.approx(term.item(), rel=1e-5)
    # Decoded as MAE does: each source from its own tokens and the class token of its mixed picture.
    code = network.objective.code(network, view)
    predicted, _ = network.parts["decoder"](code, view, view.hidden)
    target = take(view.pixels, view.hidden)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert whole.terms["reconstruct"].item() == pytest.approx((predicted - target).square().mean().item(), rel=1e-4)


def test_features_are_of_each_picture_and_a_collapse_of_them_is_told():
    objective = MixedAE()
    network, view = Network(objective, SMALL, 0), views_of(objective)["mixed"]
    outcome, (code, _) = network({"mixed": view}, LABEL), objective._encode(network, view)
    # Four tokens of each of a mixed picture's four sources, one source behind the other.
    own = torch.stack([code[sample // 4, 1 + sample % 4 * 4 :][:4].mean(dim=0) for sample in range(16)])
    assert outcome.features is not None
    assert not outcome.features.requires_grad
    assert torch.allclose(outcome.features, own, atol=1e-6)
    assert outcome.watched["spread"].item() == pytest.approx(feature_spread(own).item(), rel=1e-5)
    with torch.no_grad():  # whatever comes in, the bias goes out
        network.encoder.norm.weight.zero_()
        network.encoder.norm.bias.fill_(1)
    collapsed = network({"mixed": view}, LABEL).watched
    said = objective.alarm({name: value.item() for name, value in collapsed.items()})
    assert "nearly one and the same (spread 0.000;" in str(said)


def test_recognition_is_measured_in_the_encoder():  # T-X6
    network, view = Network(MixedAE(), SMALL, 0), views_of(MixedAE())["mixed"]
    before = network({"mixed": view}, LABEL).watched["recognition"]
    with torch.no_grad():  # tokens that know where they come from, and attention that looks for its like
        network.parts["segments"].segment_token.copy_(20 * torch.eye(4, 32))
        network.encoder.blocks[0].attn.qkv.weight.copy_(torch.eye(32).repeat(3, 1))
    after = network({"mixed": view}, LABEL).watched["recognition"]
    assert before.item() == pytest.approx(0.25, abs=0.1)
    assert after > before + 0.3


def test_thirty_steps_on_one_batch_lower_the_loss_by_a_fifth_and_patches_find_their_kind():  # T-X6
    objective = MixedAE(homologous_weight=1.0)
    declared = objective.views(SMALL)
    pictures = batch(views=declared)
    # Each has a colour of its own: patches that have nothing in common are told apart by their marks alone.
    colour = 255 * torch.rand(16, 1, 1, 3, generator=torch.Generator().manual_seed(1))
    images = {"mixed": (0.7 * colour + 0.3 * pictures.images["mixed"]).to(torch.uint8)}
    views = make_views(replace(pictures, images=images), declared, patch=SMALL.patch, seed=0)
    rows = overfit(Network(objective, SMALL, 0), views, 30)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert sum(row["recognition"] for row in rows[-10:]) / 10 > rows[0]["recognition"] + 0.05


def test_at_its_published_weight_the_contrast_makes_tokens_of_a_picture_alike():
    """From 3.3, above the 2.7 of equal tokens, towards the 1.12 that is the least there is. Attention need not follow:
    on one batch the segments say who belongs to whom, and reconstruction learns the pictures by heart."""
    assert MixedAE() == MixedAE(homologous_weight=0.1)
    first, *_, last = overfit(Network(MixedAE(), SMALL, 0), views_of(MixedAE()), 70)
    assert first["homologous_contrast"] > math.log(15)
    assert last["homologous_contrast"] < 1.5


def test_recomputed_activations_choose_the_same_keys():
    pictures, found = batch_of(small_run(MixedAE())), []
    for recompute in (False, True):
        stepper = stepper_of(small_run(MixedAE(), recompute=recompute))
        stepper(pictures, 1e-3)
        found.append(stepper.norm.item())
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_segments_are_not_decayed_and_the_encoder_has_no_new_parameters():
    network = Network(MixedAE(), SMALL, 0)
    (plain, _), _ = parameter_groups(network, Optim())
    assert any(network.parts["segments"].segment_token is each for each in plain["params"])
    names = {name for name, _ in network.encoder.named_parameters()}
    assert names == {name for name, _ in Network(MixedAE(group=2), SMALL, 0).encoder.named_parameters()}
    assert not any("segment" in name for name in names)


@pytest.mark.parametrize(
    ("ranks", "accumulate", "words"),
    [(1, 1, ""), (3, 2, ""), (4, 1, r"--batch 24 in 4 parts .* makes parts of 6 images, and --method\.group 4 wants"),
     (1, 4, r"--batch 24 in 4 parts \(processes times --accum-iter\)"), (5, 1, "cannot be shared out evenly among 5")],
)  # fmt: skip
def test_a_batch_that_no_whole_groups_make_is_refused(ranks, accumulate, words):
    run = Run(objective="mixedae", method=MixedAE(), model=SMALL, optim=Optim(batch=24, accumulate=accumulate))
    store = SimpleNamespace(count=96, per_epoch=96, root="store")
    if not words:
        check_data(run, store, ranks)  # pyright: ignore[reportArgumentType]
        return
    with pytest.raises(UsageError, match=words):
        check_data(run, store, ranks)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_decodes_nothing_or_more_than_there_is_is_refused(share):
    with pytest.raises(UsageError, match=f"--method.decoded-share {share:g}: a share above 0, at most 1"):
        MixedAE(decoded_share=share).check(16)


def test_groups_that_fit_no_grid_or_no_batch_are_refused():
    with pytest.raises(UsageError, match="16 patches cannot be shared out evenly in a group of 3"):
        check_views(MixedAE(group=3).views(SMALL), SMALL.patch)
    for group in (1, 9):
        with pytest.raises(UsageError, match=f"--method.group {group}: at least 2 pictures"):
            MixedAE(group=group).views(SMALL)
    declared = MixedAE().views(SMALL)
    with pytest.raises(UsageError, match="view mixed: 6 images cannot be cut into groups of 4"):
        make_views(batch(6, views=declared), declared, patch=8, seed=0)
    assert group_size({"one": View(side=8, group=4), "two": View(side=8, group=6), "three": View(side=8)}) == 12


def test_formula_counts_what_torch_multiplies():
    objective = MixedAE()
    assert counted_macs(objective, COUNTED, LABEL[:8]) == pytest.approx(objective.macs(COUNTED), rel=0.01)
    # 17.56 / 4 of the encoder and 5.27 of the decoder, whose visible patches are not predicted: 1.01 x MAE.
    assert objective.macs(VIT_B) / 1e9 == pytest.approx(9.66 + 0.09, abs=0.05)


def test_a_run_resumes_to_the_bit_and_draws_its_pictures(store_path, tmp_path):
    def command(name: str, *more: str) -> list[str]:
        return flags("mixedae-tiny", store_path, tmp_path / name, "--steps", "5", *more)

    assert main(command("whole")) == 0
    assert main(command("parts", "--limit-steps", "3")) == 0
    assert main(command("parts")) == 0
    whole, parts = (weights(tmp_path / name, 5) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / "whole" / "media" / "gallery.png").exists()
