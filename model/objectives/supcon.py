"""SupCon: all views of all images of a class find one another. Khosla et al. 2020, arXiv 2004.11362.

Labels are used: a score of this method stands beside supervised ones, never among those without labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from model.objectives.base import Outcome
from model.objectives.two_views import TwoViews
from model.shape import Norm, Shape, encoder_macs, head_macs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.views import Patches


@dataclass(frozen=True, kw_only=True)
class SupCon(TwoViews):
    """Pick the views of the same class out of both views of the whole batch."""

    idea: ClassVar[str] = "views of a class find one another among those of the batch"
    paper: ClassVar[str] = "Khosla et al. 2020, arXiv 2004.11362"

    label: str | None = None
    """Label column to learn from; default: the leading one of the store."""
    temperature: float = 0.1
    """Of the contrastive softmax."""
    base_temperature: float | None = None
    """The loss is multiplied by temperature over this, which is 0.07 in the code of the paper; None: by 1."""
    head_hidden: int = 2048
    head_out: int = 128
    head_norm: Norm = "none"

    @property
    def supervised(self) -> bool:
        return True

    def check(self, batch: int, images: int | None = None) -> None:
        check_base_temperature(self.base_temperature)

    def parts(self, shape: Shape) -> dict:
        from model.heads import Projector

        return {"projector": Projector(shape.width, self.head_hidden, self.head_out, self.head_norm)}

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        import torch

        from model.heads import pair_health
        from model.losses import sup_con

        features = self.pooled(net.encoder(views["one"], views["other"]))
        one, other = (net.parts["projector"](each) for each in features)
        contrast = sup_con(
            torch.stack([one, other]), label, temperature=self.temperature, base_temperature=self.base_temperature
        )
        return Outcome({"contrast": contrast}, pair_health(one, other, label), features[0].detach())

    def macs(self, shape: Shape) -> int:
        return 2 * (encoder_macs(shape, shape.patches) + head_macs(shape.width, self.head_hidden, self.head_out))


def check_base_temperature(base: float | None) -> None:
    """Raises UsageError where it would turn the loss around or make it infinite."""
    if base is not None and base <= 0:
        raise UsageError(f"--method.base-temperature {base:g}: above 0, or left out.")
