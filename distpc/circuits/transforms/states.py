"""States: units that stand and fall together, found by union-find over a region graph.

Unit k of a product is unit k of each of its children; a unit of a concat is one of a child's; tied
regions share rows, and what tied sums mix shares columns; unit k of two regions with one latent is
the same value of it. So transforms act on classes of (region, unit), here called states. Units of
a Kronecker product are pairs of states and belong to none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from distpc.circuits.circuit import Circuit
from distpc.circuits.families import FAMILIES, family_of
from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph

PAIRED = -1
"""In place of the state of a Kronecker product's unit."""


@dataclass
class States:
    """The states of a circuit.

    Attributes:
        graph: of the circuit.
        of_units: for each region (num_units,) the state of its units, or PAIRED.
        number: of states.
        pinned: (number,) bool, states that have to stay as they are: the root's, and those of
            inputs whose units are categories.
        rigid: block-diagonal sums whose blocks have several units: no single one can go.
    """

    graph: RegionGraph
    of_units: list[np.ndarray]
    number: int
    pinned: np.ndarray
    rigid: list[int]

    @cached_property
    def regions(self) -> list[tuple[int, ...]]:
        """Of each state its regions, each as often as it has units of the state.

        Two states with equal regions are exchangeable: values of the same latents.
        """
        owned: list[list[int]] = [[] for _ in range(self.number)]
        for index, states in enumerate(self.of_units):
            for state in states[states != PAIRED]:
                owned[state].append(index)
        return [tuple(regions) for regions in owned]

    def use(self, nodes: list[np.ndarray]) -> np.ndarray:
        """Of each state how often it is used, (number,).

        Args:
            nodes: for each region the uses of its units. Those of tied regions are summed, and of
                a state's different tables the largest counts.
        """
        tables: dict[object, tuple[np.ndarray, np.ndarray]] = {}
        for index, (region, of_region) in enumerate(zip(self.graph.regions, nodes, strict=True)):
            name: object = index if region.tie is None else (region.kind, region.tie)
            known = tables.get(name)
            sums = of_region if known is None else known[1] + of_region
            tables[name] = (self.of_units[index], sums)
        total = np.zeros(self.number)
        for states, sums in tables.values():
            own = states != PAIRED
            np.maximum.at(total, states[own], sums[own])
        return total

    def refuse_rigid(self, what: str) -> None:
        """Raise StructureError where single units cannot be changed."""
        if self.rigid:
            region = self.graph.regions[self.rigid[0]]
            raise StructureError(
                f"{what} cannot change single units of a block-diagonal sum",
                where=f"region {self.rigid[0]} (sum)",
                found=f"{region.blocks} blocks, {region.num_units} units",
                expected="dense sums, or blocks of one unit (mixing layers)",
                fix="grow all units at once, or use a dense sum",
            )

    def of(self, region: int, unit: int) -> int:
        """The state of a unit.

        Raises:
            StructureError: no such region or unit, or one that cannot change on its own.
        """
        known = 0 <= region < len(self.of_units)
        if not known or not 0 <= unit < len(self.of_units[region]):
            raise StructureError(
                "there is no such unit",
                where=f"region {region}, unit {unit}",
                found=f"{len(self.of_units[region])} units" if known else "no such region",
            )
        state = int(self.of_units[region][unit])
        if state == PAIRED or self.pinned[state]:
            raise StructureError(
                "a unit cannot be changed on its own",
                where=f"region {region} ({self.graph.regions[region].kind}), unit {unit}",
                found="a pair of its children's units"
                if state == PAIRED
                else "the root's unit, or a unit that is a category",
            )
        return state


