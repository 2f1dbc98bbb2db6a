"""BYOL: predict what a momentum copy makes of the other view; no negatives. Grill et al. 2020, arXiv 2006.07733."""

from __future__ import annotations

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
class BYOL(TwoViews):
    """Predict an image's other view as a momentum copy projects it; both ways."""

    idea: ClassVar[str] = "each view predicts the other one's projection by a momentum encoder"
    paper: ClassVar[str] = "Grill et al. 2020, arXiv 2006.07733"
    collapsed: ClassVar[float] = 0.5  # nothing but the predictor keeps images apart: half of the spread gone is a sign

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    blur: tuple[float, float] = (1.0, 0.1)
    solarise: tuple[float, float] = (0.0, 0.2)
    momentum: float = 0.996
    """Of the momentum copy at first; it rises to 1 along half a cosine."""
    head_hidden: int = 4096
    head_out: int = 256

    def parts(self, shape: Shape) -> dict:
        from model.heads import Predictor, Projector
        from model.memory import MomentumCopy
        from model.vit import build_encoder

        def projector() -> Projector:
            return Projector(shape.width, self.head_hidden, self.head_out, self.head_norm, last_norm=False)

        return {
            "projector": projector(), "predictor": Predictor(self.head_out, self.head_hidden, self.head_norm),
            "momentum_encoder": MomentumCopy(build_encoder(shape)), "momentum_projector": MomentumCopy(projector()),
        }  # fmt: skip

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        from model.heads import pair_health
        from model.losses import regression

        parts, pair = net.parts, (views["one"], views["other"])
        features = self.pooled(net.encoder(*pair))
        predicted = [parts["predictor"](parts["projector"](each)) for each in features]
        target = [parts["momentum_projector"](each) for each in self.pooled(parts["momentum_encoder"](*pair))]
        there, back = (regression(*each) for each in zip(predicted, target[::-1], strict=True))
        return Outcome({"regression": there + back}, pair_health(predicted[0], target[1]), features[0].detach())

    def after_step(self, net: Network, done: float) -> None:
        from model.memory import rising_momentum

        net.follow(rising_momentum(self.momentum, done))

    def macs(self, shape: Shape) -> int:
        looked = encoder_macs(shape, shape.patches) + head_macs(shape.width, self.head_hidden, self.head_out)
        predicted = head_macs(self.head_out, self.head_hidden, self.head_out)
        return 2 * (looked + predicted + looked // 3)
