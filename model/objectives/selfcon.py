"""SelfCon: an exit half way through the encoder takes the place of a second view. Bae et al. 2021, arXiv 2106.15499.

Unless told otherwise it uses labels: its scores then stand beside supervised ones, never among those without labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from model.objectives.base import Objective, Outcome, check_drop_path
from model.objectives.supcon import check_base_temperature
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

    label: str | None = None
    """Label column to learn from; default: the leading one of the store."""
    use_labels: bool = True
    """False: each image is a class of its own, and only what exits and trunk make of it is to be alike."""
    exit_after: tuple[int, ...] = ()
    """Blocks of the encoder in front of each exit; without any: one exit, after half of them."""
    size: Literal["fc", "small", "same"] = "small"
    """Blocks that an exit has to itself: none but a linear layer (fc), half as many as the encoder has left behind it
    (small), or as many (same)."""
    temperature: float = 0.1
    """Of the contrastive softmax."""
    base_temperature: float | None = None
    """The loss is multiplied by temperature over this; None: by 1."""
    area: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Colour changes: brightness, contrast, saturation, hue."""
    gray: float = 0.2
    """Probability of grayscale."""
    drop_path: float = 0.0
    """Chance that the encoder's last block is left out for an image, falling to 0 at the first; published: 0.1."""
    head_hidden: int | None = None
    """None: the encoder's width."""
    head_out: int = 128

    @property
    def supervised(self) -> bool:
        return self.use_labels

    def check(self, batch: int, images: int | None = None) -> None:
        if self.label is not None and not self.use_labels:
            raise UsageError(f"--method.label {self.label} is a column that --method.no-use-labels does not read.")
        check_drop_path(self.drop_path)
        check_base_temperature(self.base_temperature)

    def exit_depths(self, depth: int) -> dict[int, int]:
        """Blocks in front of each exit -> blocks of its own. Raises UsageError: exits that the encoder has no place
        for, or that are not in order."""
        places = self.exit_after or (depth // 2,)
        if list(places) != sorted({*places} & {*range(1, depth)}):
            raise UsageError(
                f"--method.exit-after {' '.join(map(str, places))} of an encoder of {depth} blocks (--model.depth): an "
                "exit needs a block in front of it, and the encoder one behind it; several come in rising order."
            )
        behind = {before: depth - before for before in places}
        return {
            before: {"fc": 0, "small": max(1, rest // 2), "same": rest}[self.size] for before, rest in behind.items()
        }

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        self.exit_depths(shape.depth)
        dropped = (self.drop_path, shape.depth) if self.drop_path else None
        return {"whole": View(side=shape.side, area=self.area, jitter=self.jitter, gray=self.gray, drop_path=dropped)}

    def parts(self, shape: Shape) -> dict:
        from model.exits import Exit
        from model.heads import Projector

        def projector() -> Projector:
            return Projector(shape.width, self.head_hidden or shape.width, self.head_out, "none")

        exits = {
            f"exit{before}": Exit(shape.width, shape.heads, own)
            for before, own in self.exit_depths(shape.depth).items()
        }
        return {**exits, "projector": projector(), **{f"{name}_projector": projector() for name in exits}}

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        import torch

        from model.exits import exit_health
        from model.gather import place
        from model.heads import pair_health
        from model.losses import sup_con

        features = self.exits(net, views["whole"])
        trunk = features.pop("trunk")
        late = net.parts["projector"](trunk)
        early = torch.stack([net.parts[f"{name}_projector"](each) for name, each in features.items()])
        if not self.use_labels:
            label = place()[0] * len(label) + torch.arange(len(label), device=label.device)
        made = torch.cat([early, late[None]])
        contrast = sup_con(made, label, temperature=self.temperature, base_temperature=self.base_temperature)
        watched = pair_health(early[0], late, label)
        if self.use_labels:
            watched |= exit_health(early, late, label)
        return Outcome({"contrast": contrast}, watched, trunk.detach())

    def exits(self, net: Network, view: Patches) -> dict[str, Tensor]:
        from model.vit import patch_mean

        places = tuple(self.exit_depths(net.encoder.depth))
        code, *tapped = net.encoder(view, after=places)
        names = [f"exit{before}" for before in places]
        return {"trunk": patch_mean(code)} | {
            name: net.parts[name](each) for name, each in zip(names, tapped, strict=True)
        }

    def macs(self, shape: Shape) -> int:
        head = head_macs(shape.width, self.head_hidden or shape.width, self.head_out)
        block, linear = block_macs(1 + shape.patches, shape.width), head_macs(shape.width, shape.width)
        exits = sum((own * block or linear) + head for own in self.exit_depths(shape.depth).values())
        return encoder_macs(shape, shape.patches) + head + exits
