"""Layer norm of tokens that run through the blocks in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.precise import exact


class LayerNorm(nn.LayerNorm):
    """torch's: on a CPU in the type of its tokens, with a backward pass of ours for bfloat16. Where CUDA's autocast is
    on it norms in float32, which a compiled step makes part of its neighbours."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        summed = input.dtype == torch.bfloat16 and input.device.type == "cpu" and self.weight is not None
        if summed and not torch.compiler.is_compiling():  # what is compiled sums in float32 by itself
            return _Summed.apply(input, self.weight, self.bias, self.eps)
        return super().forward(input)


class FinalNorm(nn.LayerNorm):
    """Gives features in float32 at least, whatever type ran through the blocks."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return super().forward(exact(input))


class _Summed(torch.autograd.Function):
    """torch's CPU kernel adds up the gradients of weight and bias in bfloat16, token by token: over 1,600 tokens the
    sums are off by 2 to 3 %, over 6,300 by up to 26 %. Here they are products with a row of numbers, which add up in
    float32: 0.3 %."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        normal, mean, scale = torch.native_layer_norm(tokens, weight.shape, weight, bias, eps)
        ctx.save_for_backward(tokens, weight, bias, mean, scale)
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, weight, bias, mean, scale = ctx.saved_tensors
        to_tokens, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, tokens, weight.shape, mean, scale, weight, bias, [True, False, False]
        )
        # The weight's is the sum of grad (tokens - mean) scale, taken apart so that no token is written out normalised.
        grad, tokens = grad.flatten(0, -2), tokens.flatten(0, -2)
        mean, scale = mean.flatten(), scale.flatten()
        rows = torch.stack([-mean * scale, torch.ones_like(scale)]).to(grad.dtype)
        shifted, to_bias = (rows @ grad).to(weight.dtype)
        to_weight = (scale.to(grad.dtype)[None] @ (grad * tokens))[0].to(weight.dtype) + shifted
        return to_tokens, to_weight, to_bias, None
