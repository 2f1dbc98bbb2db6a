"""SimCLR, MoCo v2 and v3, BYOL and SupCon: views, heads, queue and momentum as published, and that each learns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.memory import Queue, rising_momentum
from model.network import Network
from model.objectives import OBJECTIVES, Objective
from model.objectives.byol import BYOL
from model.objectives.clsa import CLSA
from model.objectives.mocov2 import MoCoV2
from model.objectives.mocov3 import MoCoV3
from model.objectives.simclr import SimCLR
from model.objectives.supcon import SupCon
from model.objectives.two_views import TwoViews
from model.shape import Shape, encoder_macs, head_macs
from pipeline.errors import DataError, UsageError
from pipeline.sampling import View
from pipeline.store import Store
from pipeline.views import Patches
from tests import textbook
from tests.conftest import SMALL
from tests.networks import COUNTED, counted_macs, overfit, views_of
from tests.rank_process import BASES, METHODS
from tests.test_can import exact
from tests.test_pretrain import flags
from train.config import Optim
from train.data import open_data, open_store
from train.json_files import read_rows
from train.optim import parameter_groups
from train.presets import PRESETS, open_preset
from train.pretrain import main

PAIRS = torch.arange(16) // 2  # eight classes of two images
WITH_COPIES = ("mocov2", "mocov3", "byol")


def loss_of(network: Network, views: dict[str, Patches]) -> torch.Tensor:
    return torch.stack(list(network(views, PAIRS).terms.values())).sum()


# --- as published -----------------------------------------------------------------------------------------------------

SIMCLR = View(side=224, area=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), gray=0.2, blur=0.5)
MOCO_V2 = View(side=224, area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5)
BYOL_A = View(side=224, area=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), gray=0.2, blur=1.0)
BYOL_B = replace(BYOL_A, blur=0.1, solarise=0.2)


@pytest.mark.parametrize(("method", "one", "other"), [
    (SimCLR(), SIMCLR, SIMCLR), (SupCon(), SIMCLR, SIMCLR), (MoCoV2(), MOCO_V2, MOCO_V2),
    (MoCoV3(), BYOL_A, BYOL_B), (BYOL(), BYOL_A, BYOL_B),
])  # fmt: skip
def test_views_are_the_papers(method, one, other):
    assert method.views(Shape()) == {"one": one, "other": other}


@pytest.mark.parametrize(("name", "gmac"), [
    ("simclr", 35.13), ("supcon", 35.13), ("mocov2", 23.42), ("mocov3", 46.83), ("byol", 46.83),
])  # fmt: skip
def test_work_is_that_of_the_encoders_and_little_more(name, gmac):
    """In forward passes of a ViT-B, 17.563 GMAC each: two trained, or one and a third, or two and two thirds."""
    assert OBJECTIVES[name]().macs(Shape()) / 1e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize(("name", "copied", "head"), [
    ("simclr", 0, ()), ("supcon", 0, ()), ("mocov2", 1, (64, 64, 128)), ("mocov3", 2, (64, 32, 32, 16)),
    ("byol", 2, (64, 32, 16)),
])  # fmt: skip
def test_formula_counts_what_torch_multiplies(name, copied, head):
    """copied: views that a momentum copy looks at without a gradient, through a head of its own."""
    method = replace(BASES[name], queue=4096, head_out=128) if name == "mocov2" else BASES[name]  # 2 % for the queue
    looked = encoder_macs(COUNTED, 64) + head_macs(*head)  # the formula counts a third of it
    expected = method.macs(COUNTED) + copied * 2 * looked / 3
    assert counted_macs(method, COUNTED, PAIRS[:8]) == pytest.approx(expected, rel=0.01)


def test_heads_have_the_published_sizes():
    def widths(method: Objective) -> dict[str, list[int]]:
        found = {}
        for part, head in method.parts(replace(SMALL, width=64)).items():
            linear = [layer for layer in head.modules() if isinstance(layer, torch.nn.Linear)]
            found[part] = [each.in_features for each in linear[:1]] + [each.out_features for each in linear]
        return {part: found[part] for part in ("projector", "predictor") if part in found}

    assert widths(SimCLR()) == widths(SupCon()) == {"projector": [64, 2048, 128]}
    assert widths(MoCoV2(queue=8)) == {"projector": [64, 64, 128]}
    assert widths(MoCoV3()) == {"projector": [64, 4096, 4096, 256], "predictor": [256, 4096, 256]}
    assert widths(BYOL()) == {"projector": [64, 4096, 256], "predictor": [256, 4096, 256]}


def test_presets_train_as_moco_v3_trains_vits_and_smaller_on_small_data():
    for name in BASES:
        published, small, tiny = (open_preset(f"{name}-{size}") for size in ("vitb16-in1k-300", "vits16", "tiny"))
        assert published.optim.peak_lr() == pytest.approx(2.4e-3)
        assert (published.optim.betas, published.optim.weight_decay) == ((0.9, 0.999), 0.1)
        assert small.optim.lr == tiny.optim.lr == 5e-4
        assert tiny.method.views(tiny.model)["one"].area[0] == 0.2
        for run in (published, small, tiny):
            run.check()
    assert {name for name in PRESETS if name.startswith("supcon")} == {
        "supcon-tiny", "supcon-vits16", "supcon-vitb16-in1k-300"
    }  # fmt: skip


@pytest.mark.parametrize("size", ["tiny", "vits16", "vitb16-in1k-300"])
@pytest.mark.parametrize(("name", "jitter"), [
    ("simclr", (0.4, 0.4, 0.4, 0.1)), ("mocov2", (0.4, 0.4, 0.4, 0.1)), ("byol", (0.4, 0.4, 0.2, 0.1)),
])  # fmt: skip
def test_the_weaker_augmentation_is_adainfs(name, size, jitter):
    """Crops from a fifth up, jitter half as likely, and half as strong where it was SimCLR's."""
    base, weak = open_preset(f"{name}-{size}"), open_preset(f"{name}-{size}-weak")
    for view in weak.method.views(weak.model).values():
        assert (view.area, view.jitter, view.jitter_p, view.gray) == ((0.2, 1.0), jitter, 0.4, 0.2)
    blurs = [[view.blur for view in run.method.views(run.model).values()] for run in (base, weak)]
    assert blurs[0] == blurs[1]
    assert (weak.optim, weak.model, weak.budget) == (base.optim, base.model, base.budget)


