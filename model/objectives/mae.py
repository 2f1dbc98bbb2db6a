"""Masked autoencoder: repaint the patches that the encoder did not see. He et al. 2021, arXiv 2111.06377."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from model.objectives.base import Objective, Outcome
from model.shape import Shape, decoder_macs, encoder_macs
from pipeline.errors import UsageError
from pipeline.masks import kept_count

if TYPE_CHECKING:
    from torch import Tensor

    from model.decoder import Decoder
    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches


def build_decoder(shape: Shape) -> Decoder:
    from model.decoder import Decoder

    return Decoder(
        encoder_width=shape.width, width=shape.decoder_width, depth=shape.decoder_depth, heads=shape.decoder_heads,
        grid=shape.grid, values=shape.values,
    )  # fmt: skip


def decoded_count(shape: Shape, mask_ratio: float, share: float) -> tuple[int, int]:
    """How many patches are kept, and how many of the hidden ones are decoded."""
    kept = kept_count(shape.patches, mask_ratio)
    return kept, max(1, round(share * (shape.patches - kept)))


def check_shares(mask_ratio: float, decoded_share: float) -> None:
    """Raises UsageError where nothing would be hidden, seen or decoded."""
    if not 0 < mask_ratio < 1:
        raise UsageError(f"--method.mask-ratio {mask_ratio:g}: lies between 0 and 1, MAE's is 0.75.")
    check_decoded(decoded_share)


def check_decoded(decoded_share: float) -> None:
    """Raises UsageError where nothing would be decoded."""
    if not 0 < decoded_share <= 1:
        raise UsageError(f"--method.decoded-share {decoded_share:g}: a share above 0, at most 1.")


@dataclass(frozen=True, kw_only=True)
class MAE(Objective):
    """Encode a quarter of the patches, predict the pixels of the others with a light decoder."""

    idea: ClassVar[str] = "repaint hidden patches"
    paper: ClassVar[str] = "He et al. 2021, arXiv 2111.06377"

    mask_ratio: float = 0.75
    """Share of the patches hidden from the encoder."""
    norm_pix: bool = True
    """Predict each patch normalised by its own mean and deviation."""
    decoded_share: float = 1.0
    """Share of the hidden patches that are decoded and scored, drawn anew each step; MAE decodes all."""
    area: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue changes; MAE uses none."""
    gray: float = 0.0
    """Probability of grayscale; MAE uses none."""

    def check(self, batch: int, images: int | None = None) -> None:
        check_shares(self.mask_ratio, self.decoded_share)

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        return {
            "holed": View(
                side=shape.side, area=self.area, mask_ratio=self.mask_ratio, jitter=self.jitter, gray=self.gray
            )
        }

    def parts(self, shape: Shape) -> dict:
        return {"decoder": build_decoder(shape)}

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        holed = views["holed"]
        (code,) = net.encoder(holed)  # (B, 1 + K, D)
        return Outcome({"reconstruct": reconstruction(net, code, holed, self.decoded_share, self.norm_pix)}, {})

    def macs(self, shape: Shape) -> int:
        kept, decoded = decoded_count(shape, self.mask_ratio, self.decoded_share)
        return encoder_macs(shape, kept) + decoder_macs(shape, kept, decoded)


def reconstruction(net: Network, code: Tensor, holed: Patches, share: float, norm_pix: bool) -> Tensor:
    """MAE's loss on `share` of the hidden patches of a view that the encoder has turned into `code`."""
    assert holed.hidden is not None
    hidden = scored_patches(holed.hidden, share)
    predicted, _ = net.parts["decoder"](code, holed, hidden)
    return repaint_loss(predicted, holed, hidden, norm_pix)


def scored_patches(hidden: Tensor, share: float) -> Tensor:
    """(B, M): the hidden patches that are decoded. They come in random order, so the first ones are a random subset."""
    return hidden if share == 1.0 else hidden[:, : max(1, round(share * hidden.shape[1]))]


def repaint_loss(predicted: Tensor, holed: Patches, hidden: Tensor, norm_pix: bool) -> Tensor:
    from model.losses import masked_mse
    from pipeline.views import take

    return masked_mse(predicted, take(holed.pixels, hidden), norm_pix=norm_pix)
