"""An encoder under a linear head: what end-to-end fine-tuning trains."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from model.vit import Block, Encoder, patch_mean
from pipeline.sampling import uniform
from pipeline.views import Patches


class Classifier(nn.Module):
    """Mean of the patch tokens, a norm of its own, a linear layer. He et al. 2021 (MAE), appendix A.1.

    The encoder's final norm, behind which features are read, has no place here and is taken off. Weights of the head
    are a pure function of (width, classes, seed): N(0, 2e-5^2), biases 0, as in MAE's main_finetune.py.
    """

    def __init__(self, encoder: Encoder, classes: int, seed: int):
        super().__init__()
        self.encoder = encoder
        self.encoder.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.fc_norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, encoder.width, classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, view: Patches, branches: Tensor | None = None) -> Tensor:
        """(B, C) logits. branches: (B, depth, 2), what attention and MLP of each block are multiplied by, for each
        image; see branch_scales. None while nothing is dropped."""
        encoder = self.encoder
        tokens = encoder.embed(view)
        tokens = torch.cat([encoder.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        for place, block in enumerate(encoder.blocks):
            assert isinstance(block, Block)
            if branches is None:
                tokens = block(tokens)
            else:
                attention, mlp = branches[:, place, :, None, None].unbind(1)
                tokens = tokens + attention * block.attn(block.norm1(tokens))
                tokens = tokens + mlp * block.mlp(block.norm2(tokens))
        return self.head(self.fc_norm(patch_mean(tokens)))


def branch_scales(rate: float, depth: int, seed: int, epoch: int, ids: np.ndarray) -> Tensor:
    """Stochastic depth: (B, depth, 2) float32 on the host, 0 where a residual branch of an image is left out, else
    1 / (1 - p), so that the mean stays. p rises linearly from 0 in the first block to `rate` in the last.

    Row i depends on (seed, epoch, ids[i]) alone. Source: Huang et al. 2016, as timm's DropPath.
    """
    chance = np.linspace(0, rate, depth)[None, :, None]
    draw = uniform(seed, epoch, "drop path", ids, 2 * depth).reshape(len(ids), depth, 2)
    return torch.from_numpy(np.where(draw < chance, 0.0, 1 / (1 - chance)).astype(np.float32))