def test_moco_v3_begins_as_its_code_does_and_the_copy_with_it():
    shape = replace(SMALL, width=64)
    network, other = Network(BASES["mocov3"], shape, 0), Network(BASES["simclr"], shape, 0)
    mine, theirs = network.encoder.state_dict(), other.encoder.state_dict()
    bound = math.sqrt(6 / (2 * 64))  # Xavier's of a matrix of 64 x 64, and not of 64 x 192
    for block in range(SMALL.depth):
        weight = mine[f"blocks.{block}.attn.qkv.weight"]
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert mine["cls_token"].std().item() == pytest.approx(1e-6, rel=0.3)
    changed = {name for name, value in mine.items() if not torch.equal(value, theirs[name])}
    assert changed == {"cls_token", *(f"blocks.{block}.attn.qkv.weight" for block in range(SMALL.depth))}
    for source, copy in ((network.encoder, "momentum_encoder"), (network.parts["projector"], "momentum_projector")):
        followed = network.parts[copy].state_dict()
        assert all(torch.equal(value, followed[f"module.{name}"]) for name, value in source.state_dict().items())


# --- what is trained and what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_what_is_frozen_or_follows_gets_no_gradient_and_is_not_optimized(name):  # T-B5, T-B6
    network = Network(BASES[name], SMALL, 0)
    views = views_of(BASES[name])
    views["one"].pixels.requires_grad_()
    views["other"].pixels.requires_grad_()
    loss_of(network, views).backward()
    trained = {id(p) for group in parameter_groups(network, Optim())[0] for p in group["params"]}
    for each, parameter in network.named_parameters():
        still = "momentum_" in each or "patch_embed" in each
        assert (parameter.grad is None) == still, each
        assert (id(parameter) in trained) == (not still), each
    one, other = (views[each].pixels.grad for each in ("one", "other"))
    assert one is not None
    assert (other is None) == (name == "mocov2")  # the others compare both ways
    copies = [part for part in network.parts if part.startswith("momentum_")]
    assert copies == (["momentum_encoder", "momentum_projector"] if name in WITH_COPIES else [])