def find_states(circuit: Circuit) -> States:
    """The states of a circuit.

    Raises:
        StructureError: a Kronecker product that something else than a dense sum reads, or that is
            tied to another shape: its units are pairs and cannot stand for single states.
    """
    graph = circuit.graph
    joints = _Joints(graph)
    joints.collect()
    labels = joints.solve()
    is_kronecker = [region.kind == "kronecker" for region in graph.regions]
    parts = np.split(labels, joints.offsets[1:-1])
    own = [part for part, paired in zip(parts, is_kronecker, strict=True) if not paired]
    names, packed = np.unique(np.concatenate(own), return_inverse=True)
    sizes = [len(part) for part in own]
    packed_parts = iter(np.split(packed, np.cumsum(sizes)[:-1]))
    of_units = [
        np.full(region.num_units, PAIRED) if paired else next(packed_parts)
        for region, paired in zip(graph.regions, is_kronecker, strict=True)
    ]
    pinned = np.zeros(len(names), dtype=bool)
    pinned[of_units[graph.root]] = True
    for index, region in enumerate(graph.regions):
        if region.kind == "input" and region.variable is not None:
            family = family_of(region, circuit.num_categories[region.variable])
            if FAMILIES[family].units_are_categories:
                pinned[of_units[index]] = True
    return States(graph, of_units, len(names), pinned, joints.rigid)


class _Joints:
    """Pairs of units that are the same state, as indices of all units side by side."""

    def __init__(self, graph: RegionGraph) -> None:
        self.graph = graph
        self.offsets = np.cumsum([0] + [region.num_units for region in graph.regions])
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.rigid: list[int] = []

    def solve(self) -> np.ndarray:
        number = int(self.offsets[-1])
        if not self.pairs:
            return np.arange(number)
        left, right = (np.concatenate(side) for side in zip(*self.pairs, strict=True))
        links = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), (number, number))
        return connected_components(links, directed=False)[1]

    def collect(self) -> None:
        ties: dict[tuple[str, str], int] = {}
        latents: dict[int, int] = {}
        for index, region in enumerate(self.graph.regions):
            self._collect_children(index)
            if region.tie is not None and region.kind in ("input", "sum"):
                first = ties.setdefault((region.kind, region.tie), index)
                self._join_regions(first, index)
                if region.kind == "sum":
                    other = self.graph.regions[first].children[0]
                    self._join_regions(other, region.children[0])
            if region.latent is not None:
                if region.kind == "kronecker":
                    raise self._refusal(index, "a latent whose values are single units")
                first = latents.setdefault(region.latent, index)
                units = np.arange(min(region.num_units, self.graph.regions[first].num_units))
                self._join(first, units, index, units)

    def _collect_children(self, index: int) -> None:
        region = self.graph.regions[index]
        dense = region.kind == "sum" and region.blocks == 1
        if not dense:
            for child in region.children:
                if self.graph.regions[child].kind == "kronecker":
                    raise self._refusal(child, f"dense sums; region {index} is a {region.kind}")
        units = np.arange(region.num_units)
        if region.kind == "product":
            for child in region.children:
                self._join(index, units, child, units)
        elif region.kind == "concat":
            start = 0
            for child in region.children:
                of_child = np.arange(self.graph.regions[child].num_units)
                self._join(index, start + of_child, child, of_child)
                start += len(of_child)
        elif region.kind == "sum" and region.blocks > 1:
            if region.blocks < region.num_units:
                self.rigid.append(index)
            else:
                mixed = self.graph.mixed_units(index)
                for column in mixed.T:
                    self._join(index, units, region.children[0], column)

    def _join_regions(self, left: int, right: int) -> None:
        """Make unit k of both regions the same."""
        if left == right:
            return
        regions = self.graph.regions[left], self.graph.regions[right]
        paired = [region.kind == "kronecker" for region in regions]
        if any(paired):
            shapes = [[self.graph.regions[c].num_units for c in r.children] for r in regions]
            if not all(paired) or shapes[0] != shapes[1]:
                raise self._refusal(left if paired[0] else right, "ties to a product of its shape")
            for of_left, of_right in zip(regions[0].children, regions[1].children, strict=True):
                self._join_regions(of_left, of_right)
            return
        units = np.arange(regions[0].num_units)
        self._join(left, units, right, units)

    def _join(self, left: int, units: np.ndarray, right: int, others: np.ndarray) -> None:
        self.pairs.append((self.offsets[left] + units, self.offsets[right] + others))

    def _refusal(self, index: int, expected: str) -> StructureError:
        return StructureError(
            "the units of a Kronecker product are pairs, and cannot be changed one by one here",
            where=f"region {index} (kronecker)",
            expected=expected,
        )
