"""Sizes of encoder and decoder, and what a step costs by the project's one FLOP formula. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pipeline.errors import UsageError

Norm = Literal["batch", "batch_apart", "layer", "none"]  # of a head, see heads.py


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the encoder and of MAE's decoder."""

    side: int = 224
    """Pixels of the full-size view."""
    patch: int = 16
    """Pixels of a patch's side."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    @property
    def grid(self) -> int:
        return self.side // self.patch

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def values(self) -> int:
        """Values per patch, P = 3 p^2."""
        return 3 * self.patch**2

    def check(self) -> None:
        """Raises UsageError where the sizes do not fit one another."""
        if self.side % self.patch:
            raise UsageError(f"--model.side {self.side} is not a multiple of --model.patch {self.patch}.")
        for name, width, heads in (("", self.width, self.heads), ("decoder-", self.decoder_width, self.decoder_heads)):
            if width % heads or width % 4:
                raise UsageError(
                    f"--model.{name}width {width} must be a multiple of 4 and of --model.{name}heads {heads}."
                )


def block_macs(tokens: int, width: int) -> int:
    """Multiply-accumulates of one block, forward, one image: 12 N d^2 for the products with weights and 2 N^2 d for
    attention. Norms, softmax, GELU and biases are left out."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def encoder_macs(shape: Shape, patches: int) -> int:
    """Embedding of the patches that are seen, and the blocks over them and the class token."""
    return patches * shape.values * shape.width + shape.depth * block_macs(1 + patches, shape.width)


def decoder_macs(shape: Shape, kept: int, decoded: int) -> int:
    """Entry, blocks over class, kept and decoded tokens, and the prediction of decoded patches only."""
    entry = (1 + kept) * shape.width * shape.decoder_width
    blocks = shape.decoder_depth * block_macs(1 + kept + decoded, shape.decoder_width)
    return entry + blocks + decoded * shape.decoder_width * shape.values


def head_macs(*widths: int) -> int:
    """A chain of linear layers on one vector."""
    return sum(one * other for one, other in pairwise(widths))