def test_the_patch_projection_is_trained_where_asked():
    network = Network(replace(SimCLR(head_hidden=32), freeze_patches=False), SMALL, 0)
    loss_of(network, views_of(SimCLR())).backward()
    gradient = network.encoder.patch_embed.proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("name", "before", "after"), [
    ("mocov2", 0.001, 0.0), ("mocov3", 0.005, 0.0), ("byol", 0.0, 0.002)
])  # fmt: skip
def test_momentum_copies_move_at_their_moment_at_the_rate_of_the_step(name, before, after):  # T-B1, T-B4
    """Shares of the way to the encoder, halfway through a run: 1 - m for MoCo v2, (1 - m) / 2 for the others."""
    network = Network(BASES[name], SMALL, 0)
    copy = dict(network.parts["momentum_encoder"].named_parameters())["module.cls_token"]
    start = copy.clone()
    with torch.no_grad():
        network.encoder.cls_token.add_(1.0)
    BASES[name].before_step(network, 0.5, 5)
    assert torch.allclose(copy - start, torch.full_like(copy, before), atol=1e-6)
    loss_of(network, views_of(BASES[name]))
    BASES[name].after_step(network, 0.5)
    assert torch.allclose(copy - start, torch.full_like(copy, before + after), atol=1e-6)


def test_momentum_rises_to_one_along_half_a_cosine():  # T-B4
    assert rising_momentum(0.99, 0.0) == pytest.approx(0.99)
    assert rising_momentum(0.99, 0.25) == pytest.approx(1 - 0.01 * (1 + math.sqrt(0.5)) / 2)
    assert rising_momentum(0.99, 0.5) == pytest.approx(0.995)
    assert rising_momentum(0.99, 1.0) == 1
    network = Network(replace(MoCoV2(queue=32), momentum_rises=True), SMALL, 0)
    copy = dict(network.parts["momentum_encoder"].named_parameters())["module.cls_token"]
    start = copy.clone()
    with torch.no_grad():
        network.encoder.cls_token.add_(1.0)
    network.objective.before_step(network, 1.0, 10)
    assert torch.equal(copy, start)


# --- the queue --------------------------------------------------------------------------------------------------------


def test_the_queue_is_first_in_first_out_of_unit_rows_and_constant_length():
    queue = Queue(6, 3).train()
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(6))
    keys = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)) * 7
    unit = torch.nn.functional.normalize(keys, dim=1)
    for first in (0, 2, 4, 6, 8):
        before = queue.rows.clone()
        queue.offer(keys[first : first + 1])
        queue.offer(keys[first + 1 : first + 2])
        assert torch.equal(queue.rows, before)  # offered, not in yet
        queue.push()
    assert torch.equal(queue.rows, unit[[6, 7, 8, 9, 4, 5]])
    assert queue.oldest == 4
    assert queue.state_dict().keys() == {"rows", "oldest"}


def test_the_queue_takes_in_nothing_that_is_not_finite_and_nothing_that_is_only_looked_at():
    queue = Queue(4, 3)
    before = queue.rows.clone()
    queue.eval().offer(torch.ones(2, 3))
    queue.train().offer(torch.tensor([[float("nan"), 1, 1], [0, 2, 0], [float("inf"), 0, 0], [3, 0, 0]]))
    queue.push()
    expected = torch.stack([before[0], torch.tensor([0.0, 1, 0]), before[2], torch.tensor([1.0, 0, 0])])
    assert torch.equal(queue.rows, expected)
    assert queue.oldest == 0


def test_moco_v2_remembers_the_keys_of_the_step_as_the_loss_saw_them():
    network = Network(MoCoV2(head_out=16, queue=32), SMALL, 0)
    views, queue = views_of(MoCoV2()), network.parts["queue"]
    assert isinstance(queue, Queue)
    old = queue.rows.clone()
    with torch.no_grad():
        (code,) = network.encoder(views["other"])  # the copy begins as the encoder
        key = network.parts["projector"](code[:, 1:].mean(dim=1))
    loss_of(network, views).backward()
    assert torch.equal(queue.rows, old)
    network.objective.after_step(network, 0.1)
    assert torch.allclose(queue.rows[:16], torch.nn.functional.normalize(key, dim=1), atol=1e-6)
    assert torch.equal(queue.rows[16:], old[16:])


