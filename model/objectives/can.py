"""CAN: contrast, repaint and denoise at once. Mishra et al. 2022, arXiv 2210.16870.

Two masked views of an image find one another in the batch; of each, the decoder predicts the pixels that are hidden
and the noise that was laid on those that are not, told how much of it there was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from model.objectives.base import Objective, Outcome
from model.objectives.mae import build_decoder, decoded_count
from model.shape import Shape, decoder_macs, encoder_macs, head_macs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from model.network import Network
    from pipeline.sampling import View
    from pipeline.views import Patches

WAVES = 128  # width of the sinusoids that tell the decoder the noise's deviation


@dataclass(frozen=True, kw_only=True)
class CAN(Objective):
    """Match two masked and noisy views, repaint what they hide, tell the noise on what they show."""

    idea: ClassVar[str] = "two masked, noisy views agree and are repainted; their noise is told from them"
    paper: ClassVar[str] = "Mishra et al. 2022, arXiv 2210.16870"

    mask_ratio: float = 0.5
    """Share of the patches of each view hidden from the encoder."""
    noise: float = 0.05
    """Largest deviation of the noise on what the encoder sees, in normalised pixels; drawn anew for each view."""
    rec_target: Literal["clean", "noisy"] = "clean"
    """What hidden patches are to be repainted as: without the noise (the paper's text) or with it (its code)."""
    contrast_weight: float = 0.03
    """Share of the contrastive term in the loss; the two terms of pixels have the rest."""
    noise_weight: float = 0.3
    """Share of the noise in what the terms of pixels have; the repainting has the rest."""
    temperature: float = 0.1
    """Of the contrastive softmax."""
    norm_pix: bool = False
    """Predict each hidden patch normalised by its own mean and deviation; the noise stays as it is."""
    area: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Colour changes: brightness, contrast, saturation, hue."""
    gray: float = 0.2
    """Probability of grayscale."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    head_hidden: int | None = None
    """None: the encoder's width."""
    head_out: int = 128

    def check(self, batch: int, images: int | None = None) -> None:
        if not 0 < self.mask_ratio < 1 or self.noise < 0:
            raise UsageError("--method.mask-ratio lies between 0 and 1, and --method.noise is at least 0.")
        if not (0 <= self.contrast_weight <= 1 and 0 <= self.noise_weight <= 1):
            raise UsageError("--method.contrast-weight and --method.noise-weight are shares, from 0 to 1.")

    def views(self, shape: Shape) -> dict[str, View]:
        from pipeline.sampling import View

        return dict.fromkeys(("one", "other"), View(
            side=shape.side, area=self.area, jitter=self.jitter, gray=self.gray, blur=self.blur,
            mask_ratio=self.mask_ratio, noise=self.noise,
        ))  # fmt: skip

    def parts(self, shape: Shape) -> dict:
        from model.decoder import NoiseLevel
        from model.heads import Projector

        return {
            "decoder": build_decoder(shape), "noise_level": NoiseLevel(shape.width, WAVES),
            "projector": Projector(shape.width, self.head_hidden or shape.width, self.head_out, "none"),
        }  # fmt: skip

    def loss(self, net: Network, views: dict[str, Patches], label: Tensor) -> Outcome:
        import torch

        from model.heads import pair_health
        from model.losses import nt_xent

        pair = [views["one"], views["other"]]
        codes = net.encoder(*pair)  # (B, 1 + K, D) each
        features = [code.mean(dim=1) for code in codes]  # of all tokens, as its code does
        one, other = (net.parts["projector"](each) for each in features)
        agree = nt_xent(one, other, temperature=self.temperature)
        errors = [self._errors(net, code, view) for code, view in zip(codes, pair, strict=True)]
        repaint, found = (torch.stack(each).mean() for each in zip(*errors, strict=True))
        pixels = 1 - self.contrast_weight
        terms = {
            "contrast": self.contrast_weight * agree,
            "reconstruct": pixels * (1 - self.noise_weight) * repaint,
            "noise": pixels * self.noise_weight * found,
        }
        watched = {"nt_xent": agree.detach(), "repaint_error": repaint.detach(), "noise_error": found.detach()}
        return Outcome(terms, watched | pair_health(one, other), features[0].detach())

    def _errors(self, net: Network, code: Tensor, view: Patches) -> tuple[Tensor, Tensor]:
        """How far the decoder is from the hidden patches of a view, and from the noise on the others."""
        from model.losses import masked_mse
        from pipeline.views import take

        assert view.hidden is not None
        assert view.noise is not None
        decoder = net.parts["decoder"]
        predicted, tokens = decoder(self._told(net, code, view), view, view.hidden)
        found = decoder.pred(tokens[:, 1 : 1 + view.tokens])  # pyright: ignore[reportCallIssue]
        target = take(view.pixels, view.hidden)
        if self.rec_target == "noisy":
            target = target + take(view.noise, view.hidden)
        return (
            masked_mse(predicted, target, norm_pix=self.norm_pix),
            masked_mse(found, view.kept(view.noise), norm_pix=False),
        )

    def _told(self, net: Network, code: Tensor, view: Patches) -> Tensor:
        """(B, 1 + K, D): the code with the noise's deviation in every token."""
        return code + net.parts["noise_level"](view.sigma)

    def code(self, net: Network, view: Patches) -> Tensor:
        return self._told(net, super().code(net, view), view)

    def macs(self, shape: Shape) -> int:
        kept, hidden = decoded_count(shape, self.mask_ratio, 1.0)
        head = head_macs(shape.width, self.head_hidden or shape.width, self.head_out)
        told = head_macs(WAVES, shape.width, shape.width)
        found = kept * shape.decoder_width * shape.values
        return 2 * (encoder_macs(shape, kept) + decoder_macs(shape, kept, hidden) + head + told + found)
