"""SelfCon: an exit of the network in place of a second view, and a trunk that does without it afterwards."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.exits import Exit, exit_health
from model.losses import nt_xent
from model.network import Network
from model.objectives.selfcon import SelfCon
from model.objectives.supcon import SupCon
from model.shape import Shape
from model.vit import Encoder, build_encoder, patch_mean
from pipeline.errors import UsageError
from pipeline.sampling import View
from pipeline.views import Patches
from tests import textbook
from tests.conftest import SMALL
from tests.networks import COUNTED, LABEL, counted_macs, overfit, views_of
from tests.test_can import exact
from tests.test_model import view
from tests.test_pretrain import flags
from tests.test_step import CPU, batch_of, small_run, stepper_of
from train import evaluate, folder
from train.evaluation import exits, probes
from train.evaluation.exam import Exam
from train.presets import VIT_B, open_preset
from train.pretrain import main

DEEP = replace(SMALL, depth=4)
SMALL_SELFCON = SelfCon(head_out=16)
OWN, PAIRS = torch.arange(16), torch.arange(16) // 2  # a class for each image; eight of two


class Constant(nn.Module):
    """In place of an exit: features that come from elsewhere."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features

    def forward(self, tokens: Tensor) -> Tensor:
        return self.features


def loss_of(network: Network, views: dict[str, Patches], label: Tensor) -> float:
    return network(views, label).terms["contrast"].item()


