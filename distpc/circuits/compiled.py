"""Region graph -> schedule of folded steps.

Regions are scheduled as late as possible: level(region) = 1 + the highest level of its parents,
the root at 0, so that in a tree every child sits on the level just below its parent. Regions of
one level, kind and shape are one step. A product whose children are all categorical inputs
becomes one row of an input step (a bag of table rows), and all input steps run first.

The order of rows is chosen from the root down, so that a consumer finds its rows in one slice:
a message that several steps read is split once instead of being sliced, because each slice would
cost a zero-filled copy of the whole message in backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

from distpc.circuits.families import BAGGED, family_of
from distpc.circuits.packing import pack_tables
from distpc.circuits.routing import (
    Order,
    concat_requests,
    deal,
    gather,
    product_terms,
)
from distpc.circuits.schedule import (
    BankPlan,
    ConcatPlan,
    InputPlan,
    KroneckerPlan,
    ProductPlan,
    Schedule,
    StepPlan,
    SumPlan,
)
from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph

MAX_FOLD_BYTES = 64 * 2**20
"""ZeRO-3 gathers a fold as a whole, so a fold's parameters are bounded."""


def compile_graph(
    graph: RegionGraph,
    num_categories: Sequence[int | None],
    max_fold_bytes: int = MAX_FOLD_BYTES,
    *,
    late_inputs: bool = False,
) -> Schedule:
    """Compile a region graph.

    Args:
        graph: the circuit's structure.
        num_categories: for each variable its number of categories, None for a real one.
        max_fold_bytes: bound on the float32 parameters of a fold (one matrix may exceed it).
        late_inputs: evaluate inputs just before what reads them, in more and smaller steps,
            instead of all of them first. Parameters are the same.

    Raises:
        StructureError: tied regions differ in shape, or a region is not below the root.
    """
    return _Compiler(graph, num_categories, max_fold_bytes).schedule(late_inputs)


