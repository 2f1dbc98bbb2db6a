"""Features of a real store, decoded by a real loader, against a plain forward pass on Pillow's pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.vit import Encoder
from pipeline.errors import UsageError
from pipeline.store import Store
from pipeline.stored import StoredPictures
from pipeline.views import Patches, normalise, patchify
from tests.images import make_folder
from tools import convert
from train.evaluation.features import Features, encoded, small_pixels

COUNT, SIDE = 23, 32  # a prime: no batch but 1 and 23 divides it


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root: Path = tmp_path_factory.mktemp("features")
    make_folder(root / "images", COUNT, 64, 4)
    assert (
        convert.main([str(root / "images"), str(root / "store"), "--backends", "dali", "--workers", "1", "--quiet"])
        == 0
    )
    return Store.open(root / "store")


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(side=SIDE, patch=8, width=32, depth=2, heads=2)


def encode(encoder: Encoder, store: Store, **how) -> Features:
    batches = list(encoded(encoder, store, **how))
    return Features(torch.cat([each.patch_mean for each in batches]), torch.cat([each.cls for each in batches]))


def pixels(store: Store, **how) -> torch.Tensor:
    return torch.cat(list(small_pixels(store, **how)))


def squares(store: Store, side: int, centre: float) -> torch.Tensor:
    """(N, side, side, 3) uint8: Pillow's decode, central square and antialiased bilinear resize of each sample."""
    reader = StoredPictures.in_shards(store)
    made = []
    for sample in range(store.count):
        image = Image.fromarray(reader.picture(sample))
        width, height = image.size
        edge = round(min(width, height) * centre)
        left, top = (width - edge) // 2, (height - edge) // 2
        made.append(
            np.asarray(image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BILINEAR))
        )
    reader.close()
    return torch.from_numpy(np.stack(made))


@pytest.mark.parametrize("centre", [1.0, 0.875])
def test_features_equal_a_plain_forward_pass_in_sample_order(store: Store, encoder: Encoder, centre: float):
    found = encode(encoder, store, side=SIDE, backend="dali", batch=5, centre=centre)
    patches = patchify(normalise(squares(store, SIDE, centre).float() / 255), 8)
    with torch.no_grad():
        (tokens,) = encoder.eval()(Patches(patches, SIDE // 8))
    for ours, plain in ((found.patch_mean, tokens[:, 1:].mean(dim=1)), (found.cls, tokens[:, 0])):
        assert ours.shape == (COUNT, 32)
        assert ours.dtype == torch.float32
        # Decoders differ by a grey level here and there; other pictures differ by far more than that.
        apart = torch.cdist(ours, plain)
        assert torch.equal(apart.argmin(dim=1), torch.arange(COUNT))
        off = apart + torch.eye(COUNT) * 1e9
        assert apart.diagonal().max() < 0.05 * off.min()


@pytest.mark.parametrize("batch", [1, 4, 23, 256])
def test_the_batch_size_changes_nothing_but_rounding(store: Store, encoder: Encoder, batch: int):
    expected = encode(encoder, store, side=SIDE, backend="dali", batch=7)
    found = encode(encoder, store, side=SIDE, backend="dali", batch=batch)
    torch.testing.assert_close(found.patch_mean, expected.patch_mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.cls, expected.cls, rtol=0, atol=2e-6)


def test_the_encoder_is_left_as_it_was(store: Store, encoder: Encoder):
    encoder.train()
    encoder.blocks[0].eval().requires_grad_(False)  # as a frozen part would be
    modes = [part.training for part in encoder.modules()]
    trainable = [weight.requires_grad for weight in encoder.parameters()]
    weights = [weight.detach().clone() for weight in encoder.parameters()]
    seen = []
    hook = encoder.blocks[1].register_forward_pre_hook(
        lambda part, _: seen.append((part.training, torch.is_grad_enabled()))
    )
    found = encode(encoder, store, side=SIDE, backend="dali", batch=8)
    hook.remove()
    assert set(seen) == {(False, False)}
    assert [part.training for part in encoder.modules()] == modes
    assert [weight.requires_grad for weight in encoder.parameters()] == trainable
    assert all(torch.equal(now, then) for now, then in zip(encoder.parameters(), weights, strict=True))
    assert torch.is_grad_enabled()
    assert not found.cls.requires_grad
    # The position code that this pass has made and kept serves a training step.
    assert not encoder.positions(SIDE // 8, torch.device("cpu")).is_inference()
    (tokens,) = encoder(Patches(torch.randn(2, 16, 192), SIDE // 8, torch.tensor([[0, 3], [5, 2]])))
    tokens.sum().backward()
    assert encoder.cls_token.grad is not None
    assert dict(encoder.named_parameters())["blocks.0.mlp.fc1.weight"].grad is None


def test_the_mode_is_restored_when_the_encoder_fails(store: Store, encoder: Encoder):
    def fail(*_):
        raise RuntimeError("out of memory")

    encoder.train().norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode(encoder, store, side=SIDE, backend="dali")
    assert all(part.training for part in encoder.modules())
    assert torch.is_grad_enabled()


def test_lower_precision_works_inside_and_float32_comes_out(store: Store, encoder: Encoder):
    exact = encode(encoder, store, side=SIDE, backend="dali").cls
    rough = encode(
        encoder, store, side=SIDE, backend="dali", precision_context=torch.autocast("cpu", torch.bfloat16)
    ).cls
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)
    assert not torch.is_autocast_enabled("cpu")


def test_a_side_that_no_grid_fits_is_refused(store: Store, encoder: Encoder):
    with pytest.raises(UsageError, match="side 30 is not a multiple of the patch side 8"):
        encode(encoder, store, side=30, backend="dali")


@pytest.mark.parametrize("side", [16, 32])
def test_raw_pixels_are_the_central_square(store: Store, side: int):
    found = pixels(store, side=side, backend="dali", batch=6)
    assert found.shape == (COUNT, 3 * side * side)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    expected = squares(store, side, 1.0).flatten(1).float() / 255
    assert (found - expected).abs().max() <= 4 / 255
    assert ((found - expected).square().mean(dim=1) < 10**-5).all()  # 50 dB, each picture


def test_a_selection_of_samples_has_the_features_of_the_whole(store: Store, encoder: Encoder):
    whole = encode(encoder, store, side=SIDE, backend="dali")
    only = np.array([7, 2, 9])
    some = encode(encoder, store, side=SIDE, backend="dali", batch=2, only=only)
    assert torch.allclose(some.cls, whole.cls[only], atol=1e-5)
    every = pixels(store, side=SIDE, backend="dali")
    assert torch.equal(pixels(store, side=SIDE, backend="dali", only=only), every[only])
