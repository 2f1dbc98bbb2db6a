"""An encoder under a linear head: what end-to-end fine-tuning trains."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model.norm import FinalNorm
from model.precise import exact
from model.vit import Encoder, patch_mean
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
        self.fc_norm = FinalNorm(encoder.width, eps=1e-6)
        self.head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, encoder.width, classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, view: Patches, branches: Tensor | None = None) -> Tensor:
        """(B, C) logits. branches: (B, depth, 2), what attention and MLP of each block are multiplied by, for each
        image; see sampling.branch_scales. None while nothing is dropped."""
        (code,) = self.encoder.encode(self.encoder.embed(view), branches=branches)
        # Near 10 the steps of bfloat16 are a sixteenth: the first two classes would often tie.
        with torch.autocast(code.device.type, enabled=False):
            return self.head(self.fc_norm(patch_mean(exact(code))))
