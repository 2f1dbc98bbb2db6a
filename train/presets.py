"""One function per recipe that we report or that was published: `--preset NAME`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from model.objectives import OBJECTIVES, Objective
from model.objectives.byol import BYOL
from model.objectives.can import CAN
from model.objectives.clsa import CLSA
from model.objectives.daae import DAAE
from model.objectives.mae import MAE
from model.objectives.mixedae import MixedAE
from model.objectives.mocov2 import MoCoV2
from model.objectives.mocov3 import MoCoV3
from model.objectives.selfcon import SelfCon
from model.objectives.simclr import SimCLR
from model.objectives.supcon import SupCon
from model.objectives.swav import SwAV
from model.objectives.two_views import TwoViews
from model.shape import Shape
from pipeline.errors import UsageError
from train import adainf
from train.command import nearest
from train.config import Budget, Optim, Run, of_type, typed

TINY = Shape(
    side=64, patch=8, width=192, depth=6, heads=3, decoder_width=192, decoder_depth=2, decoder_heads=6
)  # fmt: skip
VIT_TI = Shape(width=192, depth=12, heads=3, decoder_width=192, decoder_depth=4, decoder_heads=6)
VIT_S = Shape(width=384, depth=12, heads=6, decoder_width=256, decoder_depth=4, decoder_heads=8)
VIT_B = Shape(width=768, depth=12, heads=12, decoder_width=512, decoder_depth=8, decoder_heads=16)
VIT_L = Shape(width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=8, decoder_heads=16)
VIT_H = Shape(patch=14, width=1280, depth=32, heads=16, decoder_width=512, decoder_depth=8, decoder_heads=16)
VIT_TI_96 = Shape(side=96, patch=8, width=192, depth=12, heads=3, decoder_width=192, decoder_depth=4, decoder_heads=6)
VIT_S_128 = Shape(side=128, patch=8, width=384, depth=12, heads=6, decoder_width=256, decoder_depth=4, decoder_heads=8)

# MAE's ImageNet recipe (He et al. 2021, released code): AdamW (0.9, 0.95), decay 0.05, base rate 1.5e-4 at batch 4096.
PUBLISHED = Optim(batch=4096, base_lr=1.5e-4, warmup_epochs=40, warmup_share=0.2)
# SwAV's on a ViT, as DINO (Caron et al. 2021, arXiv 2104.14294) trains one.
PUBLISHED_SWAV = Optim(
    batch=4096, base_lr=5e-4, warmup_epochs=10, warmup_share=0.2, weight_decay=0.04, weight_decay_end=0.4,
    betas=(0.9, 0.999), clip_grad=3.0,
)  # fmt: skip
# CAN's released example: batch 1024, a base rate of 2.5e-4.
PUBLISHED_CAN = replace(PUBLISHED, batch=1024, base_lr=2.5e-4)
# SelfCon's batch on a ViT: 5e-4 per 256 images, 2e-3 at most. Its own recipe, SGD at a rate of 0.25, is for a ResNet.
PUBLISHED_SELFCON = Optim(
    batch=2048, base_lr=5e-4, max_lr=2e-3, warmup_epochs=10, warmup_share=0.2, betas=(0.9, 0.999)
)  # fmt: skip
# For small sets and short runs: a fixed peak rate, warm-up of a twentieth of the run.
SMALL_DATA = Optim(batch=512, lr=1e-3, warmup_epochs=40, warmup_share=0.05)
TINY_OPTIM = Optim(batch=128, lr=1e-3, warmup_epochs=40, warmup_share=0.05)
# MoCo v3's for contrastive ViTs (Chen et al. 2021, section 5): MAE's rate, slower second moments, more decay.
PUBLISHED_PAIRS = replace(PUBLISHED, betas=(0.9, 0.999), weight_decay=0.1)

Recipe = Callable[[], Run]
PRESETS: dict[str, Recipe] = {}


def preset(name: str) -> Callable[[Recipe], Recipe]:
    def keep(make: Recipe) -> Recipe:
        PRESETS[name] = make
        return make

    return keep


NAMES = {method: name for name, method in OBJECTIVES.items()}


def recipe(method: Objective, shape: Shape, optim: Optim, epochs: float) -> Run:
    objective = NAMES[type(method)]
    return Run(objective=objective, method=method, model=shape, optim=optim, budget=Budget(epochs=epochs))


def daae_small(shape: Shape, optim: Optim, epochs: float, **options) -> Run:
    """For small sets the contrastive term has a weight of 1, and a quarter of the hidden patches is decoded: the rest
    cost a quarter of the step and brought nothing (docs/lab.md, 1 and 3; Fu et al. 2024, arXiv 2401.14391, find the
    same on ImageNet)."""
    return recipe(DAAE(contrast_weight=1.0, decoded_share=0.25, **options), shape, optim, epochs)


def swav_small(shape: Shape, optim: Optim, epochs: float, **options) -> Run:
    """For small sets: a rate of 5e-4 at most, four crops of half the side, and codes made with an epsilon of 0.03 where
    the published one is 0.05.

    As long as all images score nearly alike the pull on a score is (s_other / epsilon - s_own / temperature) / K: what
    tells images apart grows only if it agrees between views with a correlation above epsilon / temperature. At 0.5, as
    published, short runs on small pictures stay at a loss of ln K; SwAV's README then advises 0.03, or softer views.
    """
    optim = replace(optim, lr=5e-4, weight_decay=0.04, betas=(0.9, 0.999), clip_grad=3.0)
    return recipe(SwAV(local_views=4, local_side=0.5, epsilon=0.03, **options), shape, optim, epochs)


@preset("mae-tiny")
def mae_tiny() -> Run:
    """64 px, encoder 192 x 6: minutes on a CPU. `make demo` runs it."""
    return recipe(MAE(), TINY, TINY_OPTIM, 40)


@preset("daae-tiny")
def daae_tiny() -> Run:
    """64 and 32 px, encoder 192 x 6: minutes on a CPU. `make demo` runs it."""
    return daae_small(TINY, TINY_OPTIM, 30)


@preset("contrast-tiny")
def contrast_tiny() -> Run:
    """DAAE's two views without the decoder: what the contrastive term does alone."""
    return daae_small(TINY, TINY_OPTIM, 40, reconstruct_weight=0.0)