def embeddings(network: Network, views: dict[str, Patches]) -> tuple[Tensor, Tensor]:
    """(B, D) of exit and trunk, by hand."""
    encoder, parts = network.encoder, network.parts
    tokens = encoder.embed(views["whole"])
    tokens = torch.cat([encoder.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    early = tokens
    for place, block in enumerate(encoder.blocks):
        tokens = block(tokens)
        early = tokens if place == len(encoder.blocks) // 2 - 1 else early
    name = f"exit{len(encoder.blocks) // 2}"
    return parts[f"{name}_projector"](parts[name](early)), parts["projector"](patch_mean(encoder.norm(tokens)))


# --- the encoder's side exit ------------------------------------------------------------------------------------------


def test_the_encoder_gives_out_tokens_half_way_for_each_view_and_the_same_codes():
    encoder = Encoder(side=32, patch=8, width=32, depth=3, heads=2)
    views = [view(3, 4, 8, True), view(3, 4, 8, False, 1), view(3, 2, 8, False, 2)]
    codes = encoder(*views)
    found = encoder(*views, after=(1, 2))
    assert len(found) == 9
    assert all(torch.equal(mine, code) for mine, code in zip(found, codes, strict=False))
    for after in (1, 2):
        short = Encoder(side=32, patch=8, width=32, depth=after, heads=2)
        short.load_state_dict(encoder.state_dict(), strict=False)
        short.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        for place, each in enumerate(views):
            assert torch.allclose(found[3 * after + place], short(each)[0], atol=1e-5)


@pytest.mark.parametrize(("size", "depth", "own"), [
    ("fc", 12, 0), ("small", 12, 3), ("same", 12, 6), ("small", 6, 1), ("small", 2, 1), ("same", 2, 1),
])  # fmt: skip
def test_the_exit_has_as_many_blocks_of_its_own_as_its_size_says(size, depth, own):
    assert SelfCon(size=size).exit_depths(depth) == {depth // 2: own}
    exit_part = SelfCon(size=size).parts(replace(SMALL, depth=depth))[f"exit{depth // 2}"]
    assert len(exit_part.blocks) == own
    assert isinstance(exit_part.proj, nn.Linear) == (size == "fc")
    assert SelfCon(size="same", exit_after=(3, 9)).exit_depths(12) == {3: 9, 9: 3}


def test_fc_is_a_norm_a_mean_and_a_linear_layer():
    tokens = torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(0))
    part = Exit(32, 2, 0)
    normal = nn.functional.layer_norm(tokens, (32,), eps=1e-6)
    expected = normal[:, 1:].mean(dim=1) @ part.proj.weight.T
    assert torch.allclose(part(tokens), expected, atol=1e-5)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["fc", "small", "same"])
def test_the_loss_is_supcons_over_exit_and_trunk(size):
    network = Network(replace(SMALL_SELFCON, size=size), DEEP, 0).double()
    views = exact(views_of(SMALL_SELFCON))
    both = torch.stack(embeddings(network, views)).detach()
    for label in (PAIRS, OWN % 5):
        expected = textbook.sup_con(both, label, temperature=0.1)
        assert loss_of(network, views, label) == pytest.approx(expected, rel=1e-10)


def test_an_exit_that_is_the_trunk_is_its_own_positive_at_cosine_one():  # T-E1
    network = Network(replace(SMALL_SELFCON, size="same"), DEEP, 0).double()
    exit_part, encoder, views = network.parts["exit2"], network.encoder, exact(views_of(SMALL_SELFCON))
    exit_part.blocks.load_state_dict(encoder.blocks[2:].state_dict())
    exit_part.norm.load_state_dict(encoder.norm.state_dict())
    network.parts["exit2_projector"].load_state_dict(network.parts["projector"].state_dict())
    outcome = network(views, OWN)
    assert outcome.watched["agreement"].item() == pytest.approx(1, abs=1e-6)
    _, late = embeddings(network, views)
    unit = nn.functional.normalize(late.detach(), dim=1)
    cosine = (unit @ unit.T).tolist()
    expected = [
        math.log(1 + sum(2 * math.exp((cosine[i][j] - 1) / 0.1) for j in range(16) if j != i)) for i in range(16)
    ]
    assert outcome.terms["contrast"].item() == pytest.approx(sum(expected) / 16, rel=1e-6)


def test_with_a_second_view_for_an_exit_it_is_supcon():  # T-E2
    supcon = SupCon(head_hidden=32, head_out=16)
    theirs, views = Network(supcon, SMALL, 0), views_of(supcon)
    mine = Network(SMALL_SELFCON, SMALL, 0)
    for name in ("projector", "exit1_projector"):
        mine.parts[name].load_state_dict(theirs.parts["projector"].state_dict())
    mine.parts["exit1"] = Constant(patch_mean(theirs.encoder(views["other"])[0]).detach())
    expected = theirs(views, PAIRS).terms["contrast"].item()
    assert loss_of(mine, {"whole": views["one"]}, PAIRS) == pytest.approx(expected, rel=1e-6)


def test_labels_count_by_who_shares_them_and_without_any_shared_it_is_nt_xent():  # T-E3, T-E4
    network, views = Network(SMALL_SELFCON, SMALL, 0), views_of(SMALL_SELFCON)
    expected = nt_xent(*embeddings(network, views), temperature=0.1).item()
    assert loss_of(network, views, OWN) == pytest.approx(expected, rel=1e-6)
    names = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert loss_of(network, views, names[PAIRS]) == loss_of(network, views, PAIRS) != loss_of(network, views, OWN)


def test_several_exits_are_as_many_views_more():
    method = replace(SMALL_SELFCON, exit_after=(1, 3))
    network, views = Network(method, DEEP, 0).double(), exact(views_of(SMALL_SELFCON))
    trunk, first, second = network.objective.exits(network, views["whole"]).values()
    heads = ("exit1_projector", "exit3_projector", "projector")
    rows = [network.parts[head](each) for head, each in zip(heads, (first, second, trunk), strict=True)]
    expected = textbook.sup_con(torch.stack(rows).detach(), PAIRS, temperature=0.1)
    assert loss_of(network, views, PAIRS) == pytest.approx(expected, rel=1e-10)
    with torch.no_grad():
        for name in ("exit1", "exit3"):  # all that is made of an image is one and the same
            for linear in (network.parts[f"{name}_projector"], network.parts["projector"]):
                linear.layers[-2].weight.zero_()
                linear.layers[-2].bias.fill_(1)
    assert loss_of(network, views, OWN) == pytest.approx(math.log(3 * 16 - 1), rel=1e-6)  # L6, V = 3


def test_without_labels_only_an_images_own_exits_are_alike():
    alone = replace(SMALL_SELFCON, use_labels=False)
    network, views = Network(alone, SMALL, 0), views_of(alone)
    expected = nt_xent(*embeddings(network, views), temperature=0.1).item()
    for label in (LABEL, PAIRS):  # none that is known, or some that are not looked at
        outcome = network(views, label)
        assert outcome.terms["contrast"].item() == pytest.approx(expected, rel=1e-6)
        assert "exit_accuracy" not in outcome.watched
    assert (alone.supervised, SMALL_SELFCON.supervised) == (False, True)


# --- trunk and exit ---------------------------------------------------------------------------------------------------


def test_without_its_exit_the_trunk_is_the_same_to_the_bit():  # T-E5
    run = small_run(SMALL_SELFCON)
    stepper = stepper_of(run)
    stepper(batch_of(run), 1e-3)
    network, whole = stepper.network, views_of(SMALL_SELFCON)["whole"]
    weights = {name: each for name, each in network.state_dict().items() if name.startswith("encoder.")}
    bare = build_encoder(SMALL)
    bare.load_state_dict({name.removeprefix("encoder."): each for name, each in weights.items()})
    code, _ = network.encoder(whole, after=(1,))
    assert torch.equal(bare(whole)[0], code)


def test_the_exit_trains_what_is_in_front_of_it_and_the_trunk_everything():  # T-E6
    network, views = Network(SMALL_SELFCON, DEEP, 0), views_of(SMALL_SELFCON)
    _, tapped = network.encoder(views["whole"], after=(2,))
    network.parts["exit2"](tapped).square().sum().backward()
    for place, block in enumerate(network.encoder.blocks):
        assert all((each.grad is not None) == (place < 2) for each in block.parameters())
    assert network.encoder.norm.weight.grad is None
    network.zero_grad()
    network(views, PAIRS).terms["contrast"].backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_trunk_that_copies_its_exit_is_seen():
    label, eye = torch.arange(16) // 4, torch.eye(16)
    classes = eye[label * 4] + 0.1 * eye
    told, copied = exit_health(eye[None], classes, label), exit_health(classes[None], classes * 3, label)
    assert told["trunk_accuracy"] == 1
    assert told["exit_accuracy"] < 0.5
    assert told["agreement"] < 0.5
    assert {name: each.item() for name, each in copied.items()} == pytest.approx(
        {"exit_accuracy": 1, "trunk_accuracy": 1, "agreement": 1}
    )
    nobody = exit_health(eye[None], eye, torch.arange(16))
    assert nobody["trunk_accuracy"] == 0
    both = exit_health(torch.stack([eye, classes]), classes, label)
    for name, each in both.items():
        assert each.item() == pytest.approx((told[name] + copied[name]).item() / 2, abs=1e-6)


def test_sixty_steps_on_one_batch_halve_the_loss_of_an_encoder_that_knows_nothing():
    """Thirty are too few: heads that are not shared start apart, at three times the loss of a collapsed encoder."""
    last = overfit(Network(SMALL_SELFCON, SMALL, 0), views_of(SMALL_SELFCON), 60, PAIRS)[-1]
    assert last["contrast"] < math.log(31) / 2
    assert {"pair_accuracy", "pair_cosine", "other_cosine", "spread"} <= last.keys()
    assert min(last[name] for name in ("exit_accuracy", "trunk_accuracy")) > 0.5


# --- the table --------------------------------------------------------------------------------------------------------


def test_view_and_presets_are_the_papers_and_the_specified_ones():
    whole = View(side=224, area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2)
    assert SelfCon().views(Shape()) == {"whole": whole}
    published, small, tiny = (open_preset(f"selfcon-{size}") for size in ("vitb16-in1k-800", "vits16", "tiny"))
    assert published.method == SelfCon(drop_path=0.1)
    assert (published.optim.batch, published.optim.peak_lr(), published.optim.weight_decay) == (2048, 2e-3, 0.05)
    # 5e-4 per 256 images, 2e-3 at most.
    of_batch = [replace(published.optim, batch=batch).peak_lr() for batch in (512, 1024, 4096)]
    assert of_batch == pytest.approx([1e-3, 2e-3, 2e-3])
    assert replace(published.optim, lr=3e-3).peak_lr() == 3e-3
    assert small.method == tiny.method == SelfCon(head_hidden=512)
    assert small.optim.lr == tiny.optim.lr == 5e-4
    for run in (published, small, tiny):
        run.check()


@pytest.mark.parametrize(("more", "words"), [
    (["--model.depth", "1"], r"--method\.exit-after 0 of an encoder of 1 blocks \(--model\.depth\)"),
    (["--method.exit-after", "2"], r"--method\.exit-after 2 of an encoder of 2 blocks"),
    (["--method.exit-after", "1", "1"], r"--method\.exit-after 1 1 of .* several come in rising order"),
    (["--method.no-use-labels", "--method.label", "kind"], r"--method\.label kind is a column that"),
    (["--method.size", "large"], "--method.size"),
])  # fmt: skip
def test_an_exit_that_fits_no_encoder_is_refused_before_anything_is_made(store_path, tmp_path, more, words):
    with pytest.raises(UsageError, match=words):
        main([*flags("selfcon-tiny", store_path, tmp_path / "run", "--steps", "2"), *more])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "gmac"), [("fc", 17.56), ("small", 21.9), ("same", 26.3)])
