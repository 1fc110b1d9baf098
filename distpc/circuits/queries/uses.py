"""How often a sample uses each unit: top-down probabilities, without evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distpc.circuits.queries.tables import sum_tables
from distpc.circuits.schedule import SumPlan

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


@torch.no_grad()
def uses(circuit: Circuit, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """For each region (num_units,): how often a sample is expected to use each of its units.

    Computed in float64: without evidence every unit's likelihood is 1, and a sum hands on its use
    in proportion to its weights.
    """
    graph, device = circuit.graph, circuit.device
    totals = [torch.zeros(r.num_units, dtype=torch.float64, device=device) for r in graph.regions]
    totals[graph.root] += 1.0
    for plan in reversed(circuit.schedule.steps):
        if isinstance(plan, SumPlan):
            for index, weights in sum_tables(circuit, plan, torch.float64):
                passed = totals[index].unsqueeze(1) * weights
                mixed = torch.from_numpy(graph.mixed_units(index)).to(device)
                child = graph.regions[index].children[0]
                totals[child].index_add_(0, mixed.flatten(), passed.flatten())
        else:
            for index in plan.regions:
                _hand_on(circuit, index, totals)
    return [total.to(dtype) for total in totals]


def _hand_on(circuit: Circuit, index: int, totals: list[Tensor]) -> None:
    """The uses of a region that is no sum, added to its children's."""
    region = circuit.graph.regions[index]
    if region.kind == "kronecker":
        left, right = region.children
        pairs = totals[index].view(-1, circuit.graph.regions[right].num_units)
        totals[left] += pairs.sum(1)
        totals[right] += pairs.sum(0)
    elif region.kind == "concat":
        sizes = [circuit.graph.regions[child].num_units for child in region.children]
        for child, part in zip(region.children, totals[index].split(sizes), strict=True):
            totals[child] += part
    else:
        for child in region.children:
            totals[child] += totals[index]