@preset("mixedae-tiny")
def mixedae_tiny() -> Run:
    """64 px, four pictures mixed into one, encoder 192 x 6: minutes on a CPU."""
    return recipe(MixedAE(), TINY, TINY_OPTIM, 40)


@preset("can-tiny")
def can_tiny() -> Run:
    """Two views of 64 px, half of each hidden, encoder 192 x 6: minutes on a CPU."""
    return recipe(CAN(), TINY, TINY_OPTIM, 20)


@preset("selfcon-tiny")
def selfcon_tiny() -> Run:
    """64 px, encoder 192 x 6 with an exit after 3 blocks: minutes on a CPU. Learns from labels."""
    return recipe(SelfCon(head_hidden=512), TINY, replace(TINY_OPTIM, lr=5e-4), 40)


@preset("swav-tiny")
def swav_tiny() -> Run:
    """2 x 64 and 4 x 32 px, encoder 192 x 6: minutes on a CPU. Larger crops than SwAV's, half its colour changes and no
    blur: in small pictures these leave too little for views to agree on."""
    return swav_small(
        TINY, TINY_OPTIM, 20, area=(0.2, 1.0), local_area=(0.2, 0.5), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0,
        prototypes=300, queue=1920, freeze_steps=30, head_hidden=512,
    )  # fmt: skip


# The slides' augmentation table: what happens to the small view.
AUGMENTATION_ROWS = {
    "resize": {"share_crop": True, "jitter": (0.0,) * 4, "gray": 0.0},
    "crop": {"jitter": (0.0,) * 4, "gray": 0.0},
    "colour": {},
    "crop08": {"area": (0.08, 1.0), "jitter": (0.0,) * 4, "gray": 0.0},
}


def _augmentation(name: str, options: dict) -> None:
    @preset(f"daae-tiny-{name}")
    def row() -> Run:
        return daae_small(TINY, TINY_OPTIM, 30, **options)

    row.__doc__ = f"Row '{name}' of the slides' augmentation table, at tiny size."


for _name, _options in AUGMENTATION_ROWS.items():
    _augmentation(_name, _options)


def _sizes(name: str, shape: Shape) -> None:
    """A pair of an encoder size for own images."""

    @preset(f"mae-{name}")
    def masked() -> Run:
        return recipe(MAE(), shape, SMALL_DATA, 400)

    @preset(f"daae-{name}")
    def both() -> Run:
        return daae_small(shape, SMALL_DATA, 300)

    masked.__doc__ = f"{name} at {shape.side} px, for own images: 400 epochs."
    cost = both().method.macs(shape) / masked().method.macs(shape)
    both.__doc__ = f"{name} at {shape.side} px, for own images: 300 epochs of {cost:.2f} times MAE's cost each."


