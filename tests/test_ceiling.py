"""The machine's speed in products, found within seconds on any."""

from __future__ import annotations

import pytest
import torch

from train import ceiling

CPU = torch.device("cpu")


class Machine:
    """A clock that moves by what products cost, and the products that were taken."""

    def __init__(self, flops: float):
        self.flops, self.now, self.sides = flops, 0.0, []

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def mm(self, one: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor) -> None:
        self.sides.append(len(one))
        self.now += 2 * len(one) ** 3 / self.flops


@pytest.mark.parametrize(
    ("flops", "largest"),
    [(1.3e9, 512), (5e9, 1024), (40e9, 2048)],  # bf16 on a CPU without units for it, one slow core, two with AVX2
)
def test_a_slow_machine_is_not_asked_for_large_products(monkeypatch, flops, largest):
    machine = Machine(flops)
    monkeypatch.setattr(ceiling, "time", machine)
    monkeypatch.setattr(ceiling.torch, "mm", machine.mm)
    assert ceiling.gemm_flops(CPU, "fp32") == pytest.approx(flops, rel=0.01)
    assert max(machine.sides) == largest
    assert machine.now < 4 * (ceiling.SECONDS + ceiling.LONGEST)
