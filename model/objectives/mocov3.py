"""MoCo v3: each view finds the other's key, by a momentum copy, in the batch. Chen et al. 2021, arXiv 2104.02057."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from model.objectives.base import Outcome
from model.objectives.two_views import TwoViews
from model.shape import Shape, encoder_macs, head_macs

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.views import Patches


@dataclass(frozen=True, kw_only=True)
class MoCoV3(TwoViews):
    """Pick an image's other view, seen by a momentum copy, out of the batch; both ways, behind a predictor."""

    idea: ClassVar[str] = "both views find one another's key, by a momentum encoder, in the batch"
    paper: ClassVar[str] = "Chen et al. 2021, arXiv 2104.02057"
    own_start: ClassVar[bool] = True

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    blur: tuple[float, float] = (1.0, 0.1)
    solarise: tuple[float, float] = (0.0, 0.2)
    temperature: float = 0.2
    """Of the contrastive softmax."""
    momentum: float = 0.99
    """Of the momentum copy at first; it rises to 1 along half a cosine."""
    head_hidden: int = 4096
    head_out: int = 256

    def parts(self, shape: Shape) -> dict:
        from model.heads import Projector
        from model.memory import MomentumCopy
        from model.vit import build_encoder

        def head(width: int, depth: int) -> Projector:
            return Projector(width, self.head_hidden, self.head_out, self.head_norm, depth=depth)

        return {
            "projector": head(shape.width, 3), "predictor": head(self.head_out, 2),
            "momentum_encoder": MomentumCopy(build_encoder(shape)),
            "momentum_projector": MomentumCopy(head(shape.width, 3)),
        }  # fmt: skip

    def prepare(self, net: Network) -> None:
        """MoCo v3's code draws a ViT otherwise than MAE's: queries, keys and values are matrices of their own, uniform
        within sqrt(6 / 2D) and not sqrt(6 / 4D), and the class token has a deviation of 1e-6 and not 0.02."""
        import torch

        super().prepare(net)
        with torch.no_grad():  # what the seed has drawn is scaled
            for name, weight in net.encoder.named_parameters():
                if name.endswith("qkv.weight"):
                    weight.mul_(math.sqrt(2))
            net.encoder.cls_token.mul_(1e-6 / 0.02)

    def before_step(self, net: Network, done: float, taken: int) -> None:
        from model.memory import rising_momentum

        net.follow(rising_momentum(self.momentum, done))

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        from model.heads import pair_health
        from model.losses import info_nce

        parts, pair = net.parts, (views["one"], views["other"])
        features = self.pooled(net.encoder(*pair))
        queries = [parts["predictor"](parts["projector"](each)) for each in features]
        keys = [parts["momentum_projector"](each) for each in self.pooled(parts["momentum_encoder"](*pair))]
        there, back = (info_nce(*each, temperature=self.temperature) for each in zip(queries, keys[::-1], strict=True))
        # The factor of MoCo v3's code keeps the gradient's size whatever the temperature.
        contrast = 2 * self.temperature * (there + back)
        return Outcome({"contrast": contrast}, pair_health(queries[0], keys[1]), features[0].detach())

    def macs(self, shape: Shape) -> int:
        looked = encoder_macs(shape, shape.patches) + head_macs(
            shape.width, self.head_hidden, self.head_hidden, self.head_out
        )
        predicted = head_macs(self.head_out, self.head_hidden, self.head_out)
        return 2 * (looked + predicted + looked // 3)