@pytest.mark.parametrize("name", ["mocov2", "clsa", "swav-queue"])
def test_a_loss_that_no_step_follows_leaves_nothing_in_a_queue(name):
    method = METHODS[name]
    network = Network(method, SMALL, 0).train()
    for _ in range(2):  # as where a refused step is taken again to be looked at
        method.before_step(network, 0.0, 0)
        network(views_of(method), PAIRS)
    method.after_step(network, 0.1)
    queues = [each for each in network.modules() if isinstance(each, Queue)]
    assert [queue.oldest.item() for queue in queues] == [16] * (2 if name == "swav-queue" else 1)


# --- losses -----------------------------------------------------------------------------------------------------------


Made = dict[str, torch.Tensor]
# Of what is made of one view and of what is made of another one, at each method's temperature.
PRINTED: dict[str, Callable[[Made, Made], float]] = {
    "simclr": lambda one, other: textbook.nt_xent(one["query"], other["query"], temperature=0.1),
    "supcon": lambda one, other: textbook.sup_con(
        torch.stack([one["query"], other["query"]]), PAIRS, temperature=0.1
    ),
    "mocov2": lambda one, other: textbook.queue_info_nce(one["query"], other["key"], one["queue"], temperature=0.2),
    "mocov3": lambda one, other: 2 * 0.2 * sum(
        textbook.info_nce(mine["query"], theirs["key"], temperature=0.2)
        for mine, theirs in ((one, other), (other, one))
    ),
    "byol": lambda one, other: sum(
        textbook.regression(mine["query"], theirs["key"]) for mine, theirs in ((one, other), (other, one))
    ),
}  # fmt: skip


def made_of(network: Network, view: Patches) -> Made:
    """(B, D) of one view by itself: behind projector and predictor, and behind the momentum copies of both."""
    parts, (code,) = network.parts, network.encoder(view)
    made = {"query": parts["projector"](code[:, 1:].mean(dim=1))}
    if "predictor" in parts:
        made["query"] = parts["predictor"](made["query"])
    if "momentum_encoder" in parts:
        (code,) = parts["momentum_encoder"](view)
        made["key"] = parts["momentum_projector"](code[:, 1:].mean(dim=1))
    if "queue" in parts:
        made["queue"] = parts["queue"].rows
    return {each: value.detach() for each, value in made.items()}


