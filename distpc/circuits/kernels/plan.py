"""How a circuit lies in memory for the fused step: nodes, tables and stages, as plain numbers.

A *node* is what a sum reads: the product of some input units and of some other sums, unit by unit.
Each sum reads one node and, in a tree, each node and each sum is read once: so node i and sum i
share a number. Everything of one shape lies in one buffer, tables (matrices) of one stage side by
side, so that a stage is one batched matrix product.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from distpc.circuits.bank import Bank
from distpc.circuits.circuit import Circuit
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.sums import SumBank

SUM_FLOOR = 1e-16
"""eps, in uses per sample, that keeps a unit of a sum above 1e-20 of its child's largest: far above
what rounds to 0 in a message whose maximum is 1."""
MAX_ENTRIES = 2**31
"""Kernels count within a table by 32 bits."""
LEAF_FLOOR = 1e-14
"""The same of a leaf's entry; a leaf times a sum stays above 1e-38."""


@dataclass(frozen=True)
class LeafFactor:
    """An input region of a node: a variable looked up in a table of a bank."""

    variable: int
    bank: int
    table: int


@dataclass
class Node:
    """What one sum reads, and that sum.

    Attributes:
        region: the sum.
        shape: (K', K) of its matrix.
        stage: 0 for one that reads inputs alone, else one more than the last sum that it reads.
        leaves: factors that are inputs.
        sums: factors that are sums: first regions, then (in a `Plan`) numbers of nodes.
        bank, table: of its matrix.
    """

    region: int
    shape: tuple[int, int]
    stage: int
    leaves: list[LeafFactor]
    sums: list[int]
    bank: int
    table: int


@dataclass(frozen=True)
class Group:
    """One batched product: `tables` matrices from `table` on, `rows` nodes for each of them.

    The nodes are `node .. node + tables * rows - 1`.
    """

    shape: tuple[int, int]
    table: int
    tables: int
    node: int
    rows: int


@dataclass
class Plan:
    """A circuit, laid out.

    Attributes:
        nodes: sorted by shape, then table, then stage.
        stages: for each stage its products, deepest first; the last one is the root's.
        shapes: for each shape (first node, number of nodes), in the order of `nodes`.
        tables: for each shape the (bank, table in that bank) of each matrix.
        spans: for each shape and table (first node, number of nodes).
    """

    nodes: list[Node]
    stages: list[list[Group]] = field(default_factory=list)
    shapes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    tables: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    spans: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)


def why_not(circuit: Circuit) -> str | None:
    """What of a circuit the fused step does not cover; None if it covers all of it."""
    if not circuit.schedule.reads_once:
        return "a region is read more than once"
    if circuit.exchange is not None:
        return "units are shared out over processes"
    regions = circuit.graph.regions
    kinds = {region.kind for region in regions} - {"input", "product", "sum"}
    if kinds:
        return f"regions of the kind {sorted(kinds)[0]}"
    if regions[circuit.graph.root].kind != "sum" or regions[circuit.graph.root].num_units != 1:
        return "the root is no sum of one unit"
    return next((reason for bank in circuit.bank_list if (reason := _bank_why_not(bank))), None)


def _bank_why_not(bank: Bank) -> str | None:
    entries = bank.statistics[0].numel() if isinstance(bank, SumBank) else bank.statistics.numel()
    if entries >= MAX_ENTRIES:
        return "a table of 2^31 entries or more"
    if isinstance(bank, SumBank):
        if bank.blocks.count > 1:
            return "block-diagonal sums"
        if bank.mask is not None:
            return "pruned edges"
        # With less a message may lose what matters; see `lost`.
        return None if bank.smoothing > SUM_FLOOR else "sums with too small a pseudocount"
    if type(bank) is not CategoricalBank:
        return f"inputs that are no categorical ones ({type(bank).__name__})"
    if bank.kernel is not None:
        return "leaves smoothed over neighbouring values"
    floor = bank.pseudocount / max(bank.sizes)
    return None if floor > LEAF_FLOOR else "leaves with too small a pseudocount"


