"""SelfCon: an exit half way through the encoder takes the place of a second view. Bae et al. 2021, arXiv 2106.15499.

Labels are used: a score of this method stands beside supervised ones, never among those without labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from model.objectives.base import Objective, Outcome
from model.shape import Shape, block_macs, encoder_macs, head_macs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches


@dataclass(frozen=True, kw_only=True)
class SelfCon(Objective):
    """Pick out of a batch what exit and trunk make of the images of a class, from one view of each."""

    idea: ClassVar[str] = "exit and trunk of one network find the images of a class, from one view of each"
    paper: ClassVar[str] = "Bae et al. 2021, arXiv 2106.15499"
    supervised: ClassVar[bool] = True

    label: str | None = None
    """Label column to learn from; default: the leading one of the store."""
    exit_after: int | None = None
    """Blocks of the encoder in front of the exit; None: half of them."""
    size: Literal["fc", "small", "same"] = "small"
    """Blocks that the exit has to itself: none but a linear layer (fc), half as many as the encoder has left behind it
    (small), or as many (same)."""
    temperature: float = 0.1
    """Of the contrastive softmax."""
    area: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Colour changes: brightness, contrast, saturation, hue."""
    gray: float = 0.2
    """Probability of grayscale."""
    head_hidden: int | None = None
    """None: the encoder's width."""
    head_out: int = 128

    def exit_depths(self, depth: int) -> tuple[int, int]:
        """Blocks in front of the exit, and blocks of its own. Raises UsageError: an encoder not deep enough."""
        before = depth // 2 if self.exit_after is None else self.exit_after
        if not 0 < before < depth:
            raise UsageError(
                f"--method.exit-after {before} of an encoder of {depth} blocks (--model.depth): the exit needs a block "
                "in front of it, and the encoder one behind it."
            )
        rest = depth - before
        return before, {"fc": 0, "small": max(1, rest // 2), "same": rest}[self.size]

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        self.exit_depths(shape.depth)
        return {"whole": View(side=shape.side, area=self.area, jitter=self.jitter, gray=self.gray)}

    def parts(self, shape: Shape) -> dict:
        from model.exits import Exit
        from model.heads import Projector

        def projector() -> Projector:
            return Projector(shape.width, self.head_hidden or shape.width, self.head_out, "none")

        _, own = self.exit_depths(shape.depth)
        return {
            "exit": Exit(shape.width, shape.heads, own), "projector": projector(), "exit_projector": projector()
        }  # fmt: skip

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        import torch

        from model.exits import exit_health
        from model.heads import pair_health
        from model.losses import sup_con
        from model.vit import patch_mean

        before, _ = self.exit_depths(net.encoder.depth)
        code, tapped = net.encoder(views["whole"], after=before)
        late = net.parts["projector"](patch_mean(code))
        early = net.parts["exit_projector"](net.parts["exit"](tapped))
        contrast = sup_con(torch.stack([early, late]), label, temperature=self.temperature)
        return Outcome({"contrast": contrast}, pair_health(early, late, label) | exit_health(early, late, label))

    def exits(self, net: Network, view: Patches) -> dict[str, Tensor]:
        from model.vit import patch_mean

        before, _ = self.exit_depths(net.encoder.depth)
        code, tapped = net.encoder(view, after=before)
        return {"trunk": patch_mean(code), "exit": net.parts["exit"](tapped)}

    def macs(self, shape: Shape) -> int:
        _, own = self.exit_depths(shape.depth)
        head = head_macs(shape.width, self.head_hidden or shape.width, self.head_out)
        private = own * block_macs(1 + shape.patches, shape.width) if own else head_macs(shape.width, shape.width)
        return encoder_macs(shape, shape.patches) + private + 2 * head