@pytest.mark.parametrize("name", BASES)
def test_the_loss_is_the_printed_one_of_each_view_beside_the_other_one(name):
    network, views = Network(BASES[name], SMALL, 0).double(), exact(views_of(BASES[name]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what follows is another network from now on
        for part in (network.encoder, network.parts["projector"]):
            for weight in part.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        for queue in (each for each in network.modules() if isinstance(each, Queue)):
            queue.rows.copy_(torch.nn.functional.normalize(queue.rows, dim=1))  # of length 1 to float32 up to now
    one, other = (made_of(network, views[each]) for each in ("one", "other"))
    expected = PRINTED[name](one, other)
    assert loss_of(network, views).item() == pytest.approx(expected, rel=1e-10)
    itself = (PRINTED[name](one, one) + PRINTED[name](other, other)) / 2
    assert abs(expected - itself) > 1e-3  # each view beside itself would be seen


@pytest.mark.parametrize("name", ["simclr", "supcon", "mocov3", "byol"])
def test_swapping_the_views_changes_nothing(name):  # T-B3
    network, views = Network(BASES[name], SMALL, 0), views_of(BASES[name])
    swapped = {"one": views["other"], "other": views["one"]}
    assert loss_of(network, swapped).item() == pytest.approx(loss_of(network, views).item(), rel=1e-6)


def test_moco_v3_of_a_collapsed_encoder_is_four_temperatures_of_log_batch():  # T-B2, L7
    method = MoCoV3(head_hidden=32, head_out=16, head_norm="none")
    network, views = Network(method, SMALL, 0), views_of(method)
    last = [head[-2] for name, head in network.named_modules() if name.endswith("layers")]
    with torch.no_grad():  # whatever goes in, the bias comes out
        for linear in last:
            linear.weight.zero_()
    assert loss_of(network, views).item() == pytest.approx(4 * 0.2 * math.log(16), abs=1e-5)


def test_labels_decide_what_supcon_pulls_together():
    network, views = Network(BASES["supcon"], SMALL, 0), views_of(BASES["supcon"])
    own, shared, other = (
        network(views, label).terms["contrast"].item()
        for label in (torch.arange(16), PAIRS, torch.arange(16) % 8)
    )  # fmt: skip
    assert len({own, shared, other}) == 3
    simclr = Network(replace(SimCLR(head_hidden=32, head_out=16), head_norm="none"), SMALL, 0)
    assert own == pytest.approx(loss_of(simclr, views).item(), rel=1e-6)


@pytest.mark.parametrize("method", [BASES["supcon"], METHODS["selfcon"]])
def test_a_base_temperature_reaches_the_loss(method):
    views, scaled = views_of(method), replace(method, base_temperature=0.07)
    plain, found = (loss_of(Network(each, SMALL, 0), views).item() for each in (method, scaled))
    assert found == pytest.approx(plain * 0.1 / 0.07, rel=1e-6)
    scaled.check(16)
    with pytest.raises(UsageError, match=r"--method\.base-temperature 0: above 0, or left out"):
        replace(method, base_temperature=0.0).check(16)


UNIFORM = {
    "simclr": math.log(31), "supcon": math.log(31), "mocov2": math.log(33), "mocov3": 0.8 * math.log(16), "byol": 4.0
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_thirty_steps_on_one_batch_halve_the_loss_of_an_encoder_that_knows_nothing(name):
    # With its own head, keys of an encoder that knows nothing are too alike to be told apart in 30 steps.
    method = replace(BASES[name], head_norm="batch") if name == "mocov2" else BASES[name]
    rows = overfit(Network(method, SMALL, 0), views_of(method), 30, PAIRS)
    assert rows[-1]["loss"] < UNIFORM[name] / 2


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "more", "words"), [
    ("mocov2-tiny", ["--method.queue", "40"], r"--method\.queue 40 is no multiple of --batch 16: .* Use 32\."),
    ("mocov2-tiny", ["--method.queue", "0"], r"--method\.queue 0 is no multiple of --batch 16: .* Use 16\."),
    ("mocov2-tiny", ["--method.queue", "160"], r"more keys than there are images \(96\).*--method\.queue 16\."),
    ("byol-tiny", ["--method.momentun", "0.9"], r"--method\.momentun is unknown\. Did you mean --method\.momentum\?"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused_before_anything_is_made(store_path, tmp_path, preset, more, words):
    with pytest.raises(UsageError, match=words):
        main([*flags(preset, store_path, tmp_path / "run", "--steps", "2"), *more])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [MoCoV2(queue=32), CLSA(queue=32)])
def test_a_queue_of_more_than_a_quarter_of_the_images_is_warned_of(method):
    assert method.warnings(16) == method.warnings(16, 128) == []
    assert "--method.queue 32 holds keys of more than a quarter of the 127 images" in method.warnings(16, 127)[0]


@pytest.mark.parametrize("name", ["supcon", "selfcon"])
def test_a_supervised_method_needs_labels(store_path, unlabelled_path, tmp_path, monkeypatch, name):
    command = flags(f"{name}-tiny", unlabelled_path, tmp_path / "run", "--steps", "2")
    with pytest.raises(UsageError, match=rf"--objective {name} learns from labels, and .* has none"):
        main(command)
    command = flags(f"{name}-tiny", store_path, tmp_path / "run", "--steps", "2")
    with pytest.raises(DataError, match="no label column 'kind'"):
        main([*command, "--method.label", "kind"])
    monkeypatch.setattr(Store, "label", lambda self, column: (np.full(self.count, -1), ["a"]))
    with pytest.raises(UsageError, match=r"no image of .* has one in column class\. Choose another with"):
        main(command)
    assert list(tmp_path.iterdir()) == []


def test_a_supervised_method_learns_from_the_images_that_have_a_label(store_path, tmp_path, monkeypatch):
    label, whole = Store.label, Store.open(store_path)
    left_out = {3, 17, 40, 41, 95}

    def partly(self: Store, column: str):
        known, names = label(self, column)
        known = known.copy()
        known[list(left_out)] = -1
        return known, names

    monkeypatch.setattr(Store, "label", partly)
    run = replace(open_preset("supcon-tiny"), data=store_path, device="cpu", loader="shards", model=SMALL)
    run = replace(run, optim=Optim(batch=13))
    store = open_store(run)
    assert (store.per_epoch, store.count, store.fingerprint) == (91, 96, whole.fingerprint)
    for epoch in (0, 1):
        assert set(store.order(0, epoch).tolist()) == set(range(96)) - left_out
    with contextlib.closing(open_data(run, store)) as loader:
        batches = list(loader.epoch(2))
    seen = torch.cat([batch.id for batch in batches])
    assert len(seen) == len(set(seen.tolist())) == 91  # seven whole batches
    assert int(torch.cat([batch.label for batch in batches]).min()) >= 0
    with pytest.raises(DataError, match="has 91 images with a label in column class, fewer than one batch of 92"):
        open_data(replace(run, optim=Optim(batch=92)), store)
    assert main(flags("supcon-tiny", store_path, tmp_path / "run", "--steps", "2")) == 0
    assert ", the 91 of 96 with a label in column class, on " in (tmp_path / "run/train.log").read_text()


def test_generated_images_have_no_labels_to_learn_from(store_path, tmp_path):
    with pytest.raises(UsageError, match=r"learns from labels, and generated images \(--inflate\) have none"):
        main([*flags("supcon-tiny", store_path, tmp_path / "run", "--steps", "2"), "--inflate.data", str(store_path)])


def test_labels_reach_a_supervised_method_and_no_other(store_path):
    store = Store.open(store_path)
    for name, supervised in (("supcon", True), ("simclr", False)):
        run = replace(open_preset(f"{name}-tiny"), device="cpu", loader="shards", model=SMALL, optim=Optim(batch=16))
        assert isinstance(run.method, TwoViews)
        loader = open_data(run, store)
        batch = next(iter(loader.epoch(0)))
        loader.close()
        expected = torch.from_numpy(store.label("class")[0][batch.id.numpy()]).long()
        assert torch.equal(batch.label, expected if supervised else torch.full((16,), -1))


def test_a_collapse_is_said_once_and_in_words(store_path, tmp_path):
    """Weights that decay to nothing at each step leave embeddings of biases alone."""
    decay = ["--optim.weight-decay", "1000", "--lr", "1e-3", "--optim.warmup-epochs", "0", "--watch.log-every", "2"]
    decay += ["--method.head-norm", "none"]
    assert main(flags("simclr-tiny", store_path, tmp_path / "a", "--steps", "12", *decay)) == 0
    said = [
        line for line in (tmp_path / "a" / "train.log").read_text().splitlines() if "nearly one and the same" in line
    ]
    assert len(said) == 1
    assert "spread 0.0" in said[0]
    assert read_rows(tmp_path / "a" / "metrics.jsonl")[-1]["spread"] < 0.1
    method = PRESETS["swav-tiny"]().method
    assert "1 is chance" in str(method.alarm({"of_uniform": 0.9995, "spread": 0.9}))
    assert method.alarm({"of_uniform": 0.99, "spread": 0.9}) is None
    assert method.alarm({"of_uniform": 0.99, "spread": 0.01}) is not None


@pytest.mark.parametrize(("method", "least"), [(SimCLR(), 0.1), (BYOL(), 0.5)])
def test_without_negatives_half_of_the_spread_gone_is_a_collapse(method, least):
    assert method.alarm({"spread": least + 0.01}) is None
    assert f"(spread {least - 0.01:.3f};" in str(method.alarm({"spread": least - 0.01}))


def test_whole_runs_with_labels_and_without(store_path, unlabelled_path, tmp_path):
    for preset, data in (("supcon-tiny", store_path), ("simclr-tiny", unlabelled_path)):
        assert main(flags(preset, data, tmp_path / preset, "--steps", "2")) == 0
        (row,) = read_rows(tmp_path / preset / "metrics.jsonl")
        assert {"contrast", "pair_accuracy", "pair_cosine", "other_cosine", "spread"} <= row.keys()
        assert row["loss"] == pytest.approx(row["contrast"])
        assert 1 < row["effective_rank"] <= 16
