"""End-to-end fine-tuning: MAE's recipe, exact resume, what is learned and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from model.classifier import Classifier
from model.shape import Shape
from model.vit import Encoder, patch_mean
from pipeline.errors import DataError, NumericsError, Preempted, UsageError
from pipeline.sampling import branch_scales
from pipeline.views import Patches
from tests.conftest import SMALL
from tests.images import encoded, make_folder
from tests.test_pretrain import flags as pretrain_flags
from tools import convert
from train.config import Optim
from train.evaluation import tuner
from train.evaluation.tuner import numpy_seeded
from train.finetune import Recipe, main
from train.json_files import read_rows
from train.optim import make_optimizer, parameter_groups, set_rate
from train.pretrain import main as pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = "--magnitude 0 --mixup 0 --cutmix 0 --erase 0 --drop-path 0 --smoothing 0".split()


@pytest.fixture(scope="module")
def colours_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 noisy pictures of 32 px, reddish or bluish, in the column `colour`; `tone` is known of two."""
    root = tmp_path_factory.mktemp("colours")
    rows = ["path,colour,tone"]
    for i in range(60):
        draw = np.random.default_rng(i)
        pixels = draw.normal([170, 90, 80] if i % 2 else [80, 90, 170], 40, (32, 32, 3)).clip(0, 255)
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / f"{i:03d}.jpg").write_bytes(encoded(Image.fromarray(pixels.astype(np.uint8))))
        rows.append(f"{i:03d}.jpg,{'red' if i % 2 else 'blue'},{'ab'[i] if i < 2 else ''}")
    (root / "images" / "labels.csv").write_text("\n".join(rows) + "\n")
    assert convert.main([str(root / "images"), str(root / "store"), "--backends", "dali", "--quiet"]) == 0
    return root / "store"


