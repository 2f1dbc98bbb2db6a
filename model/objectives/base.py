"""What a pre-training method is: options, the views it wants, the parts it trains, and its loss.

An objective is a frozen dataclass whose fields are its options (and therefore its flags and YAML keys). It holds no
weights: those live in a Network, beside the encoder. torch is imported where it is used, so that reading flags is fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from model.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches


@dataclass(frozen=True)
class Outcome:
    """What a loss returns."""

    terms: dict[str, Tensor]  # they add up to the loss
    watched: dict[str, Tensor]  # detached scalars worth a curve: health, accuracies, unweighted terms


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of all methods. The loop knows this class and none of its children."""

    idea: ClassVar[str]
    paper: ClassVar[str]
    supervised: ClassVar[bool] = False

    @abstractmethod
    def views(self, shape: Shape) -> dict[str, View]:
        """The views of an image that the loss wants, by name."""

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        """What is trained or kept beside the encoder: decoder, heads, momentum copies, queues."""

    @abstractmethod
    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        """label: (B,) int64, -1 where unknown."""

    def after_step(self, net: Network) -> None:  # noqa: B027 (most methods have nothing to do here)
        """Once after every optimizer step: momentum updates, queues, renormalised prototypes."""

    @abstractmethod
    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of one image's forward pass in trained-forward units: what has no gradient counts a
        third. Six times this is the FLOPs of a training step."""
