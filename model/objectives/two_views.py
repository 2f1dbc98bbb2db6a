"""What the methods share that compare two random views of an image: the views, what is pooled, frozen patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.objectives.base import Objective
from model.shape import Norm, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.sampling import View


@dataclass(frozen=True, kw_only=True)
class TwoViews(Objective):
    """Options start from SimCLR's augmentation; a method overrides what its paper has otherwise."""

    area: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the image; 0.2 and up for pictures below 100 px."""
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    """Colour changes: brightness, contrast, saturation, hue."""
    jitter_p: float = 0.8
    """Probability of the colour changes."""
    gray: float = 0.2
    """Probability of grayscale."""
    blur: tuple[float, float] = (0.5, 0.5)
    """Probability of a Gaussian blur, of the one view and of the other."""
    solarise: tuple[float, float] = (0.0, 0.0)
    """Probability that bright pixels are inverted, of the one view and of the other."""
    feature: Literal["patch_mean", "cls"] = "patch_mean"
    """What of an image goes into the head: the mean of its patch tokens, or the class token."""
    head_norm: Norm = "batch"
    """Norm in the heads: over the batches of all processes, each over its own, over a vector's own values, or none."""
    freeze_patches: bool = True
    """Leave the patch projection as it was drawn: trained, it makes contrastive ViTs unstable (MoCo v3, section 4)."""

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        return {
            name: View(
                side=shape.side, area=self.area, jitter=self.jitter, jitter_p=self.jitter_p, gray=self.gray,
                blur=blur, solarise=solarise,
            )
            for name, blur, solarise in zip(("one", "other"), self.blur, self.solarise, strict=True)
        }  # fmt: skip

    def prepare(self, net: Network) -> None:
        if self.freeze_patches:
            net.encoder.patch_embed.requires_grad_(False)

    def pooled(self, codes: list[Tensor]) -> list[Tensor]:
        """(B, 1 + N, D) of each view -> (B, D): what goes into the head."""
        from model.vit import patch_mean

        return [patch_mean(code) if self.feature == "patch_mean" else code[:, 0] for code in codes]
