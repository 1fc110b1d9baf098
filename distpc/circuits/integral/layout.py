"""Which functions of which quadrature points write which entries of a circuit's statistics.

Plain data, from a region graph and its schedule. A unit of an input or sum stands for one point of
one latent, a unit of a Kronecker product for a pair of points, a unit of a concat for a point of
one alternative; single units (roots) stand for no latent. So an entry of a sum's matrix is
f(z_row, z_column), with f numbered by the table and the alternative. Regions keep their indices
whatever K is, and functions are numbered by regions, so that one set of functions fits every K.

Legend: T tables, K' rows, F columns of a sum; d axes, the coordinates of a point.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.schedule import BankPlan, Schedule
from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph

Sizes = tuple[int, ...]
"""Points of each axis of a unit; () for a single unit."""


@dataclass(frozen=True)
class Grid:
    """Pairs of a row and a column at which functions are evaluated.

    Attributes:
        shape: (K', columns of the alternative that a row mixes).
        sizes: points of each axis, those of rows first.
        indices: of each axis which point, (K' * columns,) int64.
        num_row_axes: how many of the axes are a row's.
    """

    shape: tuple[int, int]
    sizes: Sizes
    indices: tuple[Tensor, ...]
    num_row_axes: int

    @property
    def group(self) -> str:
        """Name of the functions of as many axes."""
        return f"sum_{self.num_row_axes}_{len(self.sizes) - self.num_row_axes}"


@dataclass(frozen=True)
class Part:
    """Columns start .. stop - 1 of a sum: those of one alternative, which may be all there is."""

    grid: Grid
    alternative: int
    start: int
    stop: int
    is_whole: bool


@dataclass(frozen=True)
class SumUse:
    """Entries of one bank that functions write: columns start .. stop - 1 of all its tables.

    Attributes:
        bank: number of the bank.
        owners: (T,) the first region of each table, and the alternative: which function it is.
        is_whole: whether there is no other alternative, so that a factor on f cancels.
    """

    bank: int
    owners: tuple[tuple[int, int], ...]
    start: int
    stop: int
    is_whole: bool


@dataclass(frozen=True)
class InputUse:
    """Tables first .. first + count - 1 of an input bank, all of one number of categories.

    Attributes:
        bank: number of the bank.
        kind: family of the inputs.
        size: C.
        num_units: K.
        owners: (count,) which function each table is.
        first: the first table.
        row: of the tables' rows the first, where tables lie one below the other.
    """

    bank: int
    kind: str
    size: int
    num_units: int
    owners: tuple[tuple[int, int], ...]
    first: int
    row: int

    @property
    def group(self) -> str:
        """Name of the functions of this family and size."""
        return f"{self.kind}_{self.size}_{int(self.num_units > 1)}"


@dataclass(frozen=True)
class Layout:
    """All of a circuit: what functions of sums write, grid by grid, and what those of inputs do."""

    sums: tuple[tuple[Grid, tuple[SumUse, ...]], ...]
    inputs: tuple[InputUse, ...]

    @property
    def functions(self) -> dict[str, list[tuple[int, int]]]:
        """Of each group its functions (region, alternative), in order."""
        found: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for grid, uses in self.sums:
            for use in uses:
                found[grid.group].update(use.owners)
        for of_input in self.inputs:
            found[of_input.group].update(of_input.owners)
        return {group: sorted(owners) for group, owners in sorted(found.items())}

    @property
    def sizes(self) -> list[int]:
        """All numbers of points that axes have, in order."""
        of_inputs = [use.num_units for use in self.inputs if use.num_units > 1]
        return sorted({*of_inputs, *(size for grid, _ in self.sums for size in grid.sizes)})


def layout_of(graph: RegionGraph, schedule: Schedule) -> Layout:
    """The layout of a compiled circuit.

    Raises:
        StructureError: a region whose units stand for no points of latents.
    """
    alternatives = _alternatives(graph)
    known: dict[object, list[Part]] = {}
    of_grids: dict[int, tuple[Grid, list[SumUse]]] = {}
    inputs: list[InputUse] = []
    for number, plan in enumerate(schedule.banks):
        if plan.kind != "sum":
            inputs += _input_uses(number, plan)
            continue
        first = plan.owners[0][0]
        child = graph.regions[first].children[0]
        key = (alternatives[first], alternatives[child], plan.blocks, plan.strided)
        if key not in known:
            known[key] = _parts(graph, first, alternatives)
        for part in known[key]:
            owners = tuple((of_table[0], part.alternative) for of_table in plan.owners)
            _, uses = of_grids.setdefault(id(part.grid), (part.grid, []))
            uses.append(SumUse(number, owners, part.start, part.stop, part.is_whole))
    return Layout(tuple((grid, tuple(uses)) for grid, uses in of_grids.values()), tuple(inputs))


def _alternatives(graph: RegionGraph) -> list[tuple[Sizes, ...]]:
    """Of each region the axes of its units, one entry an alternative."""
    found: list[tuple[Sizes, ...]] = []
    for index, region in enumerate(graph.regions):
        below = [found[child] for child in region.children]
        if region.kind in ("input", "sum"):
            own: tuple[Sizes, ...] = ((region.num_units,) if region.num_units > 1 else (),)
        elif region.kind == "product":
            own = below[0]
        elif region.kind == "concat":
            own = tuple(sizes for child in below for sizes in child)
        elif all(len(child) == 1 for child in below):
            own = (tuple(size for child in below for size in child[0]),)
        else:
            raise StructureError(
                "units of a structure stand for no points of latents",
                where=f"region {index} ({region.kind})",
                found="a Kronecker product of alternatives",
                expected="a sum between the two",
            )
        found.append(own)
    return found


def _parts(graph: RegionGraph, index: int, alternatives: Sequence[tuple[Sizes, ...]]) -> list[Part]:
    """The columns of a sum, alternative by alternative."""
    region = graph.regions[index]
    mixed = graph.mixed_units(index)
    (row_sizes,) = alternatives[index]
    rows = _unravel(np.arange(region.num_units), row_sizes)
    parts, first = [], 0
    for number, sizes in enumerate(alternatives[region.children[0]]):
        last = first + math.prod(sizes)
        inside = (mixed >= first) & (mixed < last)
        columns = np.flatnonzero(inside[0])
        if not (inside == inside[0]).all():
            raise StructureError(
                "rows of a sum mix units of different alternatives",
                where=f"region {index} (sum)",
                found=f"{region.blocks} blocks",
                expected="a dense sum, or a mixing layer",
            )
        if len(columns):
            shape = (region.num_units, len(columns))
            of_rows = [np.broadcast_to(axis[:, None], shape) for axis in rows]
            of_columns = _unravel(mixed[:, columns] - first, sizes)
            indices = [torch.from_numpy(axis.reshape(-1).copy()) for axis in of_rows + of_columns]
            grid = Grid(shape, row_sizes + sizes, tuple(indices), len(row_sizes))
            is_whole = len(columns) == mixed.shape[1]
            parts.append(Part(grid, number, int(columns[0]), int(columns[-1]) + 1, is_whole))
        first = last
    return parts


def _unravel(units: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
    return list(np.unravel_index(units, sizes)) if sizes else []


def _input_uses(number: int, plan: BankPlan) -> list[InputUse]:
    """An input bank by its tables' number of categories; equal ones lie side by side."""
    uses: list[InputUse] = []
    row = first = 0
    for size in dict.fromkeys(plan.sizes):
        count = plan.sizes.count(size)
        owners = tuple((of_table[0], 0) for of_table in plan.owners[first : first + count])
        uses.append(InputUse(number, plan.kind, size, plan.num_units, owners, first, row))
        row, first = row + count * size, first + count
    return uses
