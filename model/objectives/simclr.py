"""SimCLR: two views of an image find one another in a batch. Chen et al. 2020, arXiv 2002.05709."""

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
class SimCLR(TwoViews):
    """Pick an image's other view out of both views of the whole batch."""

    idea: ClassVar[str] = "two views of an image find one another among those of the batch"
    paper: ClassVar[str] = "Chen et al. 2020, arXiv 2002.05709"

    temperature: float = 0.1
    """Of the contrastive softmax; 0.1 suits batches of 4096, 0.2 those below 1024."""
    head_hidden: int = 2048
    head_out: int = 128

    def parts(self, shape: Shape) -> dict:
        from model.heads import Projector

        return {"projector": Projector(shape.width, self.head_hidden, self.head_out, self.head_norm)}

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        from model.heads import pair_health
        from model.losses import nt_xent

        features = self.pooled(net.encoder(views["one"], views["other"]))
        one, other = (net.parts["projector"](each) for each in features)
        contrast = nt_xent(one, other, temperature=self.temperature)
        return Outcome({"contrast": contrast}, pair_health(one, other), features[0].detach())

    def macs(self, shape: Shape) -> int:
        return 2 * (encoder_macs(shape, shape.patches) + head_macs(shape.width, self.head_hidden, self.head_out))