def test_formula_counts_what_torch_multiplies(size, gmac):
    method, shape = replace(SMALL_SELFCON, size=size, exit_after=(1, 2)), replace(COUNTED, depth=4)
    assert counted_macs(method, shape, LABEL[:8]) == pytest.approx(method.macs(shape), rel=0.01)
    assert SelfCon(size=size).macs(VIT_B) / 1e9 == pytest.approx(gmac, rel=0.002)


def test_exits_trunk_and_their_ensemble_are_scored(store_path, tmp_path, capsys):
    """The ensemble answers by the mean of the classifiers' softmaxes, redone here from the features."""
    exits_at = ["--model.depth", "3", "--method.exit-after", "1", "2"]
    assert main(flags("selfcon-tiny", store_path, tmp_path / "a", "--steps", "3", *exits_at)) == 0
    capsys.readouterr()
    asked = [str(tmp_path / "a"), "--protocols", "logistic", "--exits", "--no-baselines", "--no-cache", "--json"]
    assert evaluate.main([*asked, "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    (found,) = result["exits"].values()
    assert set(found) == {"trunk", "exit1", "exit2", "ensemble"}
    count = found["trunk"]["count"]
    # The same features and probe as --protocols logistic, but for float16 in between: a picture at most.
    assert found["trunk"]["value"] == pytest.approx(result["leading"]["value"], abs=1.01 / count)

    settings, sitting = folder.run_settings(tmp_path / "a"), Exam.prepare(store_path, (), "class")
    network = Network(settings.method, settings.model, settings.seed)
    network.load_state_dict(folder.chosen_checkpoint(tmp_path / "a", None).scored())
    (ids, label), (asked_ids, truth) = sitting.training("class"), sitting.questions("held-out", "class")
    bank, query = (exits._features(network, settings, sitting.bank, each, CPU) for each in (ids, asked_ids))
    assert not torch.equal(query["exit1"], query["trunk"])
    parts = ("trunk", "exit1", "exit2")
    answers = [probes.logistic(bank[part], label, query[part], classes=4).shares for part in parts]
    right = (torch.stack(answers).mean(dim=0).argmax(dim=1) == truth).double().mean().item()
    assert found["ensemble"]["value"] == pytest.approx(right)


def test_exits_are_asked_of_a_method_that_has_some(store_path, tmp_path):
    assert main(flags("mae-tiny", store_path, tmp_path / "a", "--steps", "1")) == 0
    with pytest.raises(UsageError, match="--exits: method mae has none"):
        evaluate.main([str(tmp_path / "a"), "--exits"])
