"""The encoder and decoder: positions, sizes, fused calls, and parity with an independent MAE."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.attention import attend_by_products
from model.decoder import Decoder
from model.memory import MomentumCopy
from model.network import Network
from model.norm import LayerNorm
from model.objectives import OBJECTIVES
from model.objectives.daae import DAAE
from model.objectives.mae import MAE
from model.shape import Shape, decoder_macs, encoder_macs
from model.vit import Encoder, patch_mean, sincos_positions
from pipeline.views import Patches, draw_mask
from tests.conftest import SMALL
from tests.networks import COUNTED, LABEL, counted_macs
from train.config import Optim, Run
from train.device import autocast
from train.presets import TINY, VIT_B, VIT_L, VIT_S, VIT_TI
from train.step import noise, views_of


def view(batch: int, grid: int, patch: int, masked: bool, seed: int = 0) -> Patches:
    pixels = torch.randn(batch, grid * grid, 3 * patch**2, generator=torch.Generator().manual_seed(seed))
    if not masked:
        return Patches(pixels, grid)
    return Patches(pixels, grid, *draw_mask(torch.arange(batch), grid * grid, grid * grid // 4, stream=seed))


def test_positions_are_maes_column_first_sines_first():
    code = sincos_positions(16, 3, 3)
    column, row = 2, 1
    omega = [10000 ** (-i / 4) for i in range(4)]
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
    assert code[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_of_a_coarser_grid_lie_where_the_picture_has_the_same_place():
    base, coarse = sincos_positions(768, 14, 14), sincos_positions(768, 7, 14)
    pooled = base.view(7, 2, 7, 2, 768).mean(dim=(1, 3)).view(49, 768)
    assert torch.cosine_similarity(coarse, pooled).min().item() == pytest.approx(0.9998, abs=1e-4)
    raw = sincos_positions(768, 7, 7)
    assert torch.cosine_similarity(raw, pooled).min().item() == pytest.approx(0.74, abs=0.01)
    # On the base's own grid places are plain indices, to the bit.
    assert torch.equal(base.view(14, 14, 768)[:7, :7], raw.view(7, 7, 768))


def test_both_attentions_are_equal_and_so_are_their_gradients():
    query, key, value = torch.randn(3, 2, 4, 17, 16, dtype=torch.float64)
    results = []
    for function in (attend_by_products, torch.nn.functional.scaled_dot_product_attention):
        inputs = [each.clone().requires_grad_() for each in (query, key, value)]
        out = function(*inputs)
        out.square().sum().backward()
        results.append((out.detach(), *(each.grad for each in inputs)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


def test_a_norm_of_bfloat16_tokens_adds_up_its_gradients_in_float32():
    """6,304 tokens: torch's own CPU kernel is off by a twentieth and more."""
    torch.manual_seed(0)
    norm, tokens = LayerNorm(256, eps=1e-6), torch.randn(32, 197, 256).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(norm.bias)
    tokens.requires_grad_()
    inputs, grad = (tokens, norm.weight, norm.bias), torch.randn_like(tokens) + 0.3
    mine = norm(tokens)
    exact = torch.nn.functional.layer_norm(tokens.double(), (256,), norm.weight.double(), norm.bias.double(), 1e-6)
    assert mine.dtype == torch.bfloat16
    found = zip(
        (mine, *torch.autograd.grad(mine, inputs, grad)), (exact, *torch.autograd.grad(exact, inputs, grad.double())),
        strict=True,
    )  # fmt: skip
    for one, other in found:
        assert (one.double() - other).norm() <= 0.005 * other.norm()


