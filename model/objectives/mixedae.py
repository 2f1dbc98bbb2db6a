"""MixedAE: one picture of four, all four repainted. Chen et al. 2023, arXiv 2303.17152.

Mixing alone would help nothing: it lets more of the targets be seen. Each patch is therefore to find the patches of its
own picture, by attention to the keys nearest to it and by a contrastive loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from model.objectives.base import Objective, Outcome
from model.objectives.mae import build_decoder, check_decoded, decoded_count, reconstruction
from model.shape import Shape, decoder_macs, encoder_macs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches


@dataclass(frozen=True, kw_only=True)
class MixedAE(Objective):
    """Encode four pictures mixed patch by patch, tell their patches apart, repaint what each of them has lost."""

    idea: ClassVar[str] = "pictures mixed patch by patch are told apart and repainted"
    paper: ClassVar[str] = "Chen et al. 2023, arXiv 2303.17152"

    group: int = 4
    """How many pictures are mixed into one; each shows this fraction of its patches, and hides the others."""
    homologous_weight: float = 0.1
    """Weight of the homologous contrast against the reconstruction."""
    temperature: float = 0.25
    """Of the homologous contrast's softmax."""
    norm_pix: bool = True
    """Predict each patch normalised by its own mean and deviation."""
    decoded_share: float = 1.0
    """Share of the hidden patches that are decoded and scored, drawn anew each step; MixedAE decodes all."""
    area: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image."""

    def check(self, batch: int, images: int | None = None) -> None:
        check_decoded(self.decoded_share)

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        if self.group < 2 or shape.patches < 2 * self.group:
            raise UsageError(
                f"--method.group {self.group}: at least 2 pictures are mixed, and each keeps at least 2 of its "
                f"{shape.patches} patches."
            )
        return {"mixed": View(side=shape.side, area=self.area, mask_ratio=1 - 1 / self.group, group=self.group)}

    def parts(self, shape: Shape) -> dict:
        from model.mixing import Segments

        return {"decoder": build_decoder(shape), "segments": Segments(self.group, shape.width)}

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        from model.heads import feature_spread
        from model.losses import homologous_contrast
        from model.mixing import sources, unmix
        from model.vit import patch_mean

        view = views["mixed"]
        code, recognition = self._encode(net, view)
        patches = code[:, 1:]
        source = sources(patches.shape[1], self.group, patches.device)
        told_apart = homologous_contrast(patches, source, temperature=self.temperature)
        unmixed = unmix(code, self.group)
        repainted = reconstruction(net, unmixed, view, self.decoded_share, self.norm_pix)
        features = patch_mean(unmixed).detach()  # of each picture, from its own tokens
        return Outcome(
            {"reconstruct": repainted, "homologous": self.homologous_weight * told_apart},
            {
                "homologous_contrast": told_apart.detach(),
                "recognition": recognition,
                "spread": feature_spread(features),
            },
            features,
        )

    def code(self, net: Network, view: Patches) -> Tensor:
        from model.mixing import unmix

        return unmix(self._encode(net, view)[0], self.group)

    def _encode(self, net: Network, view: Patches) -> tuple[Tensor, Tensor]:
        """Code of the mixed pictures, (B / group, 1 + N, D), and recognition accuracy: the share of the keys that a
        patch attends to which come from its own picture, the mean over blocks and heads."""
        import torch

        from model.attention import attend_top
        from model.mixing import mix_pictures, recognised, sources

        mixed = mix_pictures(view, self.group)
        source, found = sources(mixed.tokens, self.group, view.pixels.device), []

        def attend_homologous(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            seen, kept = attend_top(query, key, value, view.tokens)
            found.append(recognised(kept, source))
            return seen

        (code,) = net.encoder(mixed, marks=net.parts["segments"](source), attend_by=attend_homologous)
        return code, torch.stack(found).mean()

    def macs(self, shape: Shape) -> int:
        kept, decoded = decoded_count(shape, 1 - 1 / self.group, self.decoded_share)
        mixed = encoder_macs(shape, shape.patches) + shape.patches**2 * shape.width  # blocks, and the contrast
        return mixed // self.group + decoder_macs(shape, kept, decoded)
