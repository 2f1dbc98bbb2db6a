"""MAE's decoder: a light ViT over the visible tokens and mask tokens that predicts the hidden patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.vit import Block, init_weights, sincos_positions


class Decoder(nn.Module):
    """Source: He et al. 2021, section 3. Tokens stay in the order (class, kept, hidden): attention has no order of its
    own, so MAE's unshuffle into the grid is only the position code's choice, and is left out."""

    positions: Tensor  # (N, width), fixed

    def __init__(self, *, encoder_width: int, width: int, depth: int, heads: int, grid: int, values: int):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, values)
        self.register_buffer("positions", sincos_positions(width, grid, grid), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        init_weights(self)

    def forward(self, code: Tensor, keep: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, P) predicted values of the patches `hidden`, and all tokens after the norm, (B, 1 + K + M, width).

        code: (B, 1 + K, D) from the encoder; keep: (B, K); hidden: (B, M), all or some of the hidden patches. Tokens
        are of the class, of the kept patches and of `hidden`; the visible ones have no loss and no prediction.
        """
        seen = self.embed(code)
        seen = torch.cat([seen[:, :1], seen[:, 1:] + self.positions[keep]], dim=1)
        guessed = self.mask_token + self.positions[hidden]
        tokens = torch.cat([seen, guessed.to(seen.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return self.pred(tokens[:, -hidden.shape[1] :]), tokens