class _Compiler:
    def __init__(
        self, graph: RegionGraph, num_categories: Sequence[int | None], max_fold_bytes: int
    ) -> None:
        self.regions = graph.regions
        self.root = graph.root
        self.num_categories = num_categories
        self.max_fold_bytes = max_fold_bytes
        self.parents: list[list[int]] = [[] for _ in self.regions]
        for index, region in enumerate(self.regions):
            for child in region.children:
                self.parents[child].append(index)
        self._check()
        self.levels = self._levels()
        self.is_bag = [self._is_bag(index) for index in range(len(self.regions))]
        self.is_input = [
            self.is_bag[index] or (region.kind == "input" and not self._only_in_bags(index))
            for index, region in enumerate(self.regions)
        ]
        self.members: list[list[int]] = [[] for _ in range(1 + max(self.levels))]
        for index, region in enumerate(self.regions):
            if region.kind != "input" and not self.is_bag[index]:
                self.members[self.levels[index]].append(index)
        self.sums_of: dict[Hashable, list[int]] = defaultdict(list)
        for index, region in enumerate(self.regions):
            if region.kind == "sum":
                self.sums_of[self._table(index)].append(index)
        self.shared_banks: dict[Hashable, int] = {}
        self.order = Order(len(self.regions))
        self.banks: list[BankPlan] = []

    def schedule(self, late_inputs: bool) -> Schedule:
        # Folds are found from the root down, because a row's place follows from its consumers';
        # they run the other way round.
        folds: list[tuple[str, tuple[int, ...], tuple[int, int]]] = []
        for members in self.members:
            folds += self._folds(members)
        folds.reverse()
        reader = self._first_readers(folds) if late_inputs else {}
        inputs = self._input_plans(reader)
        places: list[tuple[int, int] | None] = [None] * len(self.regions)
        # Inputs of a fold, then the fold.
        order: list[tuple[int, InputPlan | tuple[str, tuple[int, ...], tuple[int, int]]]]
        order = [(reader.get(plan.regions[0], -1), plan) for plan in inputs]
        order += list(enumerate(folds))
        order.sort(key=lambda entry: (entry[0], not isinstance(entry[1], InputPlan)))
        in_order = [entry for _, entry in order]
        for step, entry in enumerate(in_order):
            rows = entry.regions if isinstance(entry, InputPlan) else entry[1]
            for row, region in enumerate(rows):
                places[region] = (step, row)
        steps = [
            entry if isinstance(entry, InputPlan) else self._plan(*entry, places)
            for entry in in_order
        ]
        root = places[self.root]
        assert root is not None
        fanouts = deal(steps)
        is_tree = all(len(parents) == 1 for parents in self.parents[: self.root])
        return Schedule(
            steps=tuple(steps),
            banks=tuple(self.banks),
            fanouts=fanouts,
            places=tuple(places),
            root=root,
            reads_once=is_tree and all(region.kind != "concat" for region in self.regions),
        )

    def _check(self) -> None:
        shapes: dict[tuple[str, str], object] = {}
        for index, region in enumerate(self.regions):
            if index != self.root and not self.parents[index]:
                raise StructureError(
                    "a region is not below the root",
                    where=f"region {index} ({region.kind})",
                    expected="every region but the root has a parent",
                )
            if region.tie is None or region.kind not in ("input", "sum"):
                continue
            layout = (region.num_units, region.blocks, region.strided)
            units = layout if region.kind == "sum" else self._input_key(index)
            shape = (units, self._size(index))
            if shapes.setdefault((region.kind, region.tie), shape) != shape:
                raise StructureError(
                    "tied regions differ in shape",
                    where=f"region {index}, tie '{region.tie}'",
                    found=shape,
                    expected=f"(units, size) = {shapes[region.kind, region.tie]}",
                )

    def _levels(self) -> list[int]:
        levels = [0] * len(self.regions)
        for index in range(self.root, -1, -1):
            levels[index] = 1 + max((levels[p] for p in self.parents[index]), default=-1)
        return levels

    def _is_bag(self, index: int) -> bool:
        region = self.regions[index]
        return region.kind == "product" and all(
            self.regions[child].kind == "input" and self._input_key(child)[0] == BAGGED
            for child in region.children
        )

    def _only_in_bags(self, index: int) -> bool:
        return bool(self.parents[index]) and all(self.is_bag[p] for p in self.parents[index])

    def _size(self, index: int) -> int:
        """Fan-in of a sum, categories of an input."""
        region = self.regions[index]
        if region.kind == "sum":
            return self.regions[region.children[0]].num_units // region.blocks
        assert region.variable is not None
        return self.num_categories[region.variable] or 0

    def _table(self, index: int) -> Hashable:
        """What names a region's parameters: its tie, or else its number (never equal to one)."""
        tie = self.regions[index].tie
        return index if tie is None else tie

    def _latent(self, index: int) -> int:
        """The latent that masks a region's units, -1 for none.

        The evidence of a latent product also masks children that only it reads: they are then
        rescaled to the observed unit, which would otherwise be far below their maximum.
        """
        latent = self.regions[index].latent
        if latent is None and self.regions[index].kind != "sum" and len(self.parents[index]) == 1:
            parent = self.regions[self.parents[index][0]]
            latent = parent.latent if parent.kind == "product" else None
        return -1 if latent is None else latent

    def _latents(self, regions: Iterable[int]) -> tuple[int, ...]:
        return tuple(self._latent(region) for region in regions)

    def _children(self, index: int) -> tuple[int, ...]:
        """Children with inputs first: a product then reads them as one slice."""
        children = self.regions[index].children
        if self.regions[index].kind != "product":
            return children
        return tuple(sorted(children, key=lambda child: not self.is_input[child]))

    def _key(self, index: int) -> tuple[object, ...]:
        # By falling number of factors: those that add logs come first, and second and later
        # factors belong to the first rows.
        fanin = len(self.regions[index].children) if self.regions[index].kind == "product" else 0
        return (-fanin, *self.order.key(index))

    def _folds(self, members: list[int]) -> list[tuple[str, tuple[int, ...], tuple[int, int]]]:
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index in members:
            region = self.regions[index]
            units = tuple(self.regions[child].num_units for child in region.children)
            own = (region.num_units, region.blocks, region.strided)
            shape = own if region.kind == "product" else (own, units)
            groups[region.kind, shape].append(index)
        folds: list[tuple[str, tuple[int, ...], tuple[int, int]]] = []
        for (kind, _), group in groups.items():
            if kind == "sum":
                folds += [("sum", rows, detail) for rows, detail in self._sum_folds(group)]
            else:
                rows = tuple(sorted(group, key=self._key))
                folds.append((str(kind), rows, (0, 0)))
        for _, rows, _ in folds:
            self.order.place(rows, self._children)
        return folds

    def _sum_folds(self, members: list[int]) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
        """Split sums of one level and shape into folds of one bank each."""
        child_key = {index: self._key(self.regions[index].children[0])[:1] for index in members}
        key = {index: (*child_key[index], *self.order.key(index)) for index in members}
        tables: dict[Hashable, list[int]] = defaultdict(list)
        for index in sorted(members, key=lambda index: key[index]):
            tables[self._table(index)].append(index)
        by_rows: dict[tuple[int, Hashable], list[list[int]]] = defaultdict(list)
        for table, rows in tables.items():
            # A tie that also occurs on other levels keeps a bank of its own.
            shared = table if len(self.sums_of[table]) > len(rows) else None
            by_rows[len(rows), shared].append(rows)
        at_once = max(1, self.max_fold_bytes // self._table_bytes(members[0]))
        folds = []
        for (rows_per_table, shared), group in by_rows.items():
            for start in range(0, len(group), at_once):
                chunk = group[start : start + at_once]
                bank = self._sum_bank(chunk, shared)
                rows_in_order = tuple(index for rows in chunk for index in rows)
                folds.append((rows_in_order, (bank, rows_per_table)))
        return folds

    def _sum_bank(self, tables: list[list[int]], shared: Hashable) -> int:
        first = tables[0][0]
        if shared is not None:
            if shared in self.shared_banks:
                return self.shared_banks[shared]
            tables = [self.sums_of[shared]]
            self.shared_banks[shared] = len(self.banks)
        self.banks.append(
            BankPlan(
                kind="sum",
                owners=tuple(map(tuple, tables)),
                num_units=self.regions[first].num_units,
                sizes=(self._size(first),) * len(tables),
                blocks=self.regions[first].blocks,
                strided=self.regions[first].strided,
            )
        )
        return len(self.banks) - 1

    def _first_readers(
        self, folds: Sequence[tuple[str, tuple[int, ...], tuple[int, int]]]
    ) -> dict[int, int]:
        """For each region that a fold reads, the first such fold."""
        readers: dict[int, int] = {}
        for number, (_, rows, _) in enumerate(folds):
            for row in rows:
                for child in self.regions[row].children:
                    readers.setdefault(child, number)
        return readers

    def _input_plans(self, reader: Mapping[int, int]) -> list[InputPlan]:
        """Steps of inputs, apart where they have other readers."""
        rows = [index for index, is_input in enumerate(self.is_input) if is_input]
        rows.sort(key=self.order.key)
        bags = [self.regions[row].children if self.is_bag[row] else (row,) for row in rows]
        owners: dict[Hashable, list[int]] = defaultdict(list)
        for index, region in enumerate(self.regions):
            if region.kind == "input":
                owners[self._table(index)].append(index)
        first_bank = len(self.banks)
        bank_of_row, tables_of_bank = pack_tables(
            [[self._table(child) for child in bag] for bag in bags],
            key_of=lambda table: self._input_key(owners[table][0]),
            bytes_of=lambda table: self._table_bytes(owners[table][0]),
            max_bytes=self.max_fold_bytes,
        )
        self.banks += [self._input_bank([owners[t] for t in tables]) for tables in tables_of_bank]
        groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for position, bag in enumerate(bags):
            read_by = reader.get(rows[position], -1)
            groups[first_bank + bank_of_row[position], len(bag), read_by].append(position)
        return [
            InputPlan(
                regions=tuple(rows[position] for position in members),
                bank=bank,
                bags=tuple(bags[position] for position in members),
                latents=self._latents(rows[position] for position in members),
            )
            for (bank, _, _), members in groups.items()
        ]

    def _input_bank(self, owners: list[list[int]]) -> BankPlan:
        # Tables of one size side by side are normalised in one operation.
        owners = sorted(owners, key=lambda regions: self._size(regions[0]))
        kind, num_units = self._input_key(owners[0][0])
        return BankPlan(
            kind=kind,
            owners=tuple(map(tuple, owners)),
            num_units=num_units,
            sizes=tuple(self._size(regions[0]) for regions in owners),
        )

    def _input_key(self, index: int) -> tuple[str, int]:
        region = self.regions[index]
        assert region.variable is not None
        return family_of(region, self.num_categories[region.variable]), region.num_units

    def _table_bytes(self, index: int) -> int:
        return 4 * self.regions[index].num_units * max(1, self._size(index))

    def _plan(
        self,
        kind: str,
        rows: tuple[int, ...],
        detail: tuple[int, int],
        places: Sequence[tuple[int, int] | None],
    ) -> StepPlan:
        if kind == "sum":
            children = [self.regions[row].children[0] for row in rows]
            return SumPlan(
                regions=rows,
                bank=detail[0],
                rows_per_table=detail[1],
                rescale=any(self.regions[p].kind == "sum" for r in rows for p in self.parents[r]),
                requests=(gather(children, places),),
            )
        if kind == "product":
            request, terms, num_log_rows = product_terms(
                [self._children(row) for row in rows], places
            )
            return ProductPlan(rows, terms, num_log_rows, self._latents(rows), (request,))
        requests = concat_requests([self.regions[row].children for row in rows], places)
        if kind == "kronecker":
            return KroneckerPlan(rows, self._latents(rows), requests)
        return ConcatPlan(rows, self._latents(rows), requests)
