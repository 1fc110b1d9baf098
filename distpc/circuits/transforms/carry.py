"""Carries a circuit's statistics over to other numbers of units.

Every change of units is, for each region, a map M (new units x old units) of shares: a kept unit
has share 1 of itself, a clone its share of the original, a merged unit 1 of each part. Statistics
are expected uses, so those of an input follow as M S, those of a sum as M' S M^T (M' of the sum's
own units, M of its child's). Where the columns of every M sum to one, uses stay what they were and
the statistics stay on the flow scale; where units are dropped, what remains of a row is scaled to
the row's old total.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.bank import Bank
from distpc.circuits.circuit import Circuit
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.sums import SumBank
from distpc.circuits.transforms.states import States
from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class UnitMap:
    """M of one region, by its entries that are not zero.

    Attributes:
        target: (E,) new units.
        source: (E,) old units.
        share: (E,) float64.
        copy: for each new unit 0, 1, ... among the clones of one unit; -1 where it has none.
        num_old: old units.
    """

    target: Tensor
    source: Tensor
    share: Tensor
    copy: Tensor
    num_old: int

    @property
    def is_shared(self) -> Tensor:
        """Bool, whether each new unit is one of several made of the same old one."""
        shared = torch.zeros(len(self.copy), dtype=torch.bool)
        shared[self.target[self.share < 1]] = True
        return shared

    def apply(self, rows: Tensor) -> Tensor:
        """M @ rows, for rows (old units, C)."""
        out = rows.new_zeros(len(self.copy), rows.shape[1])
        return out.index_add_(0, self.target, rows[self.source] * self.share.to(rows).unsqueeze(1))

    def lift(self, rows: Tensor) -> Tensor:
        """M^T @ rows, for rows (new units, C)."""
        out = rows.new_zeros(self.num_old, rows.shape[1])
        return out.index_add_(0, self.source, rows[self.target] * self.share.to(rows).unsqueeze(1))


def unit_maps(
    states: States, copies: np.ndarray, parts: Mapping[int, tuple[int, ...]] | None = None
) -> list[UnitMap]:
    """The map of every region, given what becomes of each state.

    Args:
        states: of the circuit.
        copies: (number,) new units in place of each state's: 0 drops it, 2 clones it. Clones are
            neighbours, and the order of units is kept.
        parts: for some states, of which states the new unit is made; itself alone else. What
            several new units are made of is shared equally.
    """
    parts = {} if parts is None else parts
    maps: list[UnitMap] = []
    for index, region in enumerate(states.graph.regions):
        if region.kind == "kronecker":
            maps.append(_pairs(*(maps[child] for child in region.children)))
            continue
        of_units = states.of_units[index]
        maps.append(_unit_map(of_units, copies[of_units], parts))
    return maps


def _unit_map(
    of_units: np.ndarray, counts: np.ndarray, parts: Mapping[int, tuple[int, ...]]
) -> UnitMap:
    kept = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    copy = np.where(counts[kept] > 1, np.arange(len(kept)) - first[kept], -1)
    made = of_units[kept]
    special = [state for state in parts if state in set(made)] if parts else []
    plain = ~np.isin(made, special)
    targets, sources = [np.flatnonzero(plain)], [kept[plain]]
    for state in special:
        for part in parts[state]:
            targets.append(np.flatnonzero(made == state))
            sources.append(np.flatnonzero(of_units == part))
            # Exchangeable states have equally many units in every region.
            assert len(targets[-1]) == len(sources[-1]), "parts are exchangeable states"
    target, source = np.concatenate(targets), np.concatenate(sources)
    share = 1.0 / np.bincount(source, minlength=len(counts))[source]
    tensors = [torch.from_numpy(array) for array in (target, source, share, copy)]
    return UnitMap(tensors[0], tensors[1], tensors[2], tensors[3], num_old=len(counts))


def _pairs(left: UnitMap, right: UnitMap) -> UnitMap:
    """The map of a Kronecker product's units, numbered i * K2 + j."""
    size = len(left.copy) * len(right.copy)
    return UnitMap(
        target=(left.target.unsqueeze(1) * len(right.copy) + right.target).flatten(),
        source=(left.source.unsqueeze(1) * right.num_old + right.source).flatten(),
        share=(left.share.unsqueeze(1) * right.share).flatten(),
        copy=torch.full((size,), -1),
        num_old=left.num_old * right.num_old,
    )


def mixing_blocks(graph: RegionGraph, maps: list[UnitMap]) -> dict[int, int]:
    """The new number of blocks of the sums that have as many blocks as units."""
    return {
        index: len(maps[index].copy)
        for index, region in enumerate(graph.regions)
        if region.kind == "sum" and region.blocks > 1 and region.blocks == region.num_units
    }


