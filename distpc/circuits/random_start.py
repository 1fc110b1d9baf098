"""Random statistics of a seed, some rows at a time, so that no process has to hold all of them.

One stream of random numbers runs through all banks. A first walk along it notes where blocks of
rows begin; any rank can then draw any block again. Rows are normalised and scaled block by block,
and blocks do not depend on how ranks share the rows: every layout starts from the same bits.

Legend: T tables, K units, C categories.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distpc.circuits.bank import Bank
from distpc.circuits.families import build_bank
from distpc.circuits.inputs import CategoricalBank, TableBank
from distpc.circuits.queries.uses import WeightBlock, hand_down
from distpc.circuits.schedule import BankPlan
from distpc.circuits.statistics import random_statistics, read_out
from distpc.circuits.sums import SumBank
from distpc.parallel.places import Split

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

BLOCK_ENTRIES = 2**22
"""Entries that are drawn at once."""

KEPT_ENTRIES = 2**24
"""Entries that are kept instead of being drawn again: all of a small circuit's."""

EVEN_ENTRIES = 2**24
"""A dense table of more entries is taken to hand on its uses evenly. So many random rows do, to one
part in sqrt(K), and a chain would have to draw the table again for each of its steps."""


class RandomStart:
    """A random circuit, see `fill.Source`: rows on the scale of their expected uses.

    Args:
        circuit: whole; it need not have values.
        seed: of the random numbers.
        noise: see `Circuit`.
        shares: by bank and table of inputs over categories, how often the data show each of them
            (C,): rows are moved there, see `TableBank.start_near_`.
        device: where to draw; a seed draws other numbers on a GPU.
    """

    def __init__(
        self,
        circuit: Circuit,
        seed: int,
        noise: float,
        shares: Mapping[tuple[int, int], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.noise, self.device = noise, torch.device(device)
        self.shares = dict(shares or {})
        self._names = list(circuit.banks)
        self._plans = circuit.schedule.banks
        self._streams = [
            _Stream(bank, plan, self._row_shares(number, bank))
            for number, (bank, plan) in enumerate(zip(circuit.bank_list, self._plans, strict=True))
        ]
        self._walk(torch.Generator(self.device).manual_seed(seed))
        uses = hand_down(circuit.graph, circuit.schedule, self._weights, self.device)
        self._uses = [
            torch.stack(
                [torch.stack([uses[owner] for owner in owners]).sum(0) for owners in tables]
            )
            for tables in (plan.owners for plan in self._plans)
        ]

    @torch.no_grad()
    def part(self, name: str, split: Split | None, number: int) -> Tensor | None:
        _, bank_name, tensor = name.split(".")
        if tensor != "statistics":
            return None
        bank = self._names.index(bank_name)
        stream = self._streams[bank]
        units = range(self._plans[bank].num_units)
        if split is not None:
            size = len(units) // split.parts
            units = range(number * size, (number + 1) * size)
        if stream.kind == "sum":
            return self._sum_part(bank, units)
        if stream.kind == "table":
            return self._table_part(bank, units)
        whole = self._small(bank)
        return whole if split is None else split.part(whole, number).clone()

    def _walk(self, generator: torch.Generator) -> None:
        """Go along the stream once: note states, keep what is small, add up tables."""
        room = KEPT_ENTRIES
        scratch = torch.empty(0, device=self.device)
        for stream in self._streams:
            for rows in stream.blocks():
                entries = len(rows) * stream.width
                stream.states[rows.start] = generator.get_state()
                if stream.kind == "other":
                    stream.bank.draw(self.noise, generator)
                elif entries <= room or stream.kind == "table":
                    values = stream.draw(rows, self.noise, generator)
                    if entries <= room:
                        room -= entries
                        stream.kept[rows.start] = values
                    if stream.kind == "table":
                        stream.add_up(rows, values)
                else:
                    scratch = scratch.new_empty(entries) if len(scratch) != entries else scratch
                    scratch.uniform_(generator=generator)

    def _values(self, stream: _Stream, rows: range) -> Tensor:
        """A block as it was drawn; not to be written to."""
        kept = stream.kept.get(rows.start)
        if kept is not None:
            return kept
        return stream.draw(rows, self.noise, self._at(stream, rows))

    def _at(self, stream: _Stream, rows: range) -> torch.Generator:
        generator = torch.Generator(self.device)
        generator.set_state(stream.states[rows.start])
        return generator

    def _weights(self, bank: int) -> Iterator[WeightBlock]:
        """The weights of a sum, by which uses are handed on."""
        stream, plan = self._streams[bank], self._plans[bank]
        size, fan_in = plan.num_units, stream.width
        if size * fan_in > EVEN_ENTRIES and plan.blocks == 1:
            alike = torch.full((1, fan_in), 1.0 / fan_in, dtype=torch.float64, device=self.device)
            for table in range(len(plan.owners)):
                yield WeightBlock(table, range(size), alike)
            return
        for rows in stream.blocks():
            weights = read_out(self._values(stream, rows).double(), 0.0)
            for table, units, inside in stream.tables(rows):
                yield WeightBlock(table, units, weights[inside])

    def _sum_part(self, bank: int, units: range) -> Tensor:
        stream, uses = self._streams[bank], self._uses[bank]
        out = torch.empty(len(uses), len(units), stream.width, device=self.device)
        for rows in stream.blocks():
            found = [
                (table, wanted, slice(inside.start + wanted.start - drawn.start, None))
                for table, drawn, inside in stream.tables(rows)
                if len(wanted := _overlap(drawn, units))
            ]
            if not found:
                continue
            weights = read_out(self._values(stream, rows), 0.0)
            for table, wanted, inside in found:
                here = slice(wanted.start - units.start, wanted.stop - units.start)
                scale = uses[table, wanted.start : wanted.stop, None]
                torch.mul(weights[inside][: len(wanted)], scale, out=out[table, here])
        return out

    def _table_part(self, bank: int, units: range) -> Tensor:
        stream = self._streams[bank]
        columns = slice(units.start, units.stop)
        scale = self._uses[bank] / stream.totals.to(self._uses[bank])
        out = torch.empty(stream.num_rows, len(units), device=self.device)
        for rows in stream.blocks():
            values = self._values(stream, rows)[:, columns]
            of_rows = scale[stream.table_of[rows.start : rows.stop], columns]
            torch.mul(values, of_rows, out=out[rows.start : rows.stop])
        return out

    def _small(self, bank: int) -> Tensor:
        """Of a family whose parameters are a few numbers a unit."""
        stream, whole = self._streams[bank], build_bank(self._plans[bank])
        (rows,) = stream.blocks()
        whole.statistics = nn.Parameter(whole.draw(self.noise, self._at(stream, rows)))
        for (number, table), shares in self.shares.items():
            if number == bank:
                assert isinstance(whole, TableBank)
                whole.start_near_(table, shares.to(self.device))
        whole.rescale_(list(self._uses[bank]))
        return whole.statistics.detach()

    def _row_shares(self, number: int, bank: Bank) -> Tensor | None:
        """(rows, 1) what the entries of a categorical bank are multiplied by."""
        of_bank = [self.shares.get((number, t)) for t in range(len(self._plans[number].owners))]
        if not isinstance(bank, CategoricalBank) or all(part is None for part in of_bank):
            return None
        sized = zip(of_bank, bank.sizes, strict=True)
        parts = [torch.ones(size) if part is None else part.float() for part, size in sized]
        return torch.cat(parts).unsqueeze(1).to(self.device)


class _Stream:
    """The stretch of the random numbers that one bank takes.

    Attributes:
        kind: "sum" or "table", whose rows can be drawn in blocks, or "other".
        num_rows, width: of its statistics, as rows of entries that are consecutive in the stream.
        states: of the generator, by the first row of each block.
        kept: blocks, by their first row.
        totals: (T, K) float64, of tables: the sum over the categories.
        table_of: (rows,) of tables: the one that a row belongs to.
    """

    def __init__(self, bank: Bank, plan: BankPlan, row_shares: Tensor | None) -> None:
        self.bank = bank
        shape = bank.statistics.shape
        self.kind = "other"
        self.num_rows, self.width = 1, bank.statistics.numel()
        self.states: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.row_shares = row_shares
        if isinstance(bank, SumBank):
            self.kind = "sum"
            self.num_rows, self.width = shape[0] * shape[1], shape[2]
            self.num_units = shape[1]
        elif isinstance(bank, CategoricalBank):
            self.kind = "table"
            self.num_rows, self.width = shape
            self.totals = torch.zeros(len(plan.sizes), self.width, dtype=torch.float64)
            self.table_of = torch.arange(len(plan.sizes)).repeat_interleave(
                torch.tensor(plan.sizes)
            )

    def blocks(self) -> Iterator[range]:
        """Rows that are drawn together."""
        if self.kind == "other":
            yield range(1)
            return
        size = max(1, BLOCK_ENTRIES // self.width)
        for first in range(0, self.num_rows, size):
            yield range(first, min(first + size, self.num_rows))

    def tables(self, rows: range) -> Iterator[tuple[int, range, slice]]:
        """Of a sum's block: the tables that it touches, their units in it, and where in it."""
        for table in range(rows.start // self.num_units, (rows.stop - 1) // self.num_units + 1):
            begin = table * self.num_units
            of_table = _overlap(rows, range(begin, begin + self.num_units))
            units = range(of_table.start - begin, of_table.stop - begin)
            yield table, units, slice(of_table.start - rows.start, of_table.stop - rows.start)

    def draw(self, rows: range, noise: float, generator: torch.Generator) -> Tensor:
        """A block (rows, width)."""
        values = random_statistics((len(rows), self.width), noise, generator)
        if self.row_shares is not None:
            values *= self.row_shares[rows.start : rows.stop]
        return values

    def add_up(self, rows: range, values: Tensor) -> None:
        """Count a block in `totals`."""
        self.totals = self.totals.to(values.device)
        self.table_of = self.table_of.to(values.device)
        tables = self.table_of[rows.start : rows.stop]
        self.totals.index_add_(0, tables, values.double())


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), max(one.start, min(one.stop, other.stop)))
