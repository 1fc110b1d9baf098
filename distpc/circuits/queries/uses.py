"""How often a sample uses each unit: top-down probabilities, without evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distpc.circuits.schedule import Schedule, SumPlan
from distpc.circuits.sums import SumBank
from distpc.structures.region_graph import RegionGraph

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


class WeightBlock(NamedTuple):
    """The weights of consecutive units of a sum.

    Attributes:
        table: of the bank.
        units: of that table.
        weights: (n, fan-in) float64; (1, fan-in) where all these units mix alike.
    """

    table: int
    units: range
    weights: Tensor


@torch.no_grad()
def uses(
    circuit: Circuit, dtype: torch.dtype = torch.float32, *, smoothed: bool = True
) -> list[Tensor]:
    """For each region (num_units,): how often a sample is expected to use each of its units.

    Computed in float64: without evidence every unit's likelihood is 1, and a sum hands on its use
    in proportion to its weights.

    Args:
        circuit: whose uses.
        dtype: of the result.
        smoothed: whether smoothing counts, as it does in the circuit's distribution. A state that
            no data use has uses by smoothing alone.
    """
    banks = circuit.bank_list

    def weights(bank: int) -> Iterable[WeightBlock]:
        sums = banks[bank]
        assert isinstance(sums, SumBank)
        blocks = sums.weight_blocks(torch.float64, smoothed=smoothed)
        return (WeightBlock(*block) for block in blocks)

    return hand_down(circuit.graph, circuit.schedule, weights, circuit.device, dtype)


def hand_down(
    graph: RegionGraph,
    schedule: Schedule,
    weights: Callable[[int], Iterable[WeightBlock]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """`uses` of a circuit whose sums' weights are read by bank, some units at a time."""
    totals = [torch.zeros(r.num_units, dtype=torch.float64, device=device) for r in graph.regions]
    totals[graph.root] += 1.0
    for plan in reversed(schedule.steps):
        if not isinstance(plan, SumPlan):
            for index in plan.regions:
                _hand_on(graph, index, totals)
            continue
        for block in weights(plan.bank):
            first = block.table * plan.rows_per_table
            for index in plan.regions[first : first + plan.rows_per_table]:
                _mix(graph, index, block, totals)
    return [total.to(dtype) for total in totals]


def _mix(graph: RegionGraph, index: int, block: WeightBlock, totals: list[Tensor]) -> None:
    """The uses of some units of a sum, added to those of the units that they mix."""
    region = graph.regions[index]
    child = totals[region.children[0]]
    used = totals[index][block.units.start : block.units.stop]
    if region.blocks == 1:
        child += used.sum() * block.weights[0] if len(block.weights) == 1 else used @ block.weights
        return
    mixed = torch.from_numpy(graph.mixed_units(index, block.units)).to(child.device)
    child.index_add_(0, mixed.flatten(), (used.unsqueeze(1) * block.weights).flatten())


def _hand_on(graph: RegionGraph, index: int, totals: list[Tensor]) -> None:
    """The uses of a region that is no sum, added to its children's."""
    region = graph.regions[index]
    if region.kind == "kronecker":
        left, right = region.children
        pairs = totals[index].view(-1, graph.regions[right].num_units)
        totals[left] += pairs.sum(1)
        totals[right] += pairs.sum(0)
    elif region.kind == "concat":
        sizes = [graph.regions[child].num_units for child in region.children]
        for child, part in zip(region.children, totals[index].split(sizes), strict=True):
            totals[child] += part
    else:
        for child in region.children:
            totals[child] += totals[index]
