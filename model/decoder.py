"""MAE's decoder: a light ViT over the visible tokens and mask tokens that predicts the hidden patches; CAN's code of
how noisy what it decodes was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.norm import LayerNorm
from model.vit import Block, Positions, init_weights, matched
from pipeline.views import Patches


class Decoder(nn.Module):
    """Source: He et al. 2021, section 3. Tokens stay in the order (class, kept, hidden): attention has no order of its
    own, so MAE's unshuffle into the grid is only the position code's choice, and is left out."""

    undecayed = ("mask_token",)  # see train/optim.py
    ledger_part = "decoder"

    def __init__(self, *, encoder_width: int, width: int, depth: int, heads: int, grid: int, values: int):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-6)
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
        seen = self.embed(code)
        positions = matched(self.positions(view.grid, code.device), seen)
        seen = torch.cat([seen[:, :1], seen[:, 1:] + positions[view.keep]], dim=1)
        guessed = matched(self.mask_token, seen) + positions[hidden]
        tokens = torch.cat([seen, guessed.to(seen.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return self.pred(tokens[:, -hidden.shape[1] :]), tokens


class NoiseLevel(nn.Module):
    """Deviation of an image's noise as a vector to add to its tokens: sinusoids, Linear - ReLU - Linear.

    Source: CAN (Mishra et al. 2022, arXiv 2210.16870) and its code.
    """

    frequency: Tensor  # (waves / 2,), from 1 down to 1 / 10000

    def __init__(self, width: int, waves: int):
        super().__init__()
        place = torch.arange(waves // 2, dtype=torch.float64) / (waves // 2 - 1)
        self.register_buffer("frequency", (10000.0**-place).float(), persistent=False)
        self.layers = nn.Sequential(nn.Linear(waves, width), nn.ReLU(), nn.Linear(width, width))
        init_weights(self)

    def forward(self, sigma: Tensor) -> Tensor:
        """(B,) -> (B, 1, width)."""
        phase = sigma[:, None] * self.frequency
        return self.layers(torch.cat([phase.sin(), phase.cos()], dim=1))[:, None]
