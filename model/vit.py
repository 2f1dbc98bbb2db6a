"""A compact Vision Transformer: any resolution, kept patches only, timm's parameter names.

Source: Dosovitskiy et al. 2020 as in MAE (He et al. 2021): pre-norm blocks, fixed sin-cos positions, one class token.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model.attention import Attend, attend
from model.norm import FinalNorm, LayerNorm
from model.shape import Shape
from pipeline.views import Patches


def sincos_positions(width: int, grid: int, base: int) -> Tensor:
    """(grid^2, width) float32 position code of a grid of patches, rows first.

    Coordinates are relative to the image: a coarser grid samples the base grid's code at its own patch centres,
    x_j = (j + 1/2) base / grid - 1/2, so that the same place in the picture has the same code at every resolution. At
    grid = base this is MAE's code to the bit. The column comes first, as in MAE; in each half first the sines.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    coordinate = (torch.arange(grid, dtype=torch.float64) + 0.5) * (base / grid) - 0.5
    phase = coordinate[:, None] * frequency[None, :]
    code = torch.cat([phase.sin(), phase.cos()], dim=1)  # (grid, width / 2)
    column = code[None, :, :].expand(grid, grid, -1)
    row = code[:, None, :].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid * grid, width).float()


class Positions:
    """Position codes, made once per grid and device. Fixed, hence no parameter and in no checkpoint."""

    def __init__(self, width: int, base: int):
        self.width, self.base = width, base
        self._made: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, grid: int, device: torch.device) -> Tensor:
        """(grid^2, width)."""
        if (grid, device) not in self._made:
            self._made[grid, device] = sincos_positions(self.width, grid, self.base).to(device)
        return self._made[grid, device]


def matched(values: Tensor, tokens: Tensor) -> Tensor:
    """`values` in the type of the tokens they are added to, where that is bfloat16.

    Under autocast a product is bfloat16; one float32 addend, and what runs through the blocks is float32 from there on:
    twice the bytes in every sum and norm, and a pass that rounds before every product. float16 overflows instead.
    """
    return values.to(tokens.dtype) if tokens.dtype == torch.bfloat16 else values


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, attend_by: Attend | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = (attend_by or attend)(query, key, value)
        return self.proj(seen.transpose(1, 2).reshape(batch, count, width))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, tokens: Tensor, attend_by: Attend | None = None, branches: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D). branches: (B, 2), what attention and MLP are multiplied by, for each image."""
        if branches is None:
            tokens = tokens + self.attn(self.norm1(tokens), attend_by)
            return tokens + self.mlp(self.norm2(tokens))
        attention, mlp = matched(branches, tokens)[:, :, None, None].unbind(1)
        tokens = tokens + attention * self.attn(self.norm1(tokens), attend_by)
        return tokens + mlp * self.mlp(self.norm2(tokens))


class PatchEmbed(nn.Module):
    """Holds the weight of timm's strided convolution; the product is taken on patches that are already cut."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, 3 p^2) in (channel, row, column) order -> (B, N, D)."""
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Patches of one or several views in, class token and patch tokens after the final norm out."""

    undecayed = ("cls_token",)  # see train/optim.py
    ledger_part = "encoder"

    def __init__(self, *, side: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.patch, self.width, self.depth = patch, width, depth
        self.grid = side // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = FinalNorm(width, eps=1e-6)
        self.positions = Positions(width, self.grid)
        nn.init.normal_(self.cls_token, std=0.02)
        init_weights(self)

    def embed(self, view: Patches) -> Tensor:
        """(B, K, D): what the encoder sees of a view, each token with the code of its place."""
        tokens = self.patch_embed(view.visible())
        positions = matched(self.positions(view.grid, view.pixels.device), tokens)
        return tokens + (positions if view.keep is None else positions[view.keep])

    def forward(
        self,
        *views: Patches,
        marks: Tensor | None = None,
        attend_by: Attend | None = None,
        after: tuple[int, ...] = (),
    ) -> list[Tensor]:
        """(B, 1 + K, D) for each view: class token first, after the final norm.

        Views with equally many tokens go through the blocks as one batch: fewer calls, larger products.
        marks: (K, D), added to the patch tokens. attend_by: how the blocks attend, where not by softmax over all.
        after: behind these come, for each view again, the tokens as they are after so many blocks, without the norm;
        first those of all views after the first of these numbers.
        """
        tokens = [self.embed(view) for view in views]
        if marks is not None:
            tokens = [one + matched(marks, one) for one in tokens]
        codes: dict[int, Tensor] = {}
        for count in dict.fromkeys(one.shape[1] for one in tokens):
            places = [place for place, one in enumerate(tokens) if one.shape[1] == count]
            alike = [tokens[place] for place in places]
            branches = None
            if views[places[0]].branches is not None:  # all of them have some, or none has
                branches = torch.cat([cast(Tensor, views[place].branches) for place in places])
            made = self.encode(torch.cat(alike) if len(alike) > 1 else alike[0], attend_by, after, branches)
            for order, each in enumerate(made):
                parts = each.split([len(one) for one in alike])
                codes.update(zip([order * len(tokens) + place for place in places], parts, strict=True))
        return [codes[place] for place in range(len(codes))]

    def encode(
        self,
        tokens: Tensor,
        attend_by: Attend | None = None,
        after: tuple[int, ...] = (),
        branches: Tensor | None = None,
    ) -> list[Tensor]:
        """(B, K, D) -> (B, 1 + K, D) after the final norm, and the same without it after so many blocks, rising.

        branches: (B, depth, 2), what each block multiplies its residual branches by; None: nothing is left out.
        """
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        tapped = []
        for done, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, attend_by, None if branches is None else branches[:, done - 1])
            if done in after:
                tapped.append(tokens)
        return [self.norm(tokens), *tapped]


def build_encoder(shape: Shape) -> Encoder:
    return Encoder(side=shape.side, patch=shape.patch, width=shape.width, depth=shape.depth, heads=shape.heads)


def init_weights(module: nn.Module) -> None:
    """MAE's: Xavier-uniform for every matrix, the patch projection taken as one too; biases 0, norms 1 and 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight.flatten(1) if isinstance(part, nn.Conv2d) else part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def patch_mean(tokens: Tensor) -> Tensor:
    """(B, 1 + K, D) -> (B, D): mean of the patch tokens, class token left out."""
    return tokens[:, 1:].mean(dim=1)