@pytest.fixture(scope="module")
def run_path(colours_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    assert pretrain(pretrain_flags("mae-tiny", colours_path, out, "--steps", "2", "--label", "colour")) == 0
    return out


def command(run: Path, out: Path, *more: str) -> list[str]:
    return [
        str(run), "--out", str(out), "--batch", "16", "--epochs", "3", "--log-every", "1", "--quiet", "--device", "cpu",
        "--lr", "1e-3", *more,
    ]  # fmt: skip


def tensors(out: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step:09d}" / f"{name}.safetensors")


def result(out: Path) -> dict:
    found = json.loads((out / "finetune.json").read_text())
    return {name: value for name, value in found.items() if name != "train_seconds"}


# --- The recipe ------------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_group_with_the_rate_and_decay_of_its_layer():
    classifier = Classifier(Encoder(side=32, patch=8, width=16, depth=12, heads=2), 5, 0)
    groups, _ = parameter_groups(classifier, Optim(layer_decay=0.65))
    place: dict[str, dict] = {}
    names = {id(each): name for name, each in classifier.named_parameters()}
    for group in groups:
        for each in group["params"]:
            assert names[id(each)] not in place
            place[names[id(each)]] = group
    assert set(place) == set(names.values())
    for name, each in classifier.named_parameters():
        assert place[name]["weight_decay"] == (0 if each.ndim == 1 or name == "encoder.cls_token" else 0.05), name
    assert not any("norm.weight" in name for name in names.values() if name.startswith("encoder.norm"))
    for name, rate in {
        "encoder.cls_token": 0.003697, "encoder.patch_embed.proj.weight": 0.003697,
        "encoder.blocks.0.attn.qkv.weight": 0.005688, "encoder.blocks.0.norm1.bias": 0.005688,
        "encoder.blocks.11.mlp.fc2.bias": 0.65, "fc_norm.weight": 1.0, "head.weight": 1.0, "head.bias": 1.0,
    }.items():  # fmt: skip
        assert place[name]["lr_scale"] == pytest.approx(rate, rel=1e-3), name
    optimizer = make_optimizer(classifier, Recipe(base_lr=1.0, layer_decay=0.65).optim(), torch.device("cpu"))
    set_rate(optimizer, 2e-3)
    assert max(group["lr"] for group in optimizer.param_groups) == 2e-3
    assert min(group["lr"] for group in optimizer.param_groups) == pytest.approx(2e-3 * 0.65**13)


def test_the_numbers_are_maes_for_each_size():
    base, large, huge = (100, 5e-4, 0.65, 0.1), (50, 1e-3, 0.75, 0.2), (50, 1e-3, 0.75, 0.3)
    for width, numbers in {192: base, 768: base, 1024: large, 1280: huge}.items():
        recipe = Recipe().of_size(Shape(width=width, heads=width // 64))
        assert (recipe.epochs, recipe.base_lr, recipe.layer_decay, recipe.drop_path) == numbers
        assert recipe.optim().peak_lr() == 4 * numbers[1]
        recipe.check()
    own = Recipe(epochs=3, drop_path=0.0, lr=0.01).of_size(Shape())
    assert (own.epochs, own.drop_path, own.optim().peak_lr(), own.layer_decay) == (3, 0, 0.01, 0.65)


# --- The classifier --------------------------------------------------------------------------------------------------


def seen(rows: int = 4) -> Patches:
    return Patches(
        torch.randn(rows, SMALL.patches, SMALL.values, generator=torch.Generator().manual_seed(1)), SMALL.grid
    )


def small_encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(side=SMALL.side, patch=SMALL.patch, width=SMALL.width, depth=4, heads=SMALL.heads)


def test_the_head_reads_the_mean_of_the_patches_behind_a_norm_of_its_own():
    encoder = small_encoder()
    tokens: list[torch.Tensor] = []
    encoder.norm.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    encoder(seen())
    classifier = Classifier(encoder, 5, seed=3)
    assert not any(name.startswith("encoder.norm") for name, _ in classifier.named_parameters())
    assert 1e-5 < classifier.head.weight.std() < 3e-5
    assert not classifier.head.bias.any()
    torch.nn.init.normal_(classifier.head.weight)
    expected = classifier.head(classifier.fc_norm(patch_mean(tokens[0])))
    torch.testing.assert_close(classifier(seen()), expected, rtol=0, atol=1e-5)
    again = Classifier(small_encoder(), 5, seed=3)
    assert torch.equal(again.head.weight, Classifier(small_encoder(), 5, seed=3).head.weight)
    assert not torch.equal(again.head.weight, Classifier(small_encoder(), 5, seed=4).head.weight)


def test_logits_are_float32_in_a_run_of_bfloat16():
    classifier = Classifier(small_encoder(), 5, seed=0)
    torch.nn.init.normal_(classifier.head.weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = classifier(seen())
        (code,) = classifier.encoder.encode(classifier.encoder.embed(seen()))
    assert logits.dtype == torch.float32
    exact = classifier.head(classifier.fc_norm(patch_mean(code.float())))
    torch.testing.assert_close(logits, exact, rtol=1e-6, atol=1e-6)


def test_branches_are_scaled_for_each_image():
    classifier = Classifier(small_encoder(), 5, seed=0)
    torch.nn.init.normal_(classifier.head.weight)
    plain = classifier(seen())
    ones = torch.ones(4, 4, 2)
    torch.testing.assert_close(classifier(seen(), ones), plain, rtol=0, atol=1e-5)
    ones[1] = 0  # of this image only the embedding is left
    left = classifier(seen(), ones)
    torch.testing.assert_close(left[[0, 2, 3]], plain[[0, 2, 3]], rtol=0, atol=1e-5)
    bare = classifier.head(classifier.fc_norm(classifier.encoder.embed(seen()).mean(dim=1)))
    torch.testing.assert_close(left[1], bare[1], rtol=0, atol=1e-5)


def test_stochastic_depth_rises_over_the_blocks_and_keeps_the_mean():
    ids = np.arange(4000)
    scales = torch.from_numpy(branch_scales(0.3, 4, "drop path", 0, 0, ids))
    assert scales.shape == (4000, 4, 2)
    dropped = (scales == 0).float().mean(dim=(0, 2))
    assert dropped.tolist() == pytest.approx([0, 0.1, 0.2, 0.3], abs=0.02)
    assert scales.mean(dim=(0, 2)).tolist() == pytest.approx([1, 1, 1, 1], abs=0.03)
    assert (scales[:, 3, 0] == 0).ne(scales[:, 3, 1] == 0).any()  # attention and MLP apart
    assert np.array_equal(branch_scales(0.3, 4, "drop path", 0, 0, ids[[7, 3]]), scales[[7, 3]])
    assert not np.array_equal(branch_scales(0.3, 4, "drop path", 0, 1, ids), scales)
    assert not np.array_equal(branch_scales(0.3, 4, "drop path one", 0, 0, ids), scales)


def test_timms_chance_is_seeded_and_numpys_own_stays_as_it_was():
    np.random.seed(1)
    expected = np.random.rand(3).tolist()
    np.random.seed(1)
    with numpy_seeded(7):
        first = np.random.rand(2).tolist()
    with numpy_seeded(7):
        assert np.random.rand(2).tolist() == first
    assert np.random.rand(3).tolist() == expected


# --- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["limit", "signal"])
def test_a_resumed_fine_tuning_equals_an_uninterrupted_one_to_the_bit(run_path, tmp_path, monkeypatch, how):
    """With everything random on, in the middle of the second of three epochs of two steps."""
    words = ["--drop-path", "0.5", "--erase", "0.5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(run_path, whole, *words)) == 0
    if how == "limit":
        assert main([*command(run_path, parts, *words), "--limit-steps", "3"]) == 0
        assert json.loads((parts / "status.json").read_text())["state"] == "paused"
    else:
        take_step = tuner.Tuner.take_step

        def struck(self: tuner.Tuner, *step) -> None:
            take_step(self, *step)
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(tuner.Tuner, "take_step", struck)
        with pytest.raises(Preempted, match="SIGTERM at step 3 of 6"):
            main(command(run_path, parts, *words))
        monkeypatch.undo()
        assert json.loads((parts / "status.json").read_text())["state"] == "preempted"
    assert not (parts / "finetune.json").exists()
    assert main(command(run_path, parts, *words)) == 0
    for name in ("model", "optim"):
        one, other = tensors(whole, 6, name), tensors(parts, 6, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[each], other[each]) for each in one)
    assert result(whole) == result(parts)
    rows = [{row["step"]: row["loss"] for row in read_rows(each / "metrics.jsonl")} for each in (whole, parts)]
    assert list(rows[0]) == [1, 2, 3, 4, 5, 6]
    assert rows[0] == rows[1]


def test_it_learns_trains_everything_and_says_how_sure_it_is(run_path, colours_path, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert main([*command(run_path, out, *PLAIN, "--layer-decay", "0.9"), "--epochs", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (score,) = found["scores"].values()
    p, count = score["value"], score["count"]
    assert p > 0.9
    assert 5 < count < 20  # the fifth that was held out
    assert found["leading"] == score
    assert score["standard_error"] == pytest.approx((p * (1 - p) / count) ** 0.5)
    assert found["sentence"].startswith("fine-tuned end to end, 8 epochs, on colour, mean of held-out: ")
    assert "±" in found["sentence"]
    assert found["start"] == f"step 2 of {run_path}"
    rows = read_rows(out / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    start = tensors(run_path, 2)
    now = tensors(out, found["steps"])
    kept = {name for name in now if name in start and torch.equal(now[name], start[name])}
    assert {name for name in now if name.startswith("encoder.")} <= start.keys()
    assert not kept  # nothing is frozen
    assert yaml.safe_load((out / "finetune.yaml").read_text())["label"] == "colour"
    # What is finished is only scored again.
    written = sorted((out / "checkpoints").iterdir())
    assert main([*command(run_path, out, *PLAIN, "--layer-decay", "0.9"), "--epochs", "8"]) == 0
    assert sorted((out / "checkpoints").iterdir()) == written
    assert "fine-tuned end to end" in capsys.readouterr().out


def test_from_scratch_starts_at_the_untrained_encoder(run_path, tmp_path):
    tuned, scratch = tmp_path / "tuned", tmp_path / "scratch"
    assert main([*command(run_path, tuned), "--limit-steps", "1"]) == 0
    assert main([*command(run_path, scratch, "--from-scratch"), "--limit-steps", "1"]) == 0
    one, other = tensors(tuned, 1), tensors(scratch, 1)
    assert not torch.equal(one["encoder.blocks.0.attn.qkv.weight"], other["encoder.blocks.0.attn.qkv.weight"])
    starts = [yaml.safe_load((each / "finetune.yaml").read_text())["start"] for each in (tuned, scratch)]
    assert starts[0] != starts[1]
    with pytest.raises(UsageError, match="from_scratch: False -> True"):
        main(command(run_path, tuned, "--from-scratch"))


def test_a_batch_in_parts_takes_the_same_step(run_path, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    exact = ("--precision", "fp32", "--limit-steps", "2")
    assert main([*command(run_path, whole), *exact]) == 0
    assert main([*command(run_path, parts, "--accum-iter", "4"), *exact]) == 0
    for one, other in zip(*(read_rows(each / "metrics.jsonl") for each in (whole, parts)), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_steps_that_are_not_finite_end_it_with_code_4(run_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "erase", lambda pixels, *_: pixels * float("nan"))
    with pytest.raises(NumericsError, match="3 steps in a row at step 3"):
        main(command(run_path, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "status.json").read_text())["code"] == 4


def test_a_row_of_steps_that_were_not_taken_tells_no_loss(run_path, tmp_path, monkeypatch):
    erase, spoilt = tuner.erase, iter([True, True])
    monkeypatch.setattr(
        tuner, "erase", lambda pixels, *more: pixels * float("nan") if next(spoilt, False) else erase(pixels, *more)
    )
    assert main(command(run_path, tmp_path / "out")) == 0
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows if not row.keys() >= {"loss", "grad_norm"}] == [1, 2]
    assert not any({"loss", "grad_norm"} & row.keys() for row in rows[:2])


def test_a_fifth_held_out_and_none_are_two_trainings(run_path, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    rows = [f"{path.name},{'red' if i % 2 else 'blue'}\n" for i, path in enumerate(make_folder(images, 4, 32))]
    (images / "labels.csv").write_text("path,colour\n" + "".join(rows))
    assert convert.main([str(images), str(tmp_path / "unseen"), "--backends", "dali", "--quiet"]) == 0
    words = [*command(run_path, out), "--limit-steps", "1"]
    assert main(words) == 0
    with pytest.raises(UsageError, match="held_out: True -> False"):
        main([*words, "--tests", str(tmp_path / "unseen")])
    # A folder from before this was written down goes on.
    settings = yaml.safe_load((out / "finetune.yaml").read_text())
    assert settings.pop("held_out") is True
    (out / "finetune.yaml").write_text(yaml.safe_dump(settings))
    assert main(words) == 0


def test_what_cannot_be_tuned_is_refused_and_leaves_nothing(run_path, unlabelled_path, tmp_path):
    out = tmp_path / "out"
    for error, words, more in (
        (DataError, "no label column 'shape'", ["--label", "shape"]),
        (DataError, "has no labels", ["--data", str(unlabelled_path)]),
        (DataError, "fewer than one batch of 64", ["--batch", "64"]),
        (DataError, "has 1 images to train on", ["--label", "tone"]),
        (UsageError, "--batch 15 is odd", ["--batch", "15"]),
        (UsageError, "--drop-path is a probability", ["--drop-path", "1.5"]),
        (UsageError, "--accum-iter", ["--accumulate", "3"]),
        (UsageError, "--log-every is at least 1", ["--log-every", "0"]),
        (UsageError, "Did you mean --layer-decay?", ["--layer-decy", "1"]),
    ):
        with pytest.raises(error, match=words):
            main([*command(run_path, out), *more])
    with pytest.raises(DataError, match="is no run folder"):
        main(command(tmp_path, out))
    assert not out.exists()
