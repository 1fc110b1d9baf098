"""The machine's own rate: the three products of every dense fold as plain batched matmuls."""

from __future__ import annotations

import torch
from torch import Tensor

from circuit_bench.cases import Case
from distpc.circuits.circuit import Circuit
from distpc.circuits.schedule import SumPlan


class Products:
    """For each fold of E sums: (E, B, K) x (E, K, K) forward, backward and for the statistics.

    Operands are random and all of them are in memory at once, as in a step; results go to memory
    that is there already.
    """

    def __init__(self, case: Case, circuit: Circuit, device: str) -> None:
        self.dtype = getattr(torch, case.dtype)
        self.device = device
        self.terms = [self._term(*shape) for shape in fold_shapes(case, circuit)]

    def run(self) -> None:
        """All products of a step: forward first, then backward."""
        for u, theta, _, out, *_ in self.terms:
            torch.bmm(u, theta.mT, out=out)
        for u, theta, ratio, _, flow_u, flow_s in reversed(self.terms):
            torch.bmm(ratio, theta, out=flow_u)
            torch.bmm(ratio.mT, u, out=flow_s)

    def _term(self, folds: int, rows: int, units: int) -> tuple[Tensor, ...]:
        u, ratio = self._random(folds, rows, units), self._random(folds, rows, units)
        theta = self._random(folds, units, units)
        out = torch.empty_like(u)
        return u, theta, ratio, out, torch.empty_like(u), torch.empty_like(theta)

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device).to(self.dtype)


def fold_shapes(case: Case, circuit: Circuit) -> list[tuple[int, int, int]]:
    """(E, rows, K) of every dense K x K sum step of a compiled circuit."""
    regions = circuit.graph.regions
    shapes = []
    for plan in circuit.schedule.steps:
        if not isinstance(plan, SumPlan):
            continue
        region = regions[plan.regions[0]]
        if region.num_units == regions[region.children[0]].num_units == case.num_states:
            folds = len(plan.regions) // plan.rows_per_table
            shapes.append((folds, plan.rows_per_table * case.batch, case.num_states))
    return shapes