@pytest.mark.parametrize("method", [MAE(), DAAE(contrast_weight=1.0, head_norm="layer")])
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(method):
    torch.manual_seed(0)
    shape = Shape(side=64, patch=8, width=96, depth=4, heads=3, decoder_width=96, decoder_depth=2, decoder_heads=3)
    run = Run(objective=type(method).__name__.lower(), method=method, model=shape, optim=Optim(batch=64, lr=1e-3))
    batch, found = noise(run, 64, torch.device("cpu")), []
    for precision in ("bf16", "fp32"):
        network, between = Network(method, shape, 0), set()
        for block in (*network.encoder.blocks, *network.parts["decoder"].blocks):
            block.register_forward_pre_hook(lambda _, inputs, seen=between: seen.add(inputs[0].dtype))
        with autocast(torch.device("cpu"), precision):
            terms = method.loss(network, views_of(run, batch), batch.label).terms
        assert all(term.dtype == torch.float32 for term in terms.values())
        assert between == {torch.bfloat16 if precision == "bf16" else torch.float32}  # what runs through the blocks
        sum(terms.values()).backward()
        found.append({name: each.grad for name, each in network.named_parameters()})
    for name, mine in found[0].items():
        assert (mine - found[1][name]).norm() <= 0.15 * found[1][name].norm(), name
    mine, exact = (torch.cat([each.flatten() for each in one.values()]) for one in found)
    assert (mine - exact).norm() <= 0.03 * exact.norm()


def test_one_call_over_both_views_equals_two_calls():  # T-D1
    encoder = Network(DAAE(), SMALL, 0).encoder
    holed, small = view(3, 4, 8, True), view(3, 2, 8, False)
    assert holed.tokens == small.tokens == 4
    together = encoder(holed, small)
    apart = [encoder(holed)[0], encoder(small)[0]]
    gradients = []
    for codes in (together, apart):
        torch.stack([code.pow(3).sum() for code in codes]).sum().backward()
        gradients.append({name: each.grad for name, each in encoder.named_parameters()})
        encoder.zero_grad()
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert one.shape == (3, 5, 32)
    for name, one in gradients[0].items():
        assert (one - gradients[1][name]).norm() <= 1e-5 * one.norm() + 1e-6, name


def test_views_of_unequal_length_are_encoded_too():
    encoder = Encoder(side=32, patch=8, width=32, depth=1, heads=2)
    holed, other = encoder(view(2, 4, 8, True), view(2, 3, 8, False))
    assert holed.shape == (2, 5, 32)
    assert other.shape == (2, 10, 32)


def test_branches_that_are_left_out_are_each_images_own():
    """In one call for several views, and under a block's own scale: drop-path."""
    encoder = Encoder(side=32, patch=8, width=32, depth=3, heads=2)
    views = [view(2, 4, 8, True), view(2, 2, 8, False), view(2, 4, 8, False)]
    scales = torch.tensor([0.0, 1, 2])[torch.randint(3, (3, 2, 3, 2), generator=torch.Generator().manual_seed(0))]
    dropped = [replace(each, branches=scale) for each, scale in zip(views, scales, strict=True)]
    together = encoder(*dropped)
    for each, scale, code in zip(views, scales, together, strict=True):
        tokens = torch.cat([encoder.cls_token.expand(2, -1, -1), encoder.embed(each)], dim=1)
        for place, block in enumerate(encoder.blocks):
            attention, mlp = scale[:, place, 0, None, None], scale[:, place, 1, None, None]
            tokens = tokens + attention * block.attn(block.norm1(tokens))
            tokens = tokens + mlp * block.mlp(block.norm2(tokens))
        assert torch.allclose(code, encoder.norm(tokens), atol=1e-5)
    ones = [replace(each, branches=torch.ones(2, 3, 2)) for each in views]
    for code, plain in zip(encoder(*ones), encoder(*views), strict=True):
        assert torch.allclose(code, plain, atol=1e-6)


def test_embedding_visible_pixels_equals_gathering_embedded_ones():
    encoder = Encoder(side=32, patch=8, width=32, depth=1, heads=2)
    masked = view(2, 4, 8, True)
    every = encoder.embed(Patches(masked.pixels, 4))
    assert masked.keep is not None
    gathered = every.gather(1, masked.keep[:, :, None].expand(-1, -1, 32))
    assert torch.allclose(encoder.embed(masked), gathered, atol=1e-5)


def test_parameter_counts_of_vit_b():  # T-M6; positions are fixed and no parameters here
    network = Network(MAE(), VIT_B, 0)
    encoder = sum(p.numel() for p in network.encoder.parameters())
    decoder = sum(p.numel() for p in network.parts["decoder"].parameters())
    assert encoder == pytest.approx(85.65e6, rel=1e-3)
    assert decoder == pytest.approx(26.0e6, rel=2e-3)


