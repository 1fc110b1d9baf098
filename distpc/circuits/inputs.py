"""Input units over categories: what their families share, and the categorical family.

An input step has E rows; each is one input region, or the product of `width` categorical regions
(a bag), evaluated at once as a sum of log rows. Tables lie as (categories, units), so that looking
up a value is gathering a row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from distpc.circuits.bank import Bank
from distpc.circuits.look_up import LookUpFunction
from distpc.circuits.statistics import read_out

_TABLES_AT_ONCE = 32
"""Tables whose flows are spread over neighbours together, to bound memory."""

ENOUGH = 1e-9
"""Smoothing of an entry, in uses per sample, that keeps four factors far above underflow."""


class TableBank(Bank):
    """Units over categories, whatever their family: tables that values are looked up in.

    A family defines `log_tables` (and its own statistics); `source` and `read` are for families
    with a shorter way than through whole log tables.

    Args:
        sizes: number of categories of each table, tables of one size side by side.
        num_units: K.

    Attributes:
        offsets: first row of each table, where the tables lie one below the other.
        blocks: (first row, tables, size) of the tables of each size.
        reads_logs: whether `read` gives logs.
    """

    reads_logs = True

    def __init__(self, sizes: Sequence[int], num_units: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.offsets = tuple(sum(sizes[:table]) for table in range(len(sizes)))
        self.num_units = num_units
        self.blocks: list[tuple[int, int, int]] = []
        for size, group in groupby(range(len(sizes)), key=lambda table: sizes[table]):
            tables = list(group)
            self.blocks.append((self.offsets[tables[0]], len(tables), size))

    def forward(
        self, index: Tensor, mask: Tensor | None, in_logs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Messages of an input step.

        Args:
            index: (E, B, width) rows of the tables; `num_rows` for a missing value.
            mask: (E, B, K) units allowed by latent evidence, or None.
            in_logs: return logs (float64) instead of scaled values.

        Returns:
            Message (E, B, K) and scale (E, B, 2), see `lost`; None with logs.
        """
        source = self.source(torch.float64 if in_logs else self.statistics.dtype)
        if in_logs:
            return LookUpFunction.apply(source, self, index, mask, True), None
        return LookUpFunction.apply(source, self, index, mask, False)

    def log_tables(self, tables: slice, size: int, dtype: torch.dtype) -> Tensor:
        """Log-probabilities (T, C, K) of T tables of one size, differentiable.

        Its gradient is the entries' flows, which backward turns into the parameters' `.grad`.
        """
        raise TypeError(f"{type(self).__name__} is read in another way")

    def log_table(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Log-probabilities (sum of sizes, K), differentiable."""
        parts, first = [], 0
        for _, count, size in self.blocks:
            tables = slice(first, first + count)
            parts.append(self.log_tables(tables, size, dtype).flatten(0, 1))
            first += count
        return torch.cat(parts)

    def source(self, dtype: torch.dtype) -> Tensor:
        """What `read` reads and the entries' flows are handed to, (sum of sizes, K)."""
        return self.log_table(dtype)

    def read(self, source: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows of (log-)probabilities, a tensor of its own.

        Args:
            source: see `source`.
            index: (N,) rows to read, `num_rows` for a missing value, whose probability is 1; None
                for all of them and then a row for missing values.
            dtype: of the result.
        """
        if index is None:
            return torch.cat([source, source.new_zeros(1, self.num_units)]).to(dtype)
        rows = nn.functional.embedding(index.clamp_max(self.num_rows - 1), source)
        return rows.to(dtype).masked_fill_((index == self.num_rows).unsqueeze(1), 0.0)

    def shared_out_(self, flow: Tensor) -> Tensor:
        """What backward hands to `source` of the entries' flows (sum of sizes, K)."""
        return flow

    @abstractmethod
    def start_near_(self, table: int, shares: Tensor) -> None:
        """Move a random table's units to where the data are: `shares` (C,) of its categories.

        The scale of statistics is left to `rescale_`.
        """

    @property
    def is_bounded_below(self) -> bool:
        """Whether `read` gives probabilities none of which comes near 0."""
        return False

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(self.sizes)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Probabilities, shape (sum of sizes, K): each table's columns sum to one."""
        return self.log_table(dtype).detach().exp()

    def weights_of(self, table: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Probabilities (K, C)."""
        tables = slice(table, table + 1)
        return self.log_tables(tables, self.sizes[table], dtype).detach()[0].exp().T

    def table(self, index: int) -> slice:
        """Rows of one table."""
        return slice(self.offsets[index], self.offsets[index] + self.sizes[index])


class CategoricalBank(TableBank):
    """Tables of categorical units.

    theta = (S + eps) / (sum of S + eps * C), eps = pseudocount / (N * C): a pseudocount of
    samples a unit, spread over its C categories. A category never seen has probability 0 without
    a pseudocount; a unit never used is uniform.

    Attributes:
        statistics: S, shape (sum of sizes, K): the tables one below the other.
        pseudocount: leaf pseudocount / number of samples.
        starts: `offsets` as a tensor.
        kernel: (C, C) shares of a flow that each value gets (see `neighbours`), for the tables of
            C categories; None: each value keeps its own.
    """

    reads_logs = False
    starts: Tensor
    kernel: Tensor | None

    def __init__(self, sizes: Sequence[int], num_units: int) -> None:
        super().__init__(sizes, num_units)
        self.statistics = nn.Parameter(torch.empty(sum(sizes), num_units, device="meta"))
        self.register_buffer("starts", torch.tensor(self.offsets), persistent=False)
        self.pseudocount = 0.0
        self.register_buffer("kernel", None, persistent=False)

    @property
    def is_bounded_below(self) -> bool:
        # Of a table with K units a unit is expected to be used once in K, rarely far more often.
        return self.pseudocount > ENOUGH * max(self.sizes)

    def source(self, dtype: torch.dtype) -> Tensor:
        return self.statistics

    def read(self, source: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
        if index is None:
            return self._table(source.to(dtype))
        rows = nn.functional.embedding(index.clamp_max(self.num_rows - 1), source).to(dtype)
        shift, scale = (part.to(dtype) for part in self._shift_and_scale(source))
        if len(self.sizes) > 1:
            tables = torch.searchsorted(self.starts, index, right=True) - 1
            shift, scale = (nn.functional.embedding(tables, part) for part in (shift, scale))
        rows = rows.mul_(scale).add_(shift)
        return rows.masked_fill_((index == self.num_rows).unsqueeze(1), 1.0)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._table(self.statistics.detach().to(dtype))[:-1]

    def weights_of(self, table: int, dtype: torch.dtype = torch.float32) -> Tensor:
        statistics = self.statistics.detach()[self.table(table)].to(dtype)
        return read_out(statistics, self.pseudocount / self.sizes[table], dim=0).T

    def statistics_of(self, table: int) -> Tensor:
        """S (K, C)."""
        return self.statistics.detach()[self.table(table)].T

    def totals(self, values: Tensor) -> Tensor:
        total = torch.empty_like(values)
        for start, count, size in self.blocks:
            rows = slice(start, start + count * size)
            shape = (count, size, values.shape[1])
            total[rows].view(shape)[:] = values[rows].view(shape).sum(1, keepdim=True)
        return total

    def pseudo_samples(self, pseudocount: float) -> Tensor:
        sizes = torch.tensor(self.sizes, device=self.statistics.device)
        return (pseudocount / sizes).repeat_interleave(sizes).unsqueeze(1)

    def start_near_(self, table: int, shares: Tensor) -> None:
        self.statistics[self.table(table)] *= shares.to(self.statistics).unsqueeze(1)

    def rescale_(self, uses: Sequence[Tensor]) -> None:
        # In place: a table of a large vocabulary may be most of the memory.
        shift, scale = self._shift_and_scale(self.statistics)
        for table, of_table in enumerate(uses):
            part = self.statistics[self.table(table)]
            part.mul_(scale[table] * of_table).add_(shift[table] * of_table)

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a unit, spread over its categories."""
        self.pseudocount = pseudocount / num_samples

    def shared_out_(self, flow: Tensor) -> Tensor:
        if self.kernel is None:
            return flow
        for start, count, size in self.blocks:
            if size == len(self.kernel):
                tables = flow[start : start + count * size].view(count, size, -1)
                for part in tables.split(_TABLES_AT_ONCE):
                    part.copy_(torch.matmul(self.kernel.to(part.dtype), part))
        return flow

    def _shift_and_scale(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """(T, K) each: theta = S * scale + shift."""
        sums = [
            statistics[start : start + count * size].view(count, size, -1).sum(1)
            for start, count, size in self.blocks
        ]
        totals = torch.cat(sums) + self.pseudocount
        # Below this the reciprocal overflows.
        is_empty = totals < torch.finfo(totals.dtype).tiny
        uniform = totals.new_tensor([1.0 / size for size in self.sizes]).unsqueeze(1)
        scale = torch.where(is_empty, 0.0, totals.reciprocal())
        return torch.where(is_empty, uniform, self.pseudocount * uniform * scale), scale

    def _table(self, statistics: Tensor) -> Tensor:
        """theta with one row more, of ones: what a missing value looks up."""
        table = statistics.new_empty(len(statistics) + 1, statistics.shape[1])
        table[-1] = 1.0
        shift, scale = self._shift_and_scale(statistics)
        first = 0
        for start, count, size in self.blocks:
            rows, tables = slice(start, start + count * size), slice(first, first + count)
            shape = (count, size, statistics.shape[1])
            part = table[rows].view(shape)
            torch.mul(statistics[rows].view(shape), scale[tables].unsqueeze(1), out=part)
            part.add_(shift[tables].unsqueeze(1))
            first += count
        return table
