"""CLSA: a strong view is told from others as a weak one is. Wang and Qi 2021, arXiv 2104.07713.

Strong augmentation leaves too little of an image for it to find its own key. It is not asked to: over a bank of keys
its distribution of similarities is to be the one of a weak view, which finds its key as in MoCo v2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from model.objectives.base import Outcome
from model.objectives.mocov2 import MoCoV2, queue_of
from model.shape import Shape, encoder_macs, head_macs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches

KEY = "key"


@dataclass(frozen=True, kw_only=True)
class CLSA(MoCoV2):
    """Pick an image's key out of a bank by weak views, and match their distribution over the bank by strong ones."""

    idea: ClassVar[str] = "a strong view is as near to each of a bank of keys as a weak view, which finds its own"
    paper: ClassVar[str] = "Wang and Qi 2021, arXiv 2104.07713"

    area: tuple[float, float] = (0.2, 1.0)
    """Range of a full-size crop's share of the image; that of a smaller crop is smaller in proportion to its side."""
    weak: tuple[float, ...] = (1.0,)
    """Sides of the weak views as shares of the full side; the published several are 1, 6/7, 5/7, 4/7 and 3/7."""
    strong: tuple[float, ...] = (3 / 7,)
    """Sides of the strong views as shares of the full side: 96 of 224."""
    changes: int = 5
    """How many strong changes are drawn after a strong view's colours, out of fourteen."""
    distribution_weight: float = 1.0
    """Weight of the distributions' term against the contrastive one."""
    distribution_temperature: float = 0.2
    """Of the softmax that makes distributions."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the weak views, and over all pairs of a weak and a strong one. Summed, as published, several views weigh the
    distributions more, and make larger gradients."""

    def check(self, batch: int, images: int | None = None) -> None:
        super().check(batch, images)
        for name, shares in (("weak", self.weak), ("strong", self.strong)):
            if not shares or not all(0 < share <= 1 for share in shares):
                raise UsageError(f"--method.{name} is one or several sides as shares of the full one, each up to 1.")
        if self.changes < 1:
            raise UsageError(f"--method.changes {self.changes} leaves nothing of a strong view: at least 1.")

    def views(self, shape: Shape) -> dict[str, View]:
        pair = super().views(shape)

        def sized(name: str, share: float, strong: int) -> View:
            area = (share * self.area[0], share * self.area[1])
            return replace(pair["one"], side=_side(name, share, shape), area=area, strong=strong)

        weak = {f"weak{number}": sized("weak", share, 0) for number, share in enumerate(self.weak)}
        strong = {f"strong{number}": sized("strong", share, self.changes) for number, share in enumerate(self.strong)}
        return weak | strong | {KEY: pair["other"]}

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        import torch

        from model.heads import pair_health
        from model.losses import bank_contrast, bank_cosines, distribution_matching

        parts, queue = net.parts, queue_of(net)
        asked = [view for name, view in views.items() if name != KEY]  # in the order of views(): the weak ones first
        features = self.pooled(net.encoder(*asked))
        queries = [parts["projector"](each) for each in features]
        (key,) = map(parts["momentum_projector"], self.pooled(parts["momentum_encoder"](views[KEY])))
        cosines = bank_cosines(queries, key, queue.rows)
        queue.offer(key)
        weak, strong = cosines[: len(self.weak)], cosines[len(self.weak) :]
        contrast = bank_contrast(weak, temperature=self.temperature)
        matched = distribution_matching(weak, strong, temperature=self.distribution_temperature)
        singles, pairs = (len(weak), len(weak) * len(strong)) if self.reduction == "sum" else (1, 1)
        likely = torch.softmax(weak[0].detach() / self.distribution_temperature, dim=1)
        return Outcome(
            {"contrast": singles * contrast, "distribution": self.distribution_weight * pairs * matched},
            {**pair_health(queries[0], key), "weak_entropy": torch.special.entr(likely).sum(dim=1).mean()},
            features[0].detach(),
        )

    def macs(self, shape: Shape) -> int:
        head = head_macs(shape.width, self.head_hidden or shape.width, self.head_out)
        sides = [view.side for name, view in self.views(shape).items() if name != KEY]
        asked = sum(
            encoder_macs(shape, (side // shape.patch) ** 2) + head + self.queue * self.head_out for side in sides
        )
        return asked + (encoder_macs(shape, shape.patches) + head) // 3


def _side(name: str, share: float, shape: Shape) -> int:
    """Raises UsageError where patches do not divide it, with the shares whose sides they divide."""
    side = round(share * shape.side)
    if side % shape.patch == 0 and side > 0:
        return side
    least = side // shape.patch * shape.patch
    nearest = [near for near in (least, least + shape.patch) if 0 < near <= shape.side]
    raise UsageError(
        f"--method.{name} {share:.4g} makes views of {side} of {shape.side} pixels, no multiple of --model.patch "
        f"{shape.patch}. Use {' or '.join(f'{near / shape.side:.4g} ({near} pixels)' for near in nearest)}."
    )