@pytest.mark.parametrize(
    ("shape", "mae", "daae"),
    [(VIT_TI, 4.30, 6.00), (VIT_S, 10.99, 17.59), (VIT_B, 58.05, 83.98), (VIT_L, 123.7, 215.3)],
)
def test_flops_per_image_and_step(shape, mae, daae):
    heads = 6 * (2 * DAAE().head_hidden * (shape.width + DAAE().head_out)) / 1e9
    assert 6 * MAE().macs(shape) / 1e9 == pytest.approx(mae, rel=0.002)
    assert 6 * DAAE().macs(shape) / 1e9 - heads == pytest.approx(daae, rel=0.002)


@pytest.mark.parametrize("target", ["stop", "ema"])
def test_a_view_without_gradient_costs_a_third(target):
    assert DAAE(target=target).macs(VIT_B) / MAE().macs(VIT_B) == pytest.approx(1.15, abs=0.005)


def test_formula_counts_what_torch_multiplies():
    expected = encoder_macs(COUNTED, 16) + decoder_macs(COUNTED, 16, 48)
    assert counted_macs(MAE(), COUNTED, LABEL[:2]) == pytest.approx(expected, rel=0.01)


def test_weights_depend_on_the_seed_and_objectives_share_the_encoder():
    before = torch.random.get_rng_state()
    one, same, other = Network(MAE(), TINY, 0), Network(DAAE(), TINY, 0), Network(MAE(), TINY, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in one.encoder.state_dict().items():
        assert torch.equal(weight, same.encoder.state_dict()[name])
    assert not torch.equal(one.encoder.cls_token, other.encoder.cls_token)
    bound = math.sqrt(6 / (192 + TINY.width))  # Xavier for the patch projection as a matrix
    assert one.encoder.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert one.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_momentum_copy_follows_and_is_never_trained():  # T-B1, T-B5
    source = torch.nn.Linear(4, 4)
    copy = MomentumCopy(torch.nn.Linear(4, 4))
    copy.follow(source, 0.0)
    assert torch.equal(copy.module.weight, source.weight)  # pyright: ignore[reportArgumentType]
    start = source.weight.detach().clone()
    with torch.no_grad():
        source.weight.add_(1.0)
    for _ in range(5):
        copy.follow(source, 0.9)
    closed_form = start + (1 - 0.9**5)
    assert torch.allclose(copy.module.weight, closed_form, atol=1e-6)  # pyright: ignore[reportArgumentType]
    before = copy.module.weight.clone()  # pyright: ignore[reportCallIssue]
    copy.follow(source, 1.0)
    assert torch.equal(copy.module.weight, before)  # pyright: ignore[reportArgumentType]
    assert not any(p.requires_grad for p in copy.parameters())


@pytest.fixture(scope="module")
def hugging_face():
    """An independent MAE and ours with its weights, mask and pixels."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=128, mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = ViTMAEForPreTraining(config).train()
    shape = Shape(side=32, patch=8, width=48, depth=3, heads=4, decoder_width=32, decoder_depth=2, decoder_heads=2)
    ours = Network(MAE(), shape, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases start at zero: make every weight count
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        # Its position code is a stored tensor in a layout of its own (rows first); ours has MAE's, tested above.
        theirs.vit.embeddings.position_embeddings[0, 1:] = sincos_positions(48, 4, 4)
        theirs.decoder.decoder_pos_embed[0, 1:] = sincos_positions(32, 4, 4)
    ours.load_state_dict(translated(theirs.state_dict(), 8))
    return theirs, ours


def in_channel_order(rows: torch.Tensor, patch: int) -> torch.Tensor:
    """MAE predicts a patch as (row, column, channel); here it is (channel, row, column)."""
    return rows.view(patch, patch, 3, *rows.shape[1:]).permute(2, 0, 1, *range(3, rows.ndim + 2)).reshape(rows.shape)


def translated(theirs: dict[str, torch.Tensor], patch: int) -> dict[str, torch.Tensor]:
    ours = {
        "encoder.cls_token": theirs["vit.embeddings.cls_token"],
        "encoder.patch_embed.proj.weight": theirs["vit.embeddings.patch_embeddings.projection.weight"],
        "encoder.patch_embed.proj.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
        "parts.decoder.mask_token": theirs["decoder.mask_token"],
    }
    for kind in ("weight", "bias"):
        ours[f"encoder.norm.{kind}"] = theirs[f"vit.layernorm.{kind}"]
        ours[f"parts.decoder.embed.{kind}"] = theirs[f"decoder.decoder_embed.{kind}"]
        ours[f"parts.decoder.norm.{kind}"] = theirs[f"decoder.decoder_norm.{kind}"]
        ours[f"parts.decoder.pred.{kind}"] = in_channel_order(theirs[f"decoder.decoder_pred.{kind}"], patch)
        for mine, other in (("encoder.blocks", "vit.layers"), ("parts.decoder.blocks", "decoder.decoder_layers")):
            for i in range(10):
                layer = f"{other}.{i}"
                if f"{layer}.layernorm_before.weight" not in theirs:
                    break
                qkv = [theirs[f"{layer}.attention.{each}_proj.{kind}"] for each in "qkv"]
                ours[f"{mine}.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
                ours[f"{mine}.{i}.attn.proj.{kind}"] = theirs[f"{layer}.attention.o_proj.{kind}"]
                ours[f"{mine}.{i}.norm1.{kind}"] = theirs[f"{layer}.layernorm_before.{kind}"]
                ours[f"{mine}.{i}.norm2.{kind}"] = theirs[f"{layer}.layernorm_after.{kind}"]
                ours[f"{mine}.{i}.mlp.fc1.{kind}"] = theirs[f"{layer}.mlp.fc1.{kind}"]
                ours[f"{mine}.{i}.mlp.fc2.{kind}"] = theirs[f"{layer}.mlp.fc2.{kind}"]
    return ours


def test_mae_equals_the_one_of_transformers_in_loss_and_gradients(hugging_face):
    from pipeline.views import patchify

    theirs, ours = hugging_face
    generator = torch.Generator().manual_seed(5)
    images, noise = torch.randn(4, 3, 32, 32, generator=generator), torch.rand(4, 16, generator=generator)
    loss = theirs(pixel_values=images, noise=noise).loss
    loss.backward()
    order = noise.argsort(dim=1)
    holed = Patches(patchify(images.permute(0, 2, 3, 1), 8), 4, order[:, :4], order[:, 4:])
    mine = ours({"holed": holed}, torch.zeros(4)).terms["reconstruct"]
    mine.backward()
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = translated(gradients, 8)
    compared = 0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = expected[name].norm()
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * scale + 1e-9, name
        compared += 1
    assert compared == len(expected) == 4 + 2 * 4 + 5 * 12


def test_decoder_sees_visible_tokens_at_their_own_cells():  # T-M3
    decoder = Decoder(encoder_width=16, width=16, depth=0, heads=2, grid=4, values=12)
    with torch.no_grad():
        decoder.embed.weight.copy_(torch.eye(16))
    decoder.norm = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    keep, hidden = draw_mask(torch.arange(2), 16, 4, stream=1)
    code = torch.randn(2, 5, 16)
    _, tokens = decoder(code, Patches(torch.zeros(2, 16, 12), 4, keep, hidden), hidden)
    positions = decoder.positions(4, torch.device("cpu"))
    for b in range(2):
        for k in range(4):
            assert torch.allclose(tokens[b, 1 + k], code[b, 1 + k] + positions[keep[b, k]])
        for m in range(12):
            assert torch.allclose(tokens[b, 5 + m], decoder.mask_token[0, 0] + positions[hidden[b, m]])


def test_patch_mean_leaves_the_class_token_out():
    tokens = torch.tensor([[[100.0], [1.0], [3.0]]])
    assert patch_mean(tokens).item() == 2


def test_table_of_methods_says_what_each_is():
    for objective in OBJECTIVES.values():
        assert objective.idea
        assert objective.paper
        assert not str(objective.__doc__).startswith(f"{objective.__name__}(")  # what @dataclass writes where none is
