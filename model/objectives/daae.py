"""DAAE: agree on two cheap views of one image, and repaint the one with holes. Pan and Wei 2022 (slides).

The masked full-size view and the downsampled view cost the encoder a quarter of the tokens each; at 75% masking and
half the side the counts are equal and both go through as one batch. What the slides leave open (head, temperature,
weight, which features) is an option here, with our default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from model.objectives.base import Objective, Outcome
from model.objectives.mae import build_decoder, check_shares, decoded_count, repaint_loss, scored_patches
from model.shape import Norm, Shape, decoder_macs, encoder_macs, head_macs
from pipeline.errors import UsageError
from pipeline.masks import kept_count

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches


@dataclass(frozen=True, kw_only=True)
class DAAE(Objective):
    """Contrast a masked view with a downsampled one; reconstruct the masked one."""

    idea: ClassVar[str] = "a masked and a downsampled view agree; the masked one is repainted"
    paper: ClassVar[str] = "Pan and Wei 2022, slides"

    mask_ratio: float = 0.75
    """Share of the patches of the full-size view hidden from the encoder."""
    small: float = 0.5
    """Side of the downsampled view as a share of the full side."""
    small_drop: float = 0.0
    """Share of the small view's patches that the encoder does not see; with ema its target sees them neither."""
    contrast_weight: float = 0.1
    """Weight of the contrastive term against the reconstruction term."""
    reconstruct_weight: float = 1.0
    """Weight of the reconstruction term; at 0 there is no decoder and the method is contrastive only."""
    temperature: float = 0.2
    """Of the contrastive softmax."""
    feature: Literal["sym", "asym", "asym_pred"] = "sym"
    """Where the contrasted features come from: both tracks the encoder (sym), the masked track the decoder (asym),
    or both the encoder with a predictor on the masked track and no gradient into the small one (asym_pred)."""
    target: Literal["both", "stop", "ema"] = "both"
    """What trains through the small view: the encoder (both), nothing (stop), or a momentum copy looks at it (ema)."""
    momentum: float = 0.99
    """Of the momentum copy, with target ema."""
    share_crop: bool = False
    """Cut the small view from the full view's crop: the slides' "resize only"."""
    area: tuple[float, float] = (0.2, 1.0)
    """Range of the small view's crop as a share of the image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Colour changes of the small view: brightness, contrast, saturation, hue."""
    gray: float = 0.2
    """Probability of grayscale of the small view."""
    norm_pix: bool = True
    """Predict each patch normalised by its own mean and deviation."""
    decoded_share: float = 1.0
    """Share of the hidden patches that are decoded and scored."""
    repainted: float = 1.0
    """Share of a batch's images that are repainted; 0.5 halves what the decoder costs."""
    head_hidden: int = 2048
    head_out: int = 256
    head_norm: Norm = "batch"
    """Norm in the heads: over the batches of all processes, each over its own, over a vector's own values, or none."""

    def check(self, batch: int, images: int | None = None) -> None:
        if self.reconstruct_weight > 0:
            check_shares(self.mask_ratio, self.decoded_share)
            self._check_repainted()
        elif self.feature == "asym":
            raise UsageError("--method.feature asym is the decoder's, and --method.reconstruct-weight 0 leaves none.")
        if self.feature == "asym" and self.target != "both":
            raise UsageError(
                f"--method.feature asym with --method.target {self.target}: the small view's head is trained by "
                "nothing then. Use --method.target both, or another feature."
            )

    def _check_repainted(self) -> None:
        if not 0 < self.repainted <= 1:
            raise UsageError(f"--method.repainted {self.repainted:g}: a share above 0, at most 1.")
        if self.feature == "asym" and self.repainted < 1:
            raise UsageError("--method.feature asym is the decoder's, of every image: leave --method.repainted at 1.")

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        return {
            "holed": View(side=shape.side, mask_ratio=self.mask_ratio),
            "small": View(
                side=round(shape.side * self.small), area=self.area, jitter=self.jitter, gray=self.gray,
                same_crop_as="holed" if self.share_crop else None, mask_ratio=self.small_drop,
            ),
        }  # fmt: skip

    def parts(self, shape: Shape) -> dict:
        from model.heads import Predictor, Projector
        from model.memory import MomentumCopy
        from model.vit import build_encoder

        def projector(width: int) -> Projector:
            return Projector(width, self.head_hidden, self.head_out, self.head_norm)

        parts = {}
        if self.reconstruct_weight > 0:
            parts["decoder"] = build_decoder(shape)
        parts["projector"] = projector(shape.width)
        if self.feature == "asym":
            parts["decoder_projector"] = projector(shape.decoder_width)
        if self.feature == "asym_pred":
            parts["predictor"] = Predictor(self.head_out, norm=self.head_norm)
        if self.target == "ema":
            parts["momentum_encoder"] = MomentumCopy(build_encoder(shape))
            parts["momentum_projector"] = MomentumCopy(projector(shape.width))
        return parts

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        from model.heads import feature_spread
        from model.losses import symmetric_info_nce
        from model.vit import patch_mean

        holed, small = views["holed"], views["small"]
        code, seen_small = self._encode(net, holed, small)
        terms, feature = {}, patch_mean(code)
        encoded = feature.detach()
        if self.reconstruct_weight > 0:
            assert holed.hidden is not None
            drawn = max(1, round(self.repainted * len(code)))  # the order of images is random: the first are any
            view = holed if drawn == len(code) else holed.first(drawn)
            hidden = scored_patches(holed.hidden[:drawn], self.decoded_share)
            predicted, tokens = net.parts["decoder"](code[:drawn], view, hidden)
            terms["reconstruct"] = self.reconstruct_weight * repaint_loss(predicted, view, hidden, self.norm_pix)
            if self.feature == "asym":
                feature = tokens.mean(dim=1)
        head = net.parts["decoder_projector" if self.feature == "asym" else "projector"]
        mine = head(feature)
        if self.feature == "asym_pred":
            mine = net.parts["predictor"](mine)
        agree = symmetric_info_nce(mine, seen_small, temperature=self.temperature)
        terms["contrast"] = self.contrast_weight * agree
        watched = {"info_nce": agree.detach(), "spread": feature_spread(seen_small.detach())}
        return Outcome(terms, watched, encoded)

    def _encode(self, net: Network, holed: Patches, small: Patches) -> tuple[Tensor, Tensor]:
        """Code of the masked view (B, 1 + K, D) and projection of the small one (B, head_out)."""
        import torch

        from model.vit import patch_mean

        if self.target == "ema":
            (seen,) = net.parts["momentum_encoder"](small)
            return net.encoder(holed)[0], net.parts["momentum_projector"](patch_mean(seen))
        if self.target == "stop" or self.feature == "asym_pred":
            with torch.no_grad():
                (seen,) = net.encoder(small)
                projected = net.parts["projector"](patch_mean(seen))
            return net.encoder(holed)[0], projected
        code, seen = net.encoder(holed, small)
        return code, net.parts["projector"](patch_mean(seen))

    def after_step(self, net: Network, done: float) -> None:
        net.follow(self.momentum)

    def macs(self, shape: Shape) -> int:
        kept, decoded = decoded_count(shape, self.mask_ratio, self.decoded_share)
        head = head_macs(shape.width, self.head_hidden, self.head_out)
        seen = kept_count((round(shape.side * self.small) // shape.patch) ** 2, self.small_drop)
        small = encoder_macs(shape, seen) + head
        trained = self.target == "both" and self.feature != "asym_pred"
        total = encoder_macs(shape, kept) + head + (small if trained else small // 3)
        if self.reconstruct_weight > 0:
            total += round(self.repainted * decoder_macs(shape, kept, decoded))
        return total
