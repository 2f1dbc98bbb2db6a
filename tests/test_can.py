"""CAN: two masked, noisy views; what each of three losses sees, and that they are those of the paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.decoder import NoiseLevel
from model.network import Network
from model.objectives.can import CAN
from model.objectives.mae import MAE
from model.objectives.simclr import SimCLR
from model.shape import Shape
from pipeline.errors import UsageError
from pipeline.sampling import View, noise_levels
from pipeline.views import Patches, take
from tests import textbook
from tests.conftest import SMALL
from tests.networks import COUNTED, LABEL, counted_macs, gradients, overfit, views_of
from train.presets import VIT_B, VIT_L, open_preset

SMALL_CAN = CAN(head_out=16)
PAIR = ("one", "other")


def exact(views: dict[str, Patches]) -> dict[str, Patches]:
    """For a network in float64."""
    return {name: replace(view, pixels=view.pixels.double()) for name, view in views.items()}


def without_level(network: Network) -> Network:
    """The MLP that tells the decoder the noise's deviation says nothing."""
    with torch.no_grad():
        for parameter in network.parts["noise_level"].parameters():
            parameter.zero_()
    return network


def test_views_are_the_papers():
    view = View(
        side=224, area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5, mask_ratio=0.5, noise=0.05
    )  # fmt: skip
    assert CAN().views(Shape()) == {"one": view, "other": view}
    views = views_of(CAN())
    assert views["one"].tokens == 8
    assert not torch.equal(views["one"].keep, views["other"].keep)


@pytest.mark.parametrize(("largest", "expected"), [(0.05, 8.333e-4), (0.1, 3.333e-3)])
def test_predicting_no_noise_costs_a_third_of_its_largest_variance(largest, expected):  # T-C1
    levels = noise_levels(largest, "one", 0, 0, np.arange(200_000))
    assert np.square(levels).mean() == pytest.approx(expected, rel=0.01)
    network, views = Network(CAN(noise=largest), SMALL, 0), views_of(CAN(noise=largest))
    with torch.no_grad():
        for parameter in network.parts["decoder"].pred.parameters():
            parameter.zero_()
    sigma = torch.cat([views[name].sigma for name in PAIR])
    error = network(views, LABEL).watched["noise_error"].item()
    assert error == pytest.approx(sigma.square().mean().item(), rel=0.05)
    for name in PAIR:
        ids = np.arange(16)
        assert views[name].sigma.numpy() == pytest.approx(noise_levels(largest, name, 0, 0, ids), rel=1e-6)


def test_without_noise_its_target_is_zero_and_the_others_are_maes():  # T-C2, T-C4
    objective = CAN(contrast_weight=0.0, noise_weight=0.0, noise=0.0)
    views = views_of(objective)
    assert all(views[name].noise.abs().max() == 0 for name in PAIR)
    mae, can = Network(MAE(mask_ratio=0.5, norm_pix=False), SMALL, 0), without_level(Network(objective, SMALL, 0))
    decoder = {name: weight for name, weight in mae.state_dict().items() if name.startswith("parts.decoder")}
    can.load_state_dict(decoder, strict=False)
    mine = can(views, LABEL)
    theirs = sum(mae({"holed": views[name]}, LABEL).terms["reconstruct"] for name in PAIR) / 2
    loss = torch.stack(list(mine.terms.values())).sum()
    assert mine.watched["repaint_error"].item() == pytest.approx(theirs.item(), rel=1e-5)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert mine.watched["noise_error"] > 0
    expected, found = gradients(mae, theirs), gradients(can, loss)
    assert expected.keys() <= found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


