"""SwAV with multi-crop: each crop predicts which cluster the others belong to. Caron et al. 2020, arXiv 2006.09882.

Clusters are learned with the encoder. Sinkhorn's algorithm shares every batch out among all of them equally, so that
images cannot all end in one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from model.objectives.base import Objective, Outcome, check_drop_path
from model.objectives.mocov2 import check_queue
from model.shape import Norm, Shape, encoder_macs, head_macs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from model.heads import Prototypes
    from model.memory import Queue
    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches

CODED = ("global0", "global1")  # the views whose clusters the others predict
UNLEARNED = 0.999  # loss beside that of a uniform guess, above which nothing is predicted


@dataclass(frozen=True, kw_only=True)
class SwAV(Objective):
    """Predict from each of several crops the cluster that the two full-size ones are assigned to."""

    idea: ClassVar[str] = "each crop predicts the clusters of the others"
    paper: ClassVar[str] = "Caron et al. 2020, arXiv 2006.09882"

    local_views: int = 6
    """How many small crops there are beside the two of full size."""
    local_side: float = 3 / 7
    """Side of the small crops as a share of the full side, rounded to whole patches: 96 of 224."""
    area: tuple[float, float] = (0.14, 1.0)
    """Range of a full-size crop's share of the image."""
    local_area: tuple[float, float] = (0.05, 0.14)
    """Range of a small crop's share of the image."""
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    """Strength of brightness, contrast, saturation and hue changes."""
    gray: float = 0.2
    """Probability of grayscale."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    prototypes: int = 3000
    """How many clusters; for small sets five to ten times the classes that may be in them."""
    temperature: float = 0.1
    """Of the predictions' softmax."""
    epsilon: float = 0.05
    """Of Sinkhorn's algorithm: the larger, the softer the codes."""
    rounds: int = 3
    """Of Sinkhorn's algorithm."""
    queue: int = 0
    """Embeddings of earlier batches that each batch is shared out with, where a batch alone is small: a multiple of the
    batch, and no more than there are images."""
    queue_from: float = 0.075
    """Share of the run after which they are; before it, embeddings age within a few steps. Nor are they before the
    queue is full and the prototypes learn."""
    freeze_steps: int = 313
    """First steps in which the prototypes stay where they are."""
    drop_path: float = 0.0
    """Chance that the encoder's last block is left out for an image, falling to 0 at the first; published: 0.1."""
    head_hidden: int = 2048
    head_out: int = 128
    head_norm: Norm = "batch"
    """Norm in the head: over the batches of all processes, each over its own, over a vector's own values, or none."""

    def check(self, batch: int, images: int | None = None) -> None:
        check_drop_path(self.drop_path)
        if self.local_views < 0:
            raise UsageError(f"--method.local-views {self.local_views}: at least 0, which is none.")
        if self.prototypes < 2:
            raise UsageError(f"--method.prototypes {self.prototypes}: at least 2, or there is nothing to predict.")
        if self.queue < 0:
            raise UsageError(f"--method.queue {self.queue}: at least 0, which is none.")
        if self.queue:
            check_queue(self.queue, batch)
        if images is not None and self.queue > images:
            most = images // batch * batch
            raise UsageError(
                f"--method.queue {self.queue} holds more embeddings than there are images ({images:,}). "
                + (f"Use at most {most}." if most else f"So does a batch of {batch}: use a smaller --batch.")
            )

    def warnings(self, batch: int, images: int | None = None) -> list[str]:
        if batch + self.queue >= self.prototypes:
            return []
        return [
            f"{batch:,} images at once are few for {self.prototypes:,} prototypes, and codes will be nearly uniform: "
            "take a --method.queue, fewer --method.prototypes, or a larger --batch."
        ]

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        full = View(
            side=shape.side, area=self.area, jitter=self.jitter, gray=self.gray, blur=self.blur,
            drop_path=(self.drop_path, shape.depth) if self.drop_path else None,
        )  # fmt: skip
        local = replace(full, side=shape.patch * self._local_grid(shape), area=self.local_area)
        return dict.fromkeys(CODED, full) | {f"local{number}": local for number in range(self.local_views)}

    def _local_grid(self, shape: Shape) -> int:
        return max(1, round(shape.grid * self.local_side))

    def parts(self, shape: Shape) -> dict:
        from model.heads import Projector, Prototypes
        from model.memory import Queue

        return {
            "projector": Projector(shape.width, self.head_hidden, self.head_out, self.head_norm, last_norm=False),
            "prototypes": Prototypes(self.prototypes, self.head_out),
            **{f"queue_{name}": Queue(self.queue, self.head_out, empty=True) for name in CODED if self.queue},
        }

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        import torch

        from model.heads import feature_spread, prototype_use
        from model.losses import swapped_prediction
        from model.vit import patch_mean

        prototypes = _prototypes(net)
        # In the order in which they were declared: the coded ones first.
        features = [patch_mean(code) for code in net.encoder(*views.values())]
        embedded = [net.parts["projector"](each) for each in features]
        scores = [prototypes(each) for each in embedded]
        codes = [self._codes(net, name, score.detach()) for name, score in zip(CODED, scores, strict=False)]
        if self.queue:
            for name, each in zip(CODED, embedded, strict=False):
                _queue(net, name).offer(each)
        swapped = swapped_prediction(scores, codes, temperature=self.temperature)
        return Outcome({"swapped": swapped}, {
            "of_uniform": swapped.detach() / math.log(self.prototypes),  # stays 1 where nothing is learned
            "code_entropy": torch.special.entr(codes[0]).sum(dim=1).mean(),
            "prototype_use": prototype_use(scores[0].detach()),
            "spread": feature_spread(embedded[0].detach()),
        }, features[0].detach())  # fmt: skip

    def _codes(self, net: Network, name: str, scores: Tensor) -> Tensor:
        """(B, K): how the batch of a view is shared out among the prototypes, with the view's queue once it is on."""
        import torch

        from model.gather import place
        from model.losses import sinkhorn

        prototypes, earlier = _prototypes(net), scores[:0]
        if prototypes.queued:
            rank, ranks = place()  # every process holds the whole queue, and brings its share of it
            queue = _queue(net, name)
            earlier = prototypes(queue.rows.tensor_split(ranks)[rank])
            # Scores of -inf take nothing of any prototype, as if they were not there; nobody has to ask the device.
            earlier = earlier.masked_fill(~queue.full(), -math.inf)
        joint = torch.cat([earlier, scores])
        return sinkhorn(joint, epsilon=self.epsilon, rounds=self.rounds)[len(earlier) :]

    def before_step(self, net: Network, done: float, taken: int) -> None:
        prototypes = _prototypes(net)
        prototypes.renormalise()
        prototypes.queued = self.queue > 0 and done >= self.queue_from and taken >= self.freeze_steps
        if self.queue:
            for name in CODED:
                _queue(net, name).forget()

    def before_update(self, net: Network, taken: int) -> None:
        if taken < self.freeze_steps:
            # None, not 0, by which AdamW would count steps and make the first free ones too long. Only now: until the
            # backward pass is over processes wait for one another's gradient.
            _prototypes(net).prototypes.grad = None

    def after_step(self, net: Network, done: float) -> None:
        if self.queue:
            for name in CODED:
                _queue(net, name).push()

    def alarm(self, means: Mapping[str, float]) -> str | None:
        if means["of_uniform"] > UNLEARNED:
            return (
                f"codes are not predicted (of_uniform {means['of_uniform']:.4f}; 1 is chance): images lie at random "
                "among the prototypes. More steps, a larger --batch or fewer --method.prototypes may help."
            )
        return super().alarm(means)

    def macs(self, shape: Shape) -> int:
        head = head_macs(shape.width, self.head_hidden, self.head_out, self.prototypes)
        full, local = encoder_macs(shape, shape.patches), encoder_macs(shape, self._local_grid(shape) ** 2)
        return len(CODED) * (full + head) + self.local_views * (local + head)


def _prototypes(net: Network) -> Prototypes:
    return net.parts["prototypes"]  # pyright: ignore[reportReturnType]


def _queue(net: Network, name: str) -> Queue:
    return net.parts[f"queue_{name}"]  # pyright: ignore[reportReturnType]