@preset("mixedae-vits16")
def mixedae_vits16() -> Run:
    """vits16 at 224 px, for own images: 400 epochs, about the time of 400 of MAE."""
    return recipe(MixedAE(), VIT_S, SMALL_DATA, 400)


@preset("can-vits16")
def can_vits16() -> Run:
    """vits16 at 224 px, for own images: 400 epochs, about three times the time of 400 of MAE."""
    return recipe(CAN(), VIT_S, SMALL_DATA, 400)


@preset("can-vitl16")
def can_vitl16() -> Run:
    """vitl16 at 224 px, for own images: 400 epochs."""
    return recipe(CAN(), VIT_L, SMALL_DATA, 400)


@preset("selfcon-vits16")
def selfcon_vits16() -> Run:
    """vits16 at 224 px, for own images with labels: 400 epochs."""
    return recipe(SelfCon(head_hidden=512), VIT_S, replace(SMALL_DATA, lr=5e-4), 400)


@preset("swav-vits16")
def swav_vits16() -> Run:
    """vits16 at 2 x 224 and 4 x 112 px, 500 prototypes, for own images: 400 epochs."""
    return swav_small(VIT_S, SMALL_DATA, 400, prototypes=500, queue=3584, freeze_steps=100)


for _name, _shape in {
    "vitti16": VIT_TI, "vits16": VIT_S, "vitb16": VIT_B, "vitl16": VIT_L, "vith14": VIT_H,
    "vitti8-96": VIT_TI_96, "vits8-128": VIT_S_128,
    # Heads of 64 in the decoder instead of MAE's 32: the same work, less of it in attention, another model.
    "vits16-h64": replace(VIT_S, decoder_heads=4), "vitb16-h64": replace(VIT_B, decoder_heads=8),
}.items():  # fmt: skip
    _sizes(_name, _shape)


@preset("mae-vitb16-in1k-1600")
def mae_vitb16_in1k() -> Run:
    """The slides' baseline: ImageNet-1K, 1600 epochs, 83.3% there (83.6% in MAE's paper), 2.05 times DAAE's time."""
    return recipe(MAE(), VIT_B, PUBLISHED, 1600)


@preset("daae-vitb16-in1k-600")
def daae_vitb16_in1k() -> Run:
    """The slides' claim: ImageNet-1K, 600 epochs, 83.5%."""
    return recipe(DAAE(), VIT_B, PUBLISHED, 600)


@preset("mixedae-vitb16-in1k-1600")
def mixedae_vitb16_in1k() -> Run:
    """MixedAE's own: ImageNet-1K, 1600 epochs of MAE's recipe, 0.3% above MAE after fine-tuning in its paper."""
    return recipe(MixedAE(), VIT_B, PUBLISHED, 1600)


@preset("can-vitb16-in1k-800")
def can_vitb16_in1k() -> Run:
    """CAN on ImageNet-1K: 800 epochs, the fewer of its paper's 800 to 1600, with the optimizer of its code's example;
    74.8% by a linear probe in its abstract, at whichever length that was."""
    return recipe(CAN(), VIT_B, PUBLISHED_CAN, 800)


@preset("selfcon-vitb16-in1k-800")
def selfcon_vitb16_in1k() -> Run:
    """SelfCon on ImageNet-1K: 800 epochs of its batches of 2048, as its script trains a ResNet, with a ViT's optimizer
    and drop-path."""
    return recipe(SelfCon(drop_path=0.1), VIT_B, PUBLISHED_SELFCON, 800)


@preset("swav-vits16-in1k-300")
def swav_vits16_in1k() -> Run:
    """SwAV on ImageNet-1K, 2 x 224 and 6 x 96 px, 300 epochs by DINO's recipe for a ViT."""
    return recipe(SwAV(drop_path=0.1), VIT_S, PUBLISHED_SWAV, 300)


@preset("mae-vitb16-mini-800")
def mae_vitb16_mini() -> Run:
    """The slides' ImageNet-mini baseline: 800 epochs, 42.5%, 1.08 times the time of DAAE's 550."""
    return recipe(MAE(), VIT_B, PUBLISHED, 800)


@preset("daae-vitb16-mini-550")
def daae_vitb16_mini_550() -> Run:
    """The slides on ImageNet-mini: 550 epochs, 42.8%."""
    return recipe(DAAE(), VIT_B, PUBLISHED, 550)