class Free(nn.Module):
    """In place of a decoder: predictions that are parameters, of every patch of each view in turn."""

    def __init__(self, *shape: int):
        super().__init__()
        self.all = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        self.pred, self.calls = nn.Identity(), 0

    def forward(self, code: Tensor, view: Patches, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mine = self.all[self.calls]
        self.calls += 1
        return take(mine, hidden), torch.cat([mine[:, :1] * 0, view.kept(mine), take(mine, hidden)], dim=1)


def test_each_patch_is_judged_by_its_pixels_or_by_its_noise():  # T-C3
    network, views = Network(SMALL_CAN, SMALL, 0), views_of(SMALL_CAN)
    free = network.parts["decoder"] = Free(2, 16, 16, 192)
    terms = network(views, LABEL).terms
    touched = {}
    for name in ("noise", "reconstruct"):
        (gradient,) = torch.autograd.grad(terms[name], free.all, retain_graph=True)
        touched[name] = (gradient != 0).any(dim=-1)
    for place, name in enumerate(PAIR):
        hidden = torch.zeros(16, 16, dtype=torch.bool).scatter(1, views[name].hidden, True)
        assert torch.equal(touched["reconstruct"][place], hidden)
        assert torch.equal(touched["noise"][place], ~hidden)


def test_the_loss_is_the_papers():
    objective = CAN(head_out=16, contrast_weight=0.2, noise_weight=0.4, noise=0.5)
    network, views = Network(objective, SMALL, 0).double(), exact(views_of(objective))
    free = network.parts["decoder"] = Free(2, 16, 16, 192).double()
    z = [network.parts["projector"](code.mean(dim=1)).detach() for code in network.encoder(*views.values())]
    parts = [
        (predicted.detach(), view.pixels, view.noise, torch.zeros(16, 16, dtype=torch.bool).scatter(1, view.hidden, 1))
        for predicted, view in zip(free.all, (views[name] for name in PAIR), strict=True)
    ]
    expected = textbook.can((z[0], z[1]), parts, temperature=0.1, contrast_weight=0.2, noise_weight=0.4)
    terms = network(views, LABEL).terms
    assert torch.stack(list(terms.values())).sum().item() == pytest.approx(expected, rel=1e-10)


def test_hidden_patches_are_repainted_clean_or_as_the_code_has_it_noisy():
    views = views_of(SMALL_CAN)
    moved = {name: replace(view, noise=view.noise.clone()) for name, view in views.items()}
    for view in moved.values():
        view.noise.scatter_add_(1, view.hidden[:, :, None].expand(-1, -1, 192), torch.ones(16, 8, 192))
    for target, same in (("clean", True), ("noisy", False)):
        network = Network(replace(SMALL_CAN, rec_target=target), SMALL, 0)
        one, other = (network(each, LABEL).terms for each in (views, moved))
        assert torch.equal(one["noise"], other["noise"])  # what is hidden has no noise to be told
        assert torch.equal(one["reconstruct"], other["reconstruct"]) is same


def test_normalised_pixels_leave_the_noise_raw():
    views, found = views_of(SMALL_CAN), []
    for norm_pix in (False, True):
        network = Network(replace(SMALL_CAN, norm_pix=norm_pix), SMALL, 0)
        found.append(network(views, LABEL).terms)
    assert torch.equal(found[0]["noise"], found[1]["noise"])
    assert not torch.equal(found[0]["reconstruct"], found[1]["reconstruct"])


def test_nothing_is_changed_in_place():  # T-C5
    views = views_of(SMALL_CAN)
    before = {name: (view.pixels.clone(), view.noise.clone()) for name, view in views.items()}
    Network(SMALL_CAN, SMALL, 0)(views, LABEL).terms["noise"].backward()
    for name, view in views.items():
        assert torch.equal(view.pixels, before[name][0])
        assert torch.equal(view.noise, before[name][1])


def test_the_decoder_is_told_the_noises_deviation_in_every_token():
    sigma = torch.tensor([0.0, 0.013, 0.05])
    level = NoiseLevel(32, 128).double()
    seen = []
    level.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert level(sigma).shape == (3, 1, 32)
    expected = torch.tensor([textbook.noise_level(each, width=128) for each in sigma.tolist()], dtype=torch.float64)
    assert torch.allclose(seen[0], expected, atol=1e-6)
    network, view = Network(SMALL_CAN, SMALL, 0), views_of(SMALL_CAN)["one"]
    told = network.objective.code(network, view)
    (code,) = network.encoder(view)
    assert torch.allclose(told - code, network.parts["noise_level"](view.sigma).expand_as(code), atol=1e-6)
    given = []
    network.parts["decoder"].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    network(views_of(SMALL_CAN), LABEL)
    assert torch.allclose(given[0], told, atol=1e-5)


def test_thirty_steps_on_one_batch_lower_the_loss_by_a_fifth():
    rows = overfit(Network(SMALL_CAN, SMALL, 0), views_of(SMALL_CAN), 30)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["repaint_error"] < rows[0]["repaint_error"]
    assert rows[-1]["nt_xent"] < rows[0]["nt_xent"]
    assert rows[-1]["pair_cosine"] > rows[-1]["other_cosine"]


def test_options_that_do_not_fit_are_refused():
    for wrong in ({"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"noise": -0.1}):
        with pytest.raises(UsageError, match=r"--method\.mask-ratio lies between 0 and 1, and --method\.noise is at"):
            CAN(**wrong).check(16)
    for wrong in ({"contrast_weight": 1.1}, {"noise_weight": -0.1}):
        with pytest.raises(UsageError, match="are shares, from 0 to 1"):
            CAN(**wrong).check(16)


def test_presets_are_the_published_recipe_and_smaller_ones():
    published, small, tiny = (open_preset(f"can-{size}") for size in ("vitb16-in1k-800", "vits16", "tiny"))
    assert published.method == CAN()
    assert (published.optim.betas, published.optim.weight_decay) == ((0.9, 0.95), 0.05)
    assert published.optim.peak_lr() == pytest.approx(2.5e-4 * 1024 / 256)
    assert small.optim.lr == tiny.optim.lr == 1e-3
    for run in (published, small, tiny):
        run.check()


def test_formula_counts_what_torch_multiplies():
    assert counted_macs(SMALL_CAN, COUNTED, LABEL[:8]) == pytest.approx(SMALL_CAN.macs(COUNTED), rel=0.01)
    # Two times 99 tokens in the encoder and 197 in the decoder; hidden patches are not embedded.
    assert CAN().macs(VIT_B) / 1e9 == pytest.approx(28.19 - 2 * 98 * 768**2 / 1e9, rel=0.001)
    # The paper has SimCLR at 70 % more for ViT-L; of a ViT-B the decoder is a larger part.
    assert SimCLR().macs(VIT_L) / CAN().macs(VIT_L) == pytest.approx(1.71, abs=0.01)
    simclr, can = (open_preset(f"{name}-vitl16") for name in ("simclr", "can"))
    assert simclr.method.macs(simclr.model) / can.method.macs(can.model) == pytest.approx(1.71, abs=0.01)
    assert SimCLR().macs(VIT_B) / CAN().macs(VIT_B) == pytest.approx(1.25, abs=0.01)
