"""The memory of a fused step: buffers of all nodes and tables, and where in them each one lies.

Messages are flat buffers, a node after another, (B, K) each:

* `u`: what sum i reads, its maximum 1;
* `y`: the sum i's unnormalised products u @ W^T, (B, K'); backward turns them into the ratios
  flow / y, in place;
* `v`: ratio @ W, and then the flow u * v of a node.

W = S + eps is kept beside the statistics S, rounded to the type of the products; a row's sum over
the *rounded* entries normalises it, so that rounding moves no mass. Statistics stay where the
circuit has them: offsets count from the first bank's storage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.kernels.plan import LeafFactor, Plan
from distpc.circuits.sums import SumBank

ALIGN = 8
"""Entries that offsets are multiples of, where K is: 16 bytes of bfloat16."""


_UNSORTED = 4
"""Up to so many chunks a table, each of them looks through all tokens."""


class Tables:
    """The matrices (T, K', K) of one shape.

    Attributes:
        statistics: of the first matrix's bank; `at` (T,) int64 counts from its first entry.
        weights: W, (T, K', K), rows not normalised.
        inverse: 1 / row sums of W, (T, K').
        floor: eps.
        u_at, ratio_at: (T,) where the nodes of a matrix begin in `u` and `y`.
        lengths: (T,) int32 rows of those: nodes times samples.
    """

    def __init__(self, circuit: Circuit, plan: Plan, shape: tuple[int, int], batch: int) -> None:
        self.shape = shape
        self.owners = plan.tables[shape]
        self.banks = [circuit.bank_list[bank] for bank, _ in self.owners]
        floors = {bank.smoothing for bank in self.banks if isinstance(bank, SumBank)}
        assert len(floors) == 1, "sums of one shape are smoothed alike"
        (self.floor,) = floors
        self.batch = batch
        self.count = len(self.owners)

    def allocate(
        self, inverse: Tensor, dtype: torch.dtype, at: tuple[list[int], list[int]]
    ) -> None:
        """Buffers; `at` are the offsets of the first node of each matrix in `u` and in `y`."""
        device = inverse.device
        self.statistics = self.banks[0].statistics.detach()
        self.inverse = inverse.view(self.count, self.shape[0])
        self.weights = torch.empty(self.count, *self.shape, dtype=dtype, device=device)
        places = [_offset(self.statistics, b.statistics[t]) for b, (_, t) in self._pairs()]
        self.at = torch.tensor(places, device=device)
        self.u_at, self.ratio_at = (torch.tensor(part, device=device) for part in at)

    def set_lengths(self, rows: Sequence[int]) -> None:
        """Rows of each matrix: its nodes, times the samples of a batch."""
        self.longest = max(rows) * self.batch
        lengths = [count * self.batch for count in rows]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.weights.device)

    def statistics_of(self, table: int) -> Tensor:
        """S (K', K), a view."""
        return self.banks[table].statistics.detach()[self.owners[table][1]]

    def _pairs(self) -> list[tuple[SumBank, tuple[int, int]]]:
        return list(zip(self.banks, self.owners, strict=True))  # type: ignore[arg-type]


class Leaves:
    """Categorical tables with as many units each, and read by as many nodes each.

    Attributes:
        units: K.
        factors: for each table the (node, variable) that read it, equally many.
        chunk: values that one program owns.
        is_sorted: whether a table has many chunks, so that tokens are sorted by value.
        inverse: 1 / (sums over values + pseudocount), (T, K).
        factor_at: where the flow of each factor begins in `v`.
    """

    inverse: Tensor
    factor_at: Tensor

    def __init__(
        self,
        circuit: Circuit,
        owners: list[tuple[int, int]],
        factors: list[list[tuple[int, int]]],
        base: Tensor,
        chunk: int,
    ) -> None:
        banks = [circuit.bank_list[bank] for bank, _ in owners]
        self.banks: list[CategoricalBank] = banks  # type: ignore[assignment]
        self.owners, self.factors = owners, factors
        self.count, self.reads = len(owners), len(factors[0])
        self.units = self.banks[0].num_units
        self.sizes = [b.sizes[t] for b, (_, t) in zip(self.banks, owners, strict=True)]
        self.chunk = chunk
        self.num_chunks = -(-max(self.sizes) // chunk)
        self.is_sorted = self.num_chunks > _UNSORTED
        device = base.device
        self.at = torch.tensor(
            [_offset(base, self.statistics_of(t)) for t in range(self.count)], device=device
        )
        self.size = torch.tensor(self.sizes, dtype=torch.int32, device=device)
        self.pseudocount = torch.tensor(
            [[bank.pseudocount] for bank in self.banks], device=device, dtype=torch.float32
        )
        self.totals = torch.empty(self.count, self.num_chunks, self.units, device=device)
        variables = [variable for reads in factors for _, variable in reads]
        self.variable = torch.tensor(variables, dtype=torch.int32, device=device)
        self.variable_index = self.variable.long()
        bounds = torch.arange(self.num_chunks + 1, dtype=torch.int32) * chunk
        self.bounds = bounds.to(device).expand(self.count, -1).contiguous()

    def statistics_of(self, table: int) -> Tensor:
        """S (C, K), a view."""
        bank, (_, number) = self.banks[table], self.owners[table]
        return bank.statistics.detach()[bank.table(number)]

    def read_totals(self) -> None:
        """The sums over values, from the statistics."""
        self.totals.zero_()
        for table in range(self.count):
            self.totals[table, 0] = self.statistics_of(table).sum(0)


class Layout:
    """All buffers of a plan, for batches of `batch` samples.

    Args:
        circuit, plan: what is laid out.
        batch: B.
        dtype: of messages and weights.
        chunk: values of a leaf that one program of its update owns.
        at_random: keep the statistics of sums in the weights alone, in bfloat16 rounded at random;
            the circuit's own are out of date then.

    Attributes:
        seed: (1,) int32 of the rounding, another one for each step.
    """

    def __init__(
        self,
        circuit: Circuit,
        plan: Plan,
        batch: int,
        dtype: torch.dtype,
        chunk: int,
        at_random: bool = False,
    ) -> None:
        self.plan, self.batch, self.dtype, self.at_random = plan, batch, dtype, at_random
        self.device = circuit.device
        nodes = plan.nodes
        self.is_aligned = all(
            units % ALIGN == 0 and (rows % ALIGN == 0 or count == 1)
            for (rows, units), (_, count) in plan.shapes.items()
        )
        u_at, y_at = (_message_places(plan, batch, side) for side in (1, 0))
        self.u_at, self.y_at = u_at, y_at
        self.u = torch.zeros(u_at[-1], dtype=dtype, device=self.device)
        self.v = torch.zeros_like(self.u)
        self.y = torch.zeros(y_at[-1], dtype=dtype, device=self.device)
        self.seed = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.log_top = torch.zeros(len(nodes), batch, device=self.device)
        self.codes = torch.full(
            (circuit.num_variables, batch), -1, dtype=torch.int32, device=self.device
        )
        self.tables = {shape: Tables(circuit, plan, shape, batch) for shape in plan.shapes}
        self._lay_tables()
        self._lay_leaves(circuit, chunk)
        self._lay_factors()

    def message(self, buffer: Tensor, node: int) -> Tensor:
        """A node's (B, K) of `u` or `v`, or its (B, K') of `y`; a view."""
        side = 0 if buffer is self.y else 1
        at = (self.y_at if buffer is self.y else self.u_at)[node]
        units = self.plan.nodes[node].shape[side]
        return buffer[at : at + self.batch * units].view(self.batch, units)

    def heads(self, nodes: Sequence[int]) -> Tensor:
        """(nodes, 6) int64: its number, its place in `u`, and its first and end leaf and sum."""
        leaves, sums = self.leaf_starts, self.sum_starts
        rows = [[i, self.u_at[i], leaves[i], leaves[i + 1], sums[i], sums[i + 1]] for i in nodes]
        return torch.tensor(rows, device=self.device)

    def _lay_tables(self) -> None:
        sizes = [tables.count * tables.shape[0] for tables in self.tables.values()]
        starts = _places(sizes)
        self.inverse = torch.zeros(starts[-1], device=self.device)
        self.inverse_at: dict[tuple[int, int], int] = {}
        for (shape, tables), start, size in zip(self.tables.items(), starts, sizes, strict=False):
            spans = self.plan.spans[shape]
            at = [self.u_at[f] for f, _ in spans], [self.y_at[f] for f, _ in spans]
            tables.allocate(self.inverse[start : start + size], self.dtype, at)
            tables.set_lengths([rows for _, rows in spans])
            for number, owner in enumerate(tables.owners):
                self.inverse_at[owner] = start + number * shape[0]

    def _lay_leaves(self, circuit: Circuit, chunk: int) -> None:
        reads: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for i, node in enumerate(self.plan.nodes):
            for leaf in node.leaves:
                reads[leaf.bank, leaf.table].append((i, leaf.variable))
        kinds: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for owner, factors in reads.items():
            units = self.plan.nodes[factors[0][0]].shape[1]
            kinds[units, len(factors)].append(owner)
        first = next(iter(reads))[0]
        self.leaf_base = circuit.bank_list[first].statistics.detach()
        self.leaves = [
            Leaves(circuit, owners, [reads[o] for o in owners], self.leaf_base, chunk)
            for owners in kinds.values()
        ]
        sizes = [leaves.count * leaves.units for leaves in self.leaves]
        starts = _places(sizes)
        self.leaf_inverse = torch.zeros(starts[-1], device=self.device)
        self.leaf_inverse_at: dict[tuple[int, int], int] = {}
        self.leaf_place: dict[tuple[int, int], tuple[Leaves, int]] = {}
        for leaves, start, size in zip(self.leaves, starts, sizes, strict=False):
            leaves.inverse = self.leaf_inverse[start : start + size].view(leaves.count, -1)
            at = [self.u_at[node] for reads in leaves.factors for node, _ in reads]
            leaves.factor_at = torch.tensor(at, device=self.device)
            for number, owner in enumerate(leaves.owners):
                self.leaf_inverse_at[owner] = start + number * leaves.units
                self.leaf_place[owner] = leaves, number

    def _lay_factors(self) -> None:
        nodes = self.plan.nodes
        leaves = [leaf for node in nodes for leaf in node.leaves]
        sums = [s for node in nodes for s in node.sums]
        owner_of = [(node.bank, node.table) for node in nodes]
        self.leaf_starts = _starts([len(n.leaves) for n in nodes])
        self.sum_starts = _starts([len(n.sums) for n in nodes])
        self.leaf_variable = self._tensor([leaf.variable for leaf in leaves], torch.int32)
        self.leaf_at = self._tensor([self._leaf_offset(leaf) for leaf in leaves])
        self.leaf_inverse_of = self._tensor(
            [self.leaf_inverse_at[leaf.bank, leaf.table] for leaf in leaves]
        )
        self.leaf_floor = self._tensor([self._leaf_floor(leaf) for leaf in leaves], torch.float32)
        self.sum_at = self._tensor([self.y_at[s] for s in sums])
        self.sum_inverse_at = self._tensor([self.inverse_at[owner_of[s]] for s in sums])

    def _leaf_offset(self, leaf: LeafFactor) -> int:
        leaves, number = self.leaf_place[leaf.bank, leaf.table]
        return _offset(self.leaf_base, leaves.statistics_of(number))

    def _leaf_floor(self, leaf: LeafFactor) -> float:
        leaves, number = self.leaf_place[leaf.bank, leaf.table]
        return leaves.banks[number].pseudocount / leaves.sizes[number]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        # At least one entry: an empty tensor has no address to hand to a kernel.
        return torch.tensor(list(values) or [0], dtype=dtype, device=self.device)


def _offset(base: Tensor, part: Tensor) -> int:
    """Entries from the first of `base` to the first of `part`, which may lie in another storage."""
    distance, rest = divmod(part.data_ptr() - base.data_ptr(), base.element_size())
    assert rest == 0 and base.dtype == part.dtype and part.is_contiguous()
    return distance


def _message_places(plan: Plan, batch: int, side: int) -> list[int]:
    """Where each node's messages begin, (B, shape[side]); and the end.

    Nodes of one shape follow each other without a gap: a group of them is one matrix product.
    """
    firsts = {first for first, _ in plan.shapes.values()}
    places, end = [], 0
    for i, node in enumerate(plan.nodes):
        if i in firsts:
            end = -(-end // ALIGN) * ALIGN
        places.append(end)
        end += batch * node.shape[side]
    return [*places, end]


def _places(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin, each aligned; and the end."""
    return _starts([-(-size // ALIGN) * ALIGN for size in sizes])


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts
