"""MoCo v2: find the own key of a slowly moving encoder beside a queue of earlier images' keys.

He et al. 2020, arXiv 1911.05722, with the head and the augmentation of Chen et al. 2020, arXiv 2003.04297.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from model.objectives.base import Outcome
from model.objectives.two_views import TwoViews
from model.shape import Norm, Shape, encoder_macs, head_macs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from model.memory import Queue
    from model.network import Network
    from pipeline.views import Patches


@dataclass(frozen=True, kw_only=True)
class MoCoV2(TwoViews):
    """Pick an image's other view, seen by a momentum copy, out of a queue."""

    idea: ClassVar[str] = "a view finds the other one's key, by a momentum encoder, beside a queue of keys"
    paper: ClassVar[str] = "He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297"

    area: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    temperature: float = 0.2
    """Of the contrastive softmax."""
    queue: int = 65536
    """Keys of earlier images that a view is told from: a multiple of the batch, and no more than there are images."""
    momentum: float = 0.999
    """Of the momentum copy."""
    momentum_rises: bool = False
    """Raise the momentum to 1 along half a cosine, as MoCo v3 does."""
    head_hidden: int | None = None
    """None: the encoder's width."""
    head_out: int = 128
    # Batch norm would let queries and keys of one batch know one another; MoCo shuffles for that, a ViT has none.
    head_norm: Norm = "none"

    def check(self, batch: int, images: int | None = None) -> None:
        check_queue(self.queue, batch)
        if images is not None and self.queue > images:
            raise UsageError(
                f"--method.queue {self.queue} holds more keys than there are images ({images:,}): each would meet its "
                f"own. A quarter is enough: --method.queue {max(1, images // 4 // batch) * batch}."
            )

    def warnings(self, batch: int, images: int | None = None) -> list[str]:
        if images is None or 4 * self.queue <= images:
            return []
        return [
            f"--method.queue {self.queue} holds keys of more than a quarter of the {images:,} images: many a view is "
            "told from an earlier key of its own image. A shorter one may learn more."
        ]

    def parts(self, shape: Shape) -> dict:
        from model.heads import Projector
        from model.memory import MomentumCopy, Queue
        from model.vit import build_encoder

        def projector() -> Projector:
            return Projector(shape.width, self.head_hidden or shape.width, self.head_out, self.head_norm)

        return {
            "projector": projector(), "queue": Queue(self.queue, self.head_out),
            "momentum_encoder": MomentumCopy(build_encoder(shape)), "momentum_projector": MomentumCopy(projector()),
        }  # fmt: skip

    def before_step(self, net: Network, done: float, taken: int) -> None:
        from model.memory import rising_momentum

        queue_of(net).forget()
        net.follow(rising_momentum(self.momentum, done) if self.momentum_rises else self.momentum)

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        from model.heads import pair_health
        from model.losses import queue_info_nce

        parts, queue = net.parts, queue_of(net)
        (features,) = self.pooled(net.encoder(views["one"]))
        query = parts["projector"](features)
        (key,) = map(parts["momentum_projector"], self.pooled(parts["momentum_encoder"](views["other"])))
        contrast = queue_info_nce(query, key, queue.rows, temperature=self.temperature)
        queue.offer(key)
        return Outcome({"contrast": contrast}, pair_health(query, key), features.detach())

    def after_step(self, net: Network, done: float) -> None:
        queue_of(net).push()

    def macs(self, shape: Shape) -> int:
        head = head_macs(shape.width, self.head_hidden or shape.width, self.head_out)
        looked = encoder_macs(shape, shape.patches) + head
        return looked + self.queue * self.head_out + looked // 3


def check_queue(length: int, batch: int) -> None:
    """Raises UsageError where whole batches do not fill it."""
    if length < 1 or length % batch:
        raise UsageError(
            f"--method.queue {length} is no multiple of --batch {batch}: keys go in and out by whole batches. "
            f"Use {max(1, length // batch) * batch}."
        )


def queue_of(net: Network) -> Queue:
    return cast("Queue", net.parts["queue"])
