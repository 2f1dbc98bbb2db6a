"""MAE's decoder: a light ViT over the visible tokens and mask tokens that predicts the hidden patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.vit import Block, Positions, init_weights
from pipeline.views import Patches


class Decoder(nn.Module):
    """Source: He et al. 2021, section 3. Tokens stay in the order (class, kept, hidden): attention has no order of its
    own, so MAE's unshuffle into the grid is only the position code's choice, and is left out."""

    def __init__(self, *, encoder_width: int, width: int, depth: int, heads: int, grid: int, values: int):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, values)
        self.positions = Positions(width, grid)
        nn.init.normal_(self.mask_token, std=0.02)
        init_weights(self)

    def forward(self, code: Tensor, view: Patches, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, P) predicted values of the patches `hidden`, and all tokens after the norm, (B, 1 + K + M, width).

        code: (B, 1 + K, D) from the encoder; view: what it encoded; hidden: (B, M), all or some of the hidden patches.
        Tokens are of the class, of the kept patches and of `hidden`; the visible ones have no loss and no prediction.
        """
        assert view.keep is not None
        positions = self.positions(view.grid, code.device)
        seen = self.embed(code)
        seen = torch.cat([seen[:, :1], seen[:, 1:] + positions[view.keep]], dim=1)
        guessed = self.mask_token + positions[hidden]
        tokens = torch.cat([seen, guessed.to(seen.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return self.pred(tokens[:, -hidden.shape[1] :]), tokens