def carry_over(
    circuit: Circuit, maps: list[UnitMap], blocks: Mapping[int, int] | None = None
) -> Circuit:
    """A circuit whose regions have the maps' units, with the statistics of `circuit`.

    Smoothing, masks, standardisation and descriptions are kept; a unit that lost all that it
    mixed is uniform over what is left.

    Args:
        circuit: left as it is.
        maps: of every region, children's maps alike where regions share units.
        blocks: of block-diagonal sums, by region, where they change.

    Raises:
        StructureError: blocks that would lose weights.
    """
    blocks = {} if blocks is None else blocks
    graph = RegionGraph(
        [
            replace(region, num_units=len(of_region.copy), blocks=blocks.get(index, region.blocks))
            for index, (region, of_region) in enumerate(
                zip(circuit.graph.regions, maps, strict=True)
            )
        ],
        circuit.graph.num_variables,
    )
    new = Circuit(graph, circuit.num_categories, max_fold_bytes=circuit.max_fold_bytes)
    new.to(circuit.device)
    new.set_smoothing(*circuit.smoothing)
    new.any_rank = circuit.any_rank
    new.dataset, new.training_facts = dict(circuit.dataset), dict(circuit.training_facts)
    for bank, plan in zip(new.bank_list, new.schedule.banks, strict=True):
        for table, owners in enumerate(plan.owners):
            _carry_table(circuit, new, maps, bank, table, owners[0])
        if isinstance(bank, SumBank) and bank.mask is not None and bool(bank.mask.all()):
            bank.mask = None
    return new


def _carry_table(
    old: Circuit, new: Circuit, maps: list[UnitMap], bank: Bank, table: int, region: int
) -> None:
    source, source_table = old.bank_of(region)
    rows = source.statistics_of(source_table).double().cpu()
    if isinstance(bank, SumBank):
        assert isinstance(source, SumBank)
        old_mask = None if source.mask is None else source.mask[source_table].cpu()
        rows, mask = _carry_sum(old.graph, new.graph, maps, region, rows, old_mask)
        if mask is not None:
            if bank.mask is None:
                bank.mask = torch.ones_like(bank.statistics, dtype=torch.bool)
            bank.mask[table] = mask
    else:
        of_region = maps[region]
        total = of_region.apply(torch.ones(len(rows), 1, dtype=torch.float64))
        rows = of_region.apply(rows)
        if bank.learns_by == "gradient":
            # Parameters that are no statistics do not add up: the parts' mean.
            rows /= total
        if isinstance(source, GaussianBank):
            assert isinstance(bank, GaussianBank)
            bank.centre[table] = source.centre[source_table]
            bank.spread[table] = source.spread[source_table]
    bank.statistics_of(table)[:] = rows.to(bank.statistics)


def _carry_sum(
    old: RegionGraph,
    new: RegionGraph,
    maps: list[UnitMap],
    region: int,
    rows: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Statistics (K', fan-in) and mask of a sum's new units."""
    own, below = maps[region], maps[old.regions[region].children[0]]
    total = own.apply(rows.sum(-1, keepdim=True))
    is_dense = old.regions[region].blocks == 1
    if is_dense:
        edges = None if mask is None else mask.double()
    else:
        width = old.regions[old.regions[region].children[0]].num_units
        mixed = torch.from_numpy(old.mixed_units(region))
        edges = torch.zeros(len(rows), width, dtype=torch.float64)
        edges.scatter_(1, mixed, torch.ones_like(rows) if mask is None else mask.double())
        rows = torch.zeros_like(edges).scatter_(1, mixed, rows)
        rows = rows / _carried(new, region, own, below, rows)
    rows = below.apply(own.apply(rows).T).T
    if edges is not None:
        edges = below.apply(own.apply(edges).T).T
    if not is_dense:
        mixed = torch.from_numpy(new.mixed_units(region))
        rows = rows.gather(1, mixed)
        edges = None if edges is None else edges.gather(1, mixed)
    found = rows.sum(-1, keepdim=True)
    rows = rows * torch.where(found > 0, total / found, 1.0)
    if edges is None or bool((edges > 0).all()):
        return rows, None
    is_empty = ~(edges > 0).any(-1, keepdim=True)
    return rows, (edges > 0) | is_empty


def _carried(new: RegionGraph, region: int, own: UnitMap, below: UnitMap, rows: Tensor) -> Tensor:
    """The part (K', K) of each old weight that lies in a new block; 1 where it is dropped.

    Raises:
        StructureError: a weight between units that both live on, but in different blocks.
    """
    mixed = torch.from_numpy(new.mixed_units(region))
    inside = torch.zeros(len(mixed), len(below.copy), dtype=torch.float64).scatter_(1, mixed, 1.0)
    part = below.lift(own.lift(inside).T).T
    lives = torch.zeros_like(rows, dtype=torch.bool)
    lives[own.source.unsqueeze(1), below.source] = True
    if bool((lives & (rows > 0) & (part <= 0)).any()):
        raise StructureError(
            "a change of units would take weights out of a sum's blocks",
            where=f"region {region} (sum)",
            found=f"{new.regions[region].blocks} blocks",
        )
    return torch.where(part > 0, part, 1.0)