def make_plan(circuit: Circuit) -> Plan:
    """Lay out a circuit that `why_not` finds nothing against."""
    found = _Nodes(circuit)
    order = sorted(range(len(found.nodes)), key=found.key)
    number = {found.nodes[old].region: new for new, old in enumerate(order)}
    plan = Plan([found.nodes[old] for old in order])
    for node in plan.nodes:
        node.sums = [number[region] for region in node.sums]
    first = 0
    for shape in dict.fromkeys(node.shape for node in plan.nodes):
        members = [i for i, node in enumerate(plan.nodes) if node.shape == shape]
        plan.shapes[shape] = (first, len(members))
        first += len(members)
        spans: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in members:
            spans[plan.nodes[i].bank, plan.nodes[i].table].append(i)
        plan.tables[shape] = list(spans)
        plan.spans[shape] = [(rows[0], len(rows)) for rows in spans.values()]
    plan.stages = _stages(plan)
    return plan


class _Nodes:
    """The nodes of a circuit, children before parents."""

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.regions = circuit.graph.regions
        self.banks = {id(bank): number for number, bank in enumerate(circuit.bank_list)}
        self.nodes: list[Node] = []
        self.stage_of: dict[int, int] = {}
        self.first_stage: dict[tuple[int, int], tuple[int, int]] = {}
        for index, region in enumerate(self.regions):
            if region.kind == "sum":
                self._add(index)

    def key(self, number: int) -> tuple[object, ...]:
        """Nodes of one table side by side, tables by the stage that they are first used in."""
        node = self.nodes[number]
        return (node.shape, self.first_stage[node.bank, node.table], node.stage, number)

    def _add(self, index: int) -> None:
        region = self.regions[index]
        (child,) = region.children
        leaves: list[LeafFactor] = []
        sums: list[int] = []
        self._factors(child, leaves, sums)
        bank, table = self._table(index)
        stage = 1 + max((self.stage_of[s] for s in sums), default=-1)
        self.stage_of[index] = stage
        # The order of first use makes a table's place unique.
        self.first_stage.setdefault((bank, table), (stage, len(self.first_stage)))
        shape = (region.num_units, self.regions[child].num_units)
        self.nodes.append(Node(index, shape, stage, leaves, sums, bank, table))

    def _factors(self, index: int, leaves: list[LeafFactor], sums: list[int]) -> None:
        region = self.regions[index]
        if region.kind == "sum":
            sums.append(index)
        elif region.kind == "input":
            assert region.variable is not None
            leaves.append(LeafFactor(region.variable, *self._table(index)))
        else:
            for child in region.children:
                self._factors(child, leaves, sums)

    def _table(self, index: int) -> tuple[int, int]:
        bank, table = self.circuit.bank_of(index)
        return self.banks[id(bank)], table


def _stages(plan: Plan) -> list[list[Group]]:
    number_of = {
        (shape, table): number
        for shape, tables in plan.tables.items()
        for number, table in enumerate(tables)
    }
    rows: dict[tuple[int, tuple[int, int], int], list[int]] = defaultdict(list)
    for i, node in enumerate(plan.nodes):
        rows[node.stage, node.shape, number_of[node.shape, (node.bank, node.table)]].append(i)
    stages: list[list[Group]] = [[] for _ in range(1 + max(node.stage for node in plan.nodes))]
    for (stage, shape, table), members in sorted(rows.items()):
        assert all(b == a + 1 for a, b in pairwise(members))
        new = Group(shape, table, 1, members[0], len(members))
        groups = stages[stage]
        if groups and _continues(groups[-1], new):
            last = groups.pop()
            new = Group(shape, last.table, last.tables + 1, last.node, last.rows)
        groups.append(new)
    return stages


def _continues(last: Group, new: Group) -> bool:
    """Whether a group's matrix and nodes follow those of the group before."""
    return (
        last.shape == new.shape
        and last.rows == new.rows
        and last.table + last.tables == new.table
        and last.node + last.tables * last.rows == new.node
    )
