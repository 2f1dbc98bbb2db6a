"""SwAV: codes that share a batch out evenly, prototypes and queue that follow their rules, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.heads import Projector, Prototypes, feature_spread, prototype_use
from model.losses import sinkhorn, swapped_prediction
from model.network import Network
from model.objectives.daae import DAAE
from model.objectives.selfcon import SelfCon
from model.objectives.swav import CODED, SwAV
from model.vit import patch_mean
from pipeline.errors import UsageError
from pipeline.sampling import View, branch_scales
from pipeline.views import make_views
from tests import textbook
from tests.conftest import SMALL
from tests.networks import COUNTED, LABEL, batch, counted_macs, overfit, views_of
from tests.test_pretrain import flags, moments, weights
from tests.test_step import CPU, batch_of, small_run, stepper_of
from train import checkpoint
from train.config import Optim
from train.json_files import read_rows
from train.presets import TINY, VIT_B, open_preset
from train.pretrain import main
from train.schedule import weight_decay
from train.step import Stepper

SMALL_SWAV = SwAV(prototypes=24, head_hidden=32, head_out=16, local_views=2, freeze_steps=0)


def uniform_scores(rows: int = 512, columns: int = 64) -> Tensor:
    return torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_each_code_sums_to_one():  # T-S1
    codes = sinkhorn(uniform_scores().float(), epsilon=0.05, rounds=3)
    assert (codes.sum(dim=1) - 1).abs().max() < 1e-6
    assert codes.min() >= 0


@pytest.mark.parametrize(("rounds", "least", "most"), [(3, 0.01, 0.1), (100, 0.0, 1e-9)])
def test_prototypes_get_equal_shares_the_more_rounds_the_nearer(rounds, least, most):  # T-S2
    codes = sinkhorn(uniform_scores(), epsilon=0.05, rounds=rounds)
    error = (codes.sum(dim=0) / (512 / 64) - 1).abs().max()
    assert least <= error < most


def test_codes_match_the_printed_algorithm():
    scores = uniform_scores(12, 5)
    assert torch.allclose(
        sinkhorn(scores, epsilon=0.05, rounds=3), textbook.sinkhorn(scores, epsilon=0.05, rounds=3), atol=1e-10
    )


def test_constant_scores_tell_nothing():  # T-S3
    codes = sinkhorn(torch.full((16, 64), 0.3), epsilon=0.05, rounds=3)
    assert torch.allclose(codes, torch.full((16, 64), 1 / 64))
    loss = swapped_prediction([torch.full((16, 64), 0.3)] * 4, [codes] * 2, temperature=0.1)
    assert loss.item() == pytest.approx(math.log(64), rel=1e-6)


def test_codes_follow_the_order_of_prototypes_and_of_images():  # T-S6
    scores, codes = uniform_scores(), sinkhorn(uniform_scores(), epsilon=0.05, rounds=3)
    for dim, count in ((1, 64), (0, 512)):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        moved = sinkhorn(scores.index_select(dim, order), epsilon=0.05, rounds=3)
        assert torch.allclose(moved, codes.index_select(dim, order), atol=1e-12)


def test_sinkhorn_neither_overflows_nor_rounds_to_half_precision():
    scores = uniform_scores().float()
    codes = sinkhorn(scores, epsilon=0.05, rounds=3)
    assert torch.allclose(sinkhorn(scores + 100, epsilon=0.05, rounds=3), codes, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn(scores, epsilon=0.05, rounds=3), codes)
    # What nothing is near to is left empty instead of 0 / 0.
    far = torch.where(torch.arange(512)[:, None] == 7, -1.0, scores)
    assert torch.isfinite(sinkhorn(torch.cat([far, far[:, :1] * 0 - 1], 1), epsilon=0.005, rounds=3)).all()


def test_swapped_prediction_matches_the_printed_formula():
    scores = [uniform_scores(6, 5) * sign for sign in (1, 0.5, -1, 0.1)]
    codes = [sinkhorn(each, epsilon=0.05, rounds=3) for each in scores[:2]]
    expected = textbook.swapped_prediction(scores, codes, temperature=0.1)
    assert swapped_prediction(scores, codes, temperature=0.1).item() == pytest.approx(expected, rel=1e-10)


def test_no_gradient_flows_into_codes():  # T-S4
    views = views_of(SMALL_SWAV)
    network = Network(SMALL_SWAV, SMALL, 0)
    kept: list[Tensor] = []

    def keep(_, __, scores: Tensor) -> None:
        scores.retain_grad()
        kept.append(scores)

    network.parts["prototypes"].register_forward_hook(keep)
    network(views, LABEL).terms["swapped"].backward()
    assert len(kept) == 4
    codes = [sinkhorn(each, epsilon=0.05, rounds=3) for each in kept[:2]]
    for place, scores in enumerate(kept):
        # Of the cross-entropy alone: as if codes were given. 2 codes, 3 other views each, 16 images.
        targets = sum(code for other, code in enumerate(codes) if other != place)
        predicted = torch.softmax(scores.detach() / 0.1, dim=1) * (2 if place > 1 else 1)
        assert torch.allclose(scores.grad, (predicted - targets) / 0.1 / 16 / 6, atol=1e-6)


def test_views_are_two_of_full_size_and_small_ones_of_whole_patches():
    views = SwAV().views(replace(SMALL, side=224, patch=16))
    assert [(name, view.side) for name, view in views.items()] == [
        ("global0", 224), ("global1", 224), *((f"local{number}", 96) for number in range(6)),
    ]  # fmt: skip
    assert views["global1"].area == (0.14, 1.0)
    assert views["local5"].area == (0.05, 0.14)
    assert views["local0"].blur == 0.5
    assert SwAV(local_side=0.5).views(TINY)["local0"].side == 32
    assert SwAV(local_views=0).views(SMALL).keys() == set(CODED)


def test_eight_views_of_two_sizes_are_two_calls_and_each_is_as_it_is_alone(monkeypatch):
    objective = replace(SMALL_SWAV, local_views=6)
    views = views_of(objective)
    network = Network(objective, SMALL, 0).eval()
    alone = [network.encoder(view)[0] for view in views.values()]
    called, encode = [], network.encoder.encode
    monkeypatch.setattr(
        network.encoder, "encode", lambda tokens, *how: called.append(tokens.shape) or encode(tokens, *how)
    )
    mixed_up = [views[name] for name in ("local0", "global0", "local1", "global1", "local2")]
    codes = network.encoder(*views.values())
    assert called == [(32, 16, 32), (96, 4, 32)]
    for one, other in zip(codes, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert [len(code[0]) for code in network.encoder(*mixed_up)] == [5, 17, 5, 17, 5]


@pytest.mark.parametrize("method", [SwAV(drop_path=0.5), SelfCon(drop_path=0.5)])
def test_blocks_are_left_out_in_training_as_sampling_says(method):
    views = views_of(method)
    for name, each in views.items():
        expected = branch_scales(0.5, SMALL.depth, f"drop path {name}", 0, 0, np.arange(16))
        assert each.branches is not None
        assert np.array_equal(each.branches.numpy(), expected)
    assert all(each.branches is None for each in views_of(replace(method, drop_path=0.0)).values())
    with pytest.raises(UsageError, match=r"--method\.drop-path 1: a chance"):
        replace(method, drop_path=1.0).check(4096)


def test_the_published_recipe_is_dinos():
    run = open_preset("swav-vits16-in1k-300")
    run.check()
    assert run.method == SwAV(drop_path=0.1)
    assert (run.optim.peak_lr(), run.optim.clip_grad) == (pytest.approx(5e-4 * 16), 3.0)
    assert (run.optim.weight_decay, run.optim.weight_decay_end) == (0.04, 0.4)


def test_prototypes_are_unit_before_each_step_and_stay_where_they_are_while_frozen():  # T-S5
    run = small_run(replace(SMALL_SWAV, freeze_steps=2))
    stepper, pictures = stepper_of(run), batch_of(run)
    prototypes = stepper.network.parts["prototypes"]
    start = prototypes.prototypes.detach().clone()
    seen = []
    prototypes.register_forward_pre_hook(lambda *_: seen.append(prototypes.prototypes.detach().norm(dim=1)))
    for step in range(4):
        stepper(pictures, 1e-2, (step / 4, (step + 1) / 4))
        moved = (prototypes.prototypes.detach() - start).abs().max()
        assert moved < 1e-6 if step < 2 else moved > 1e-3
        # The first free step is AdamW's first: frozen ones must not shrink its correction of young moments.
        counted = stepper.optimizer.state.get(prototypes.prototypes, {}).get("step", torch.zeros(()))
        assert counted.item() == max(0, step - 1)
    assert all(torch.allclose(norm, torch.ones(24), atol=1e-6) for norm in seen)
    assert stepper.refused.read() == (0, 0)


def test_the_queue_joins_late_and_holds_the_newest_embeddings_of_its_view():
    method = replace(SMALL_SWAV, queue=48, queue_from=0.5, freeze_steps=2)
    run = small_run(method)
    stepper, pictures = stepper_of(run), batch_of(run)
    network = stepper.network
    made = []
    network.parts["projector"].register_forward_hook(lambda _, __, out: made.append(out.detach()))
    # Not before its share of the run, nor while the prototypes are frozen.
    for step, (done, queued) in enumerate(((0.5, False), (0.9, False), (0.49, False), (0.5, True))):
        made.clear()
        stepper(pictures, 0.0, (done, done))
        assert network.parts["prototypes"].queued is queued
        for view, name in enumerate(CODED):
            rows = network.parts[f"queue_{name}"].rows
            unit = torch.nn.functional.normalize(made[view], dim=1)
            assert any(torch.allclose(rows.roll(-at, 0)[:16], unit, atol=1e-6) for at in range(48))
            assert rows.norm(dim=1).count_nonzero() == min(48, 16 * (step + 1))
    network.eval()
    views = make_views(pictures, method.views(SMALL), patch=SMALL.patch, seed=run.seed)
    with torch.no_grad():
        prototypes, project = network.parts["prototypes"], network.parts["projector"]
        scores = [prototypes(project(patch_mean(each))) for each in network.encoder(*views.values())]
        earlier = [network.parts[f"queue_{name}"].rows @ prototypes.prototypes.T for name in CODED]
    joint = [torch.cat(pair) for pair in zip(earlier, scores, strict=False)]
    codes = [textbook.sinkhorn(each, epsilon=0.05, rounds=3)[48:] for each in joint]
    expected = textbook.swapped_prediction(scores, codes, temperature=0.1)
    assert network(views, LABEL).terms["swapped"].item() == pytest.approx(expected, rel=1e-4)
    # One row that no embedding has taken yet, and the batch is shared out by itself.
    for name in CODED:
        network.parts[f"queue_{name}"].rows[7] = 0
    codes = [textbook.sinkhorn(each, epsilon=0.05, rounds=3) for each in scores[:2]]
    by_itself = textbook.swapped_prediction(scores, codes, temperature=0.1)
    assert network(views, LABEL).terms["swapped"].item() == pytest.approx(by_itself, rel=1e-5)
    assert by_itself != pytest.approx(expected, rel=1e-4)


def test_a_step_after_a_checkpoint_is_the_step_without_one():
    run = small_run(replace(SMALL_SWAV, queue=32, queue_from=0.3, freeze_steps=2))
    pictures = [batch_of(run, seed) for seed in range(4)]

    def go_on(stepper: Stepper, steps: range) -> Stepper:
        for step in steps:
            stepper(pictures[step], 1e-2, (step / 4, (step + 1) / 4))
        return stepper

    whole = go_on(stepper_of(run), range(4))
    before = go_on(stepper_of(run), range(3))
    after = Stepper(run, CPU)
    after.taken = before.taken
    after.network.load_state_dict({name: value.clone() for name, value in before.network.state_dict().items()})
    moments = checkpoint.optimizer_tensors(before.network, before.optimizer)
    checkpoint.load_optimizer(after.network, after.optimizer, {name: each.clone() for name, each in moments.items()})
    after.prepare()
    go_on(after, range(3, 4))
    state = after.network.state_dict()
    assert {"parts.queue_global0.rows", "parts.queue_global1.oldest"} <= state.keys()
    assert all(torch.equal(value, state[name]) for name, value in whole.network.state_dict().items())


def test_thirty_steps_on_one_batch_lower_the_loss_below_half_of_uniform():
    objective = replace(SMALL_SWAV, prototypes=16, jitter=(0.0,) * 4, gray=0.0)
    declared, pictures = objective.views(SMALL), batch(views={"global0": objective.views(SMALL)["global0"]})
    images = {  # the same picture in every view
        name: pictures.images["global0"][:, :: 32 // view.side, :: 32 // view.side] for name, view in declared.items()
    }
    views = make_views(replace(pictures, images=images), declared, patch=8, seed=0)
    first, *_, last = overfit(Network(objective, SMALL, 0), views, 30)
    assert last["of_uniform"] < 0.5 < first["of_uniform"]
    assert last["spread"] > 0.5
    assert last["prototype_use"] > 0.5


def test_the_known_failure_is_seen_in_the_metrics():
    """Embeddings that say nothing: the loss stays at ln K, codes are uniform, and all images lie at one prototype."""
    network = Network(SMALL_SWAV, SMALL, 0)
    with torch.no_grad():
        for parameter in network.parts["projector"].layers[-1].parameters():
            parameter.zero_()
    outcome = network(views_of(SMALL_SWAV), LABEL)
    assert outcome.terms["swapped"].item() == pytest.approx(math.log(24), rel=1e-5)
    watched = {name: value.item() for name, value in outcome.watched.items()}
    assert watched["of_uniform"] == pytest.approx(1, rel=1e-5)
    assert watched["code_entropy"] == pytest.approx(math.log(24), rel=1e-5)
    assert watched["prototype_use"] == pytest.approx(1 / 24, rel=1e-5)
    assert watched["spread"] == 0
    assert feature_spread(torch.randn(512, 16)) > 0.9


def test_prototype_use_counts_where_images_lie():
    assert prototype_use(torch.eye(24)).item() == pytest.approx(1, rel=1e-6)
    assert prototype_use(torch.eye(24)[:12]).item() == pytest.approx(0.5, rel=1e-6)
    assert prototype_use(torch.eye(24)[:1].expand(9, -1)).item() == pytest.approx(1 / 24, rel=1e-6)


def test_a_batch_below_the_prototypes_is_warned_of():
    assert SwAV().warnings(4096) == []
    assert "256 images at once are few for 3,000 prototypes" in SwAV().warnings(256)[0]
    assert SwAV(queue=3840).warnings(256) == []


@pytest.mark.parametrize(("options", "words"), [
    ({"queue": 128}, r"--method\.queue 128 is no multiple of --batch 256: .* Use 256\."),
    ({"queue": 3840 + 128}, r"--method\.queue 3968 is no multiple of --batch 256: .* Use 3840\."),
    ({"queue": 1024}, r"--method\.queue 1024 holds more embeddings than there are images \(1,000\)\. Use at most 768"),
    ({"queue": -256}, r"--method\.queue -256: at least 0, which is none\."),
    ({"prototypes": 1}, r"--method\.prototypes 1: at least 2, or there is nothing to predict\."),
    ({"local_views": -1}, r"--method\.local-views -1: at least 0, which is none\."),
])  # fmt: skip
def test_a_queue_or_prototypes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        SwAV(**options).check(256, 1000)


def test_a_queue_and_a_batch_of_more_than_there_are_images_are_refused():
    with pytest.raises(UsageError, match=r"images \(100\)\. So does a batch of 256: use a smaller --batch\."):
        SwAV(queue=256).check(256, 100)


def test_presets_for_small_sets_can_leave_the_uniform_state():
    """From there what tells images apart must grow where it agrees between views as much as strong changes leave it."""
    shared, *own = torch.randn(3, 512, 64, generator=torch.Generator().manual_seed(0)).double()
    scores = [1e-3 * (0.4**0.5 * shared + 0.6**0.5 * each) for each in own]

    def growth(epsilon: float) -> float:
        """Of the scores, along a step against their gradient."""
        learned = [each.clone().requires_grad_() for each in scores]
        codes = [sinkhorn(each, epsilon=epsilon, rounds=3) for each in learned]
        swapped_prediction(learned, codes, temperature=0.1).backward()
        return -sum((each.grad * (each - each.mean(dim=0))).sum().item() for each in learned if each.grad is not None)

    for name in ("tiny", "vits16"):
        run = open_preset(f"swav-{name}")
        run.check()
        assert isinstance(run.method, SwAV)
        assert run.method.temperature == 0.1
        assert growth(run.method.epsilon) > 0 > growth(SwAV().epsilon)
    assert open_preset("swav-tiny").method.views(TINY)["local0"] == View(
        side=32, area=(0.2, 0.5), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2
    )


def test_cosines_are_float32_where_weights_come_as_bfloat16():
    prototypes, embedding = Prototypes(24, 16).bfloat16(), torch.randn(5, 16)
    cosines = prototypes(embedding)
    assert cosines.dtype == torch.float32
    expected = torch.nn.functional.normalize(embedding, dim=1) @ prototypes.prototypes.float().T
    assert torch.equal(cosines, expected)
    assert prototypes(embedding.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("method", [SMALL_SWAV, DAAE(head_hidden=32, head_out=16, feature="asym_pred")])
def test_heads_can_do_without_a_norm(method):
    network = Network(replace(method, head_norm="none"), SMALL, 0)
    heads = [network.parts[name] for name in ("projector", "predictor") if name in network.parts]
    assert not any("Norm" in type(layer).__name__ for head in heads for layer in head.modules())
    torch.stack(list(network(views_of(method), LABEL).terms.values())).sum().backward()
    for head in heads:
        assert all(each.grad is not None and each.grad.isfinite().all() for each in head.parameters())


def test_the_last_norm_of_a_projector_can_be_left_out():
    names = [name for name, _ in Projector(8, 16, 4, last_norm=False).named_modules()]
    assert names[-1] == "layers.3"
    assert Projector(8, 16, 4, last_norm=False)(torch.randn(5, 8)).shape == (5, 4)


def test_formula_counts_what_torch_multiplies():
    assert counted_macs(SMALL_SWAV, COUNTED, LABEL[:8]) == pytest.approx(SMALL_SWAV.macs(COUNTED), rel=0.01)
    heads = 8 * (768 * 2048 + 2048 * 128 + 128 * 3000)
    assert (SwAV().macs(VIT_B) - heads) / 1e9 == pytest.approx(54.26, rel=0.001)


def test_weight_decay_goes_up_along_a_cosine_and_reaches_the_optimizer():
    rising = Optim(weight_decay=0.04, weight_decay_end=0.4)
    assert weight_decay(Optim(weight_decay=0.05), 0.7) == 0.05
    assert [weight_decay(rising, done) for done in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
    run = small_run(SMALL_SWAV)
    stepper = stepper_of(replace(run, optim=replace(run.optim, weight_decay=0.04, weight_decay_end=0.4)))
    stepper(batch_of(run), 1e-3, (0.5, 0.6))
    assert [group["weight_decay"] for group in stepper.optimizer.param_groups] == pytest.approx([0.0, 0.22])


def test_a_run_resumes_to_the_bit_and_says_what_is_few(store_path, tmp_path):
    def command(name: str, *more: str) -> list[str]:
        # Stopped while the prototypes are frozen; the last steps have them free, and the queue.
        small = "--method.head-hidden 32 --method.head-out 16 --method.prototypes 64 --method.queue 32".split()
        small += ["--method.drop-path", "0.5"]
        late = ("--method.freeze-steps", "4", "--steps", "6")
        return flags("swav-tiny", store_path, tmp_path / name, *small, *late, *more)

    assert main(command("whole")) == 0
    assert main(command("parts", "--limit-steps", "3")) == 0
    assert main(command("parts")) == 0
    for kind in (weights, moments):
        whole, parts = (kind(tmp_path / name, 6) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["parts.prototypes.prototypes/step"].item() == 2
    assert "16 images at once are few for 64 prototypes" in (tmp_path / "whole" / "train.log").read_text()
    assert 0 < read_rows(tmp_path / "whole" / "metrics.jsonl")[-1]["of_uniform"] < 1.5
