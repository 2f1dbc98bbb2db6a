"""Muon: matrices move along their momentum made orthogonal, everything else by AdamW.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the step sized like AdamW's (Liu et al. 2025,
"Muon is scalable for LLM training", eq. 4), so that one learning rate and one decay serve both. torch has a Muon
too; it takes one matrix after the other and cannot leave a step out on the device's word.
"""

from __future__ import annotations

# torch documents its _foreach functions by use alone.
# pyright: reportPrivateImportUsage=false
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

# A quintic whose slope at 0 is as steep as it can be: five rounds take singular values from 0.01 to near 1.
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
LIKE_ADAM = 0.2  # root mean square of what AdamW moves a weight by, in units of the learning rate


class Muon(torch.optim.Optimizer):
    """Two optimizers that step together; groups and state of both are its own.

    matrices: groups of parameters of two dimensions. A group's `pieces` says how many matrices a parameter is made of,
    one above the other: 3 for queries, keys and values. rest: a fused AdamW.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over found_inf instead of asking the device

    def __init__(self, matrices: list[dict[str, Any]], rest: torch.optim.AdamW, *, momentum: float = 0.95):
        super().__init__(matrices, {**rest.defaults, "momentum": momentum, "pieces": 1})
        self.rest, self.matrices = rest, list(self.param_groups)
        self.param_groups += rest.param_groups
        self.state = rest.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        refused = getattr(self, "found_inf", None)  # a scalar on the device: 1 leaves everything as it is
        self.rest.found_inf = refused  # pyright: ignore[reportAttributeAccessIssue]
        self.rest.step()
        for group in self.matrices:
            self._move(group, refused)

    def _move(self, group: dict[str, Any], refused: Tensor | None) -> None:
        weights = [each for each in group["params"] if each.grad is not None]
        if not weights:
            return
        gradients = [each.grad for each in weights]
        for each in weights:
            if "momentum" not in self.state[each]:
                self.state[each]["momentum"] = torch.zeros_like(each)
        momenta = [self.state[each]["momentum"] for each in weights]
        lr, keep = group["lr"], group["momentum"]
        taken = torch.ones((), device=weights[0].device) if refused is None else 1 - refused.to(weights[0].device)
        if refused is not None:  # nothing of a gradient that is not finite may come near the momentum
            gradients = [torch.where(taken > 0, each, 0.0) for each in gradients]
        torch._foreach_mul_(momenta, 1 - (1 - keep) * taken)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=keep)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"] * taken)
        for weight, turned in zip(weights, orthogonal(list(ahead), group["pieces"]), strict=True):
            rows, columns = weight.shape[0] // group["pieces"], weight.shape[1]
            weight.sub_(turned * (lr * LIKE_ADAM * max(rows, columns) ** 0.5 * taken))


def orthogonal(updates: list[Tensor], pieces: int) -> list[Tensor]:
    """Each (m, n) update, every one of its `pieces` made nearly orthogonal; those of one shape all at once."""
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for place, update in enumerate(updates):
        alike[update.shape].append(place)
    turned = list(updates)
    for shape, places in alike.items():
        stack = torch.stack([updates[place] for place in places])
        whole = newton_schulz(stack.view(len(places) * pieces, shape[0] // pieces, shape[1])).view_as(stack)
        for place, each in zip(places, whole.unbind(), strict=True):
            turned[place] = each
    return turned


def newton_schulz(matrices: Tensor) -> Tensor:
    """(k, m, n) -> the same singular vectors with singular values between about 0.7 and 1.2.

    In bfloat16 on a GPU that has units for it, where the error is far below that spread, and as they come elsewhere.
    """
    a, b, c = QUINTIC
    units = matrices.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.bfloat16() if units else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
