"""What a pre-training method is: options, the views it wants, the parts it trains, and its loss.

An objective is a frozen dataclass whose fields are its options (and therefore its flags and YAML keys). It holds no
weights: those live in a Network, beside the encoder. torch is imported where it is used, so that reading flags is fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from model.shape import Shape
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches


def check_drop_path(rate: float) -> None:
    """Raises UsageError where the last block would never be there."""
    if not 0 <= rate < 1:
        raise UsageError(f"--method.drop-path {rate:g}: a chance, from 0 to below 1.")


@dataclass(frozen=True)
class Outcome:
    """What a loss returns."""

    terms: dict[str, Tensor]  # they add up to the loss
    watched: dict[str, Tensor]  # detached scalars worth a curve: health, accuracies, unweighted terms
    features: Tensor | None = None  # (B, D), detached: what of each image is compared with others, if anything is


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of all methods. The loop knows this class and none of its children."""

    idea: ClassVar[str]
    paper: ClassVar[str]
    own_start: ClassVar[bool] = False  # `prepare` changes what the seed draws: its untrained encoder is another one
    collapsed: ClassVar[float] = 0.1  # spread of embeddings below which all images look alike

    @property
    def supervised(self) -> bool:
        """Whether it learns from labels."""
        return False

    def check(self, batch: int, images: int | None = None) -> None:  # noqa: B027 (a hook: most methods have nothing to do)
        """Whether the options fit one another, the batch of all processes, and the number of images once it is known.

        Raises UsageError.
        """

    @abstractmethod
    def views(self, shape: Shape) -> dict[str, View]:
        """The views of an image that the loss wants, by name."""

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        """What is trained or kept beside the encoder: decoder, heads, momentum copies, queues."""

    @abstractmethod
    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        """label: (B,) int64, -1 where unknown."""

    def prepare(self, net: Network) -> None:  # noqa: B027 (a hook: most methods have nothing to do)
        """Once, when the network has been drawn, and before momentum copies become equal: here is frozen what is not to
        be trained, and scaled what is to begin otherwise."""

    def code(self, net: Network, view: Patches) -> Tensor:
        """(B, 1 + K, D): what a decoder is given of a masked view."""
        (code,) = net.encoder(view)
        return code

    def exits(self, net: Network, view: Patches) -> dict[str, Tensor]:
        """(B, D) features of the encoder's end ("trunk") and of each exit, for methods that train exits."""
        return {}

    def before_step(self, net: Network, done: float, taken: int) -> None:  # noqa: B027 (a hook: most methods have nothing to do)
        """Before every optimizer step. taken: steps of the run so far; done: their share of all, 0 before the first."""

    def before_update(self, net: Network, taken: int) -> None:  # noqa: B027 (a hook: most methods have nothing to do)
        """When gradients are there, before the optimizer sees them: a parameter whose gradient is set to None stays
        where it is, and its moments with it."""

    def after_step(self, net: Network, done: float) -> None:  # noqa: B027 (a hook: most methods have nothing to do)
        """After every optimizer step: momentum updates, queues. done: 1 after the last."""

    def warnings(self, batch: int, images: int | None = None) -> list[str]:
        """What to say of options that will not learn well where a loss sees `batch` images at once, of `images`."""
        return []

    def alarm(self, means: Mapping[str, float]) -> str | None:
        """What the curves say has gone wrong though every number is finite, in words; None where nothing has.

        means: of what the loss watched, over the steps since the last row.
        """
        if means.get("spread", 1.0) < self.collapsed:
            return (
                f"the embeddings of different images are nearly one and the same (spread {means['spread']:.3f}; 1 is "
                "spread out, 0 a point): they have collapsed, or not come apart yet. A lower --lr may help."
            )
        return None

    @abstractmethod
    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of one image's forward pass in trained-forward units: what has no gradient counts a
        third. Six times this is the FLOPs of a training step."""