@preset("daae-vitb16-mini-800")
def daae_vitb16_mini_800() -> Run:
    """The slides on ImageNet-mini: 800 epochs, 44.8%, 1.45 times the time of 550."""
    return recipe(DAAE(), VIT_B, PUBLISHED, 800)


def _pairs(name: str, published: TwoViews, small: TwoViews, *, decay: float = 0.1, epochs: int = 300, **tiny) -> None:
    """A method that compares two views, at three sizes. small: as it is for own images; tiny: what differs at 64 px."""
    gentle = {"lr": 5e-4, "weight_decay": decay}
    # Below 100 px a crop of 8 % leaves nothing to recognise.
    at_64 = replace(small, area=(0.2, 1.0), **tiny)

    def keep(size: str, method: TwoViews, shape: Shape, optim: Optim, epochs: int, about: str) -> None:
        def one() -> Run:
            return recipe(method, shape, optim, epochs)

        one.__doc__ = about
        preset(f"{name}-{size}")(one)

    keep("tiny", at_64, TINY, replace(TINY_OPTIM, **gentle), 40, f"64 px, encoder 192 x 6: {small.idea}.")
    keep("vits16", small, VIT_S, replace(SMALL_DATA, **gentle), 400, "vits16 at 224 px, for own images: 400 epochs.")
    about = f"ImageNet-1K, {epochs} epochs: {published.paper}, trained as MoCo v3 trains ViTs."
    keep(f"vitb16-in1k-{epochs}", published, VIT_B, PUBLISHED_PAIRS, epochs, about)


SMALL_SIMCLR = SimCLR(temperature=0.2, head_hidden=512)
_pairs("simclr", SimCLR(head_out=256), SMALL_SIMCLR)
_pairs("supcon", SupCon(), SupCon(head_hidden=512), decay=0.05)
_pairs("mocov2", MoCoV2(), MoCoV2(queue=4096, momentum=0.99, momentum_rises=True, head_hidden=1024), queue=1024)
_pairs("mocov3", MoCoV3(feature="cls"), MoCoV3(head_hidden=1024, head_out=128))
_pairs("byol", BYOL(momentum=0.99), BYOL(momentum=0.99, head_hidden=1024, head_out=128))
VIT_CLSA = CLSA(momentum=0.99, momentum_rises=True)
SMALL_CLSA = replace(VIT_CLSA, queue=4096, head_hidden=1024)
_pairs("clsa", VIT_CLSA, SMALL_CLSA, epochs=200, queue=1024, strong=(0.5,))


@preset("clsa-vitb16-in1k-200-multi")
def clsa_vitb16_in1k_multi() -> Run:
    """CLSA's multi-crop on ImageNet-1K, 5 weak and 5 strong views of 96 to 224 px, 200 epochs: almost four times the
    work of clsa-vitb16-in1k-200. Means over views and pairs, where the paper has sums, so that a ViT trains stably."""
    sides = tuple(sevenths / 7 for sevenths in (7, 6, 5, 4, 3))
    several = replace(VIT_CLSA, weak=sides, strong=sides, reduction="mean")
    return replace(PRESETS["clsa-vitb16-in1k-200"](), method=several)


@preset("simclr-vitl16")
def simclr_vitl16() -> Run:
    """vitl16 at 224 px, for own images: 400 epochs. CAN's paper compares the two at this size (can-vitl16)."""
    return replace(PRESETS["simclr-vits16"](), model=VIT_L)


def _weaker(name: str, size: str) -> None:
    """AdaInf's augmentation, for generated images beside real ones."""
    strong = PRESETS[f"{name}-{size}"]

    def weak() -> Run:
        run = strong()
        assert isinstance(run.method, TwoViews)
        return replace(run, method=adainf.weaker(run.method))

    weak.__doc__ = f"{name}-{size} with AdaInf's weaker augmentation, for generated images beside real ones."
    preset(f"{name}-{size}-weak")(weak)


for _name, _size in itertools.product(adainf.BASES, ("tiny", "vits16", "vitb16-in1k-300")):
    _weaker(_name, _size)


def open_preset(name: str) -> Run:
    """Raises UsageError with the nearest name."""
    if name not in PRESETS:
        raise UsageError(
            f"--preset {name} is unknown.{nearest(name, PRESETS)} `daae pretrain --list-presets` names all."
        )
    run = PRESETS[name]()
    return replace(of_type(run, typed(run.objective)), preset=name)
