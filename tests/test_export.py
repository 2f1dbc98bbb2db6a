"""A run's encoder in timm: same names, same numbers, and nothing exported that is damaged."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline.views import MEAN, STD, Patches, patchify
from tools import export
from train import checkpoint, pretrain
from train.command import run

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SIDE, PATCH, WIDTH = 48, 8, 64
MODEL = f"--model.side {SIDE} --model.patch {PATCH} --model.width {WIDTH} --model.depth 2 --model.heads 2".split()


@pytest.fixture(scope="module")
def trained(unlabelled_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DAAE run of two steps with two checkpoints, which must be left as it is."""
    out = tmp_path_factory.mktemp("trained") / "run"
    command = ["--preset", "daae-tiny", *MODEL, "--data", str(unlabelled_path), "--out", str(out), "--loader", "dali"]
    # A rate large enough that each step moves the weights visibly.
    command += ["--steps", "2", "--batch", "8", "--lr", "0.01", "--warmup-epochs", "0", "--quiet"]
    for _ in range(2):
        assert pretrain.main([*command, "--limit-steps", "1"]) == 0
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def timm_model(side: int) -> VisionTransformer:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=side, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0, global_pool="token"
    ).eval()


def our_tokens(run_folder: Path, pictures: torch.Tensor) -> torch.Tensor:
    """(B, S, S, 3) -> (B, 1 + N, D) of the newest checkpoint, loaded without the code under test."""
    from model.vit import Encoder

    point = checkpoint.newest(run_folder / "checkpoints", pytest.fail)
    assert point is not None
    encoder = Encoder(side=SIDE, patch=PATCH, width=WIDTH, depth=2, heads=2).eval()
    encoder.load_state_dict({k[len("encoder.") :]: v for k, v in point.weights().items() if k.startswith("encoder.")})
    with torch.no_grad():
        return encoder(Patches(patchify(pictures, PATCH), pictures.shape[1] // PATCH))[0]


def random_pictures(side: int) -> torch.Tensor:
    return torch.randn(3, side, side, 3, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("side", [SIDE, 80, 2 * SIDE])
def test_timm_computes_the_tokens_of_our_encoder(trained: Path, tmp_path: Path, side: int):
    assert export.main([str(trained), "--out", str(tmp_path / "out"), "--side", str(side)]) == 0
    weights, model = load_file(tmp_path / "out" / "model.safetensors"), timm_model(side)
    assert {name: value.shape for name, value in weights.items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict(weights, strict=True)
    pictures = random_pictures(side)
    with torch.no_grad():
        theirs = model.forward_features(pictures.permute(0, 3, 1, 2))
    ours = our_tokens(trained, pictures)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
    # The comparison is worth something: with other positions, or untrained, the tokens are far apart.
    weights["pos_embed"].zero_()
    model.load_state_dict(weights)
    with torch.no_grad():
        assert (model.forward_features(pictures.permute(0, 3, 1, 2)) - ours).abs().max() > 1e-2 * ours.abs().max()


def test_positions_are_maes_code_and_relative_to_the_image(trained: Path, tmp_path: Path):
    for side in (SIDE, 2 * SIDE):
        export.main([str(trained), "--out", str(tmp_path / str(side)), "--side", str(side)])
    own, double = (load_file(tmp_path / str(side) / "model.safetensors")["pos_embed"] for side in (SIDE, 2 * SIDE))
    assert own.shape == (1, 1 + 36, WIDTH)
    assert double.shape == (1, 1 + 144, WIDTH)
    assert own[0, 0].abs().max() == 0
    assert double[0, 0].abs().max() == 0
    # MAE's code, written out: the patch in row 2, column 4 (grid of 6).
    frequency = 10000.0 ** (-torch.arange(WIDTH // 4).double() / (WIDTH / 4))
    expected = torch.cat(
        [torch.sin(4 * frequency), torch.cos(4 * frequency), torch.sin(2 * frequency), torch.cos(2 * frequency)]
    )
    torch.testing.assert_close(own[0, 1 + 2 * 6 + 4], expected.float())
    # At twice the side a patch's centre lies a quarter of a patch beside that of the patch it halves.
    quarter = torch.cat([torch.sin(3.75 * frequency), torch.cos(3.75 * frequency)]).float()
    torch.testing.assert_close(double[0, 1 + 4 * 12 + 8, : WIDTH // 2], quarter)


def test_the_printed_python_works_as_it_stands(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert export.main([str(trained), "--out", str(tmp_path / "it's out")]) == 0
    sentence, python = capsys.readouterr().out.split("\n\n", 1)
    assert "daae-tiny at step 2" in sentence
    pictures = random_pictures(SIDE)
    names: dict[str, Any] = {"images": pictures.permute(0, 3, 1, 2)}
    exec(python, names)
    features = names["features"].detach()
    torch.testing.assert_close(features, our_tokens(trained, pictures)[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


def test_config_says_what_it_is_and_where_it_comes_from(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert export.main([str(trained), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() <= printed.items()
    state = json.loads((trained / "checkpoints" / "step_000000002" / "state.json").read_text())
    expected = {
        "img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "mean": list(MEAN),
        "std": list(STD), "preset": "daae-tiny", "objective": "daae", "step": 2, "images_seen": 16, "images": 24,
        "data": state["data"], "code": json.loads((trained / "env.json").read_text())["code"], "norm_eps": 1e-6,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert config["difference_from_timm"] < 1e-5
    import timm

    built = eval(config["timm_call"], {"timm": timm})
    assert built.state_dict().keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode
    assert mode & stat.S_IRUSR
    assert bool(mode & stat.S_IROTH) == bool((tmp_path / "out" / "config.json").stat().st_mode & stat.S_IROTH)


def test_a_checkpoint_can_be_chosen_and_an_export_replaced(copied: Path, capsys: pytest.CaptureFixture):
    assert export.main([str(copied), "--checkpoint", "1"]) == 0
    out = copied / "export"
    first = load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["step"] == 1
    assert export.main([str(copied)]) == 0
    assert json.loads((out / "config.json").read_text())["step"] == 2
    assert not torch.equal(
        first["blocks.1.mlp.fc1.weight"], load_file(out / "model.safetensors")["blocks.1.mlp.fc1.weight"]
    )
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    capsys.readouterr()
    assert run(export.main, [str(copied), "--checkpoint", "9"]) == 3
    assert "no checkpoint of step 9 (it has: 1, 2)" in capsys.readouterr().err


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_refused(copied: Path, capsys: pytest.CaptureFixture):
    flip_a_bit(copied / "checkpoints" / "step_000000002" / "model.safetensors")
    assert run(export.main, [str(copied), "--checkpoint", "2"]) == 3
    assert "damaged (model.safetensors" in capsys.readouterr().err
    # Without a wish, the one before it is taken, and said so.
    assert run(export.main, [str(copied)]) == 0
    told = capsys.readouterr()
    assert "warning: checkpoint" in told.err
    assert "Taking step 1." in told.err
    assert "at step 1;" in told.out
    shutil.rmtree(copied / "export")
    flip_a_bit(copied / "checkpoints" / "step_000000001" / "model.safetensors")
    assert run(export.main, [str(copied)]) == 3
    assert not (copied / "export").exists()
    assert capsys.readouterr().err.count("\n") == 1


def reseal(point: Path) -> None:
    """Make the manifest vouch for what now lies there."""
    facts = {name: checkpoint._facts(point / name) for name in checkpoint.FILES}
    (point / "manifest.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("fault", ["not finite", "missing weight"])
def test_weights_that_do_not_make_our_encoder_are_refused(copied: Path, fault: str, capsys: pytest.CaptureFixture):
    point = copied / "checkpoints" / "step_000000002"
    weights = load_file(point / "model.safetensors")
    if fault == "not finite":
        weights["encoder.blocks.0.attn.qkv.weight"][3, 3] = float("nan")
    else:
        del weights["encoder.norm.bias"]
    save_file(weights, point / "model.safetensors")
    reseal(point)
    assert run(export.main, [str(copied), "--checkpoint", "2"]) == 3
    words = {"not finite": "differ from ours by nan", "missing weight": "does not fit the run's config.yaml"}
    assert words[fault] in capsys.readouterr().err
    assert not (copied / "export").exists()
    assert not [path.name for path in copied.iterdir() if "partial" in path.name]


def test_a_timm_that_computes_something_else_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch):
    from timm.models import vision_transformer

    right = vision_transformer.VisionTransformer.forward_features

    def other(self, *pictures, **options):
        return right(self, *pictures, **options) * (1 + 5e-5)

    monkeypatch.setattr(vision_transformer.VisionTransformer, "forward_features", other)
    assert run(export.main, [str(copied)]) == 3
    assert not (copied / "export").exists()


def test_without_timm_one_sentence_says_so(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    assert run(export.main, [str(copied)]) == 5
    assert "needs timm" in capsys.readouterr().err
    assert not (copied / "export").exists()


def test_wrong_places_are_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(export.main, [str(tmp_path / "nothing")]) == 3
    assert "is no run folder" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert run(export.main, [str(copied), "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert run(export.main, [str(copied), "--side", "50"]) == 2
    assert "--side 50 is not a multiple of the patch side 8" in capsys.readouterr().err
    shutil.rmtree(copied / "checkpoints")
    assert run(export.main, [str(copied)]) == 3
    assert "has no checkpoint yet" in capsys.readouterr().err
    (copied / "config.yaml").write_text(yaml.safe_dump({"objective": "mea"}))
    assert run(export.main, [str(copied)]) == 2
    assert "Did you mean mae?" in capsys.readouterr().err
