"""Categorical input units, stored as statistics.

An input step has E rows; each is one input region, or the product of `width` categorical regions
(a bag), evaluated at once as a sum of log rows. Statistics of categories lie as (categories,
units), so that looking up a value is gathering a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.bank import Bank
from distpc.circuits.lost import new_scale, underflow
from distpc.circuits.statistics import random_statistics, read_out

_TABLES_AT_ONCE = 32


class TableBank(Bank):
    """Units over categories, whatever their family: tables that values are looked up in.

    Args:
        sizes: number of categories of each table, tables of one size side by side.
        num_units: K.

    Attributes:
        offsets: first row of each table, where the tables lie one below the other.
        blocks: (first row, tables, size) of the tables of each size.
    """

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
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(self.sizes)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Probabilities, shape (sum of sizes, K): each table's columns sum to one."""
        raise NotImplementedError

    def weights_of(self, table: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Probabilities (K, C)."""
        return self.weights(dtype)[self.table(table)].T

    def table(self, index: int) -> slice:
        """Rows of one table."""
        return slice(self.offsets[index], self.offsets[index] + self.sizes[index])


class CategoricalBank(TableBank):
    """Tables of categorical units.

    Attributes:
        statistics: S, shape (sum of sizes, K): the tables one below the other.
        pseudocount: leaf pseudocount / number of samples; eps of a table is this / categories.
        kernel: (C, C) shares of a flow that each value gets (see `neighbours`), for the tables of
            C categories; None: each value keeps its own.
    """

    kernel: Tensor | None

    def __init__(self, sizes: Sequence[int], num_units: int) -> None:
        super().__init__(sizes, num_units)
        self.statistics = nn.Parameter(torch.empty(sum(sizes), num_units))
        self.pseudocount = 0.0
        self.register_buffer("kernel", None, persistent=False)

    def forward(
        self, index: Tensor, mask: Tensor | None, in_logs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if in_logs:
            return CategoricalFunction.apply(self.statistics, self, index, mask, True), None
        return CategoricalFunction.apply(self.statistics, self, index, mask, False)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._table(self.statistics.detach().to(dtype))[:-1]

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

    def rescale_(self, uses: Sequence[Tensor]) -> None:
        weights = self.weights()
        for table, of_table in enumerate(uses):
            self.statistics[self.table(table)] = weights[self.table(table)] * of_table

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a table column, spread over its categories."""
        self.pseudocount = pseudocount / num_samples

    def init(self, noise: float, generator: torch.Generator) -> None:
        """Random statistics."""
        shape = tuple(self.statistics.shape)
        self.statistics.data = random_statistics(shape, noise, generator)

    def share_out_(self, flow: Tensor) -> Tensor:
        """Share flows (rows of all tables, K) out among neighbouring values, in place."""
        if self.kernel is None:
            return flow
        for start, count, size in self.blocks:
            if size == len(self.kernel):
                tables = flow[start : start + count * size].view(count, size, -1)
                for part in tables.split(_TABLES_AT_ONCE):
                    part.copy_(torch.matmul(self.kernel.to(part), part))
        return flow

    def _table(self, statistics: Tensor) -> Tensor:
        """theta with one row more, of ones: what a missing value looks up."""
        table = statistics.new_ones(len(statistics) + 1, statistics.shape[1])
        for start, count, size in self.blocks:
            rows = slice(start, start + count * size)
            shape = (count, size, statistics.shape[1])
            read_out(
                statistics[rows].view(shape),
                self.pseudocount / size,
                dim=1,
                out=table[rows].view(shape),
            )
        return table


class CategoricalFunction(torch.autograd.Function):
    """Look-up of products of categorical units; the flow of a row goes to each of its entries."""

    @staticmethod
    def forward(
        ctx: Any,
        statistics: Tensor,
        bank: CategoricalBank,
        index: Tensor,
        mask: Tensor | None,
        in_logs: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        ctx.like, ctx.bank = (statistics.shape, statistics.dtype), bank
        table = bank._table(statistics.double() if in_logs else statistics)
        num_rows, batch, width = index.shape
        shape = (num_rows, batch, table.shape[1])
        if width == 1 and mask is None and not in_logs:
            top = table.amax(-1, keepdim=True)
            table.div_(torch.where(top > 0, top, 1.0))
            values = nn.functional.embedding(index.view(-1), table).view(shape)
            log_top = top.log_().squeeze(-1)
            scale = new_scale(log_top, underflow(table))[index.squeeze(-1)]
        else:
            bags = index.view(-1, width)
            logs = nn.functional.embedding_bag(bags, table.log_(), mode="sum").view(shape)
            if mask is not None:
                logs = torch.where(mask, logs, -torch.inf)
            if in_logs:
                return logs
            top = logs.amax(-1)
            is_dead = top.isneginf()
            values = logs.sub_(torch.where(is_dead, 0.0, top).unsqueeze(-1)).exp_()
            scale = new_scale(top, underflow(values, mask))
        ctx.mark_non_differentiable(scale)
        return values, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        (num_rows, num_units), dtype = ctx.like
        flow = flow.reshape(-1, num_units).to(dtype)
        flow_s = scatter_rows(flow, index.view(-1, index.shape[-1]), num_rows)
        return ctx.bank.share_out_(flow_s), None, None, None, None


def scatter_rows(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum rows of `values` (N, K) into rows `index` (N, width) of a result (num_rows, K).

    Index `num_rows` is dropped.
    """
    if values.device.type != "cpu":
        total = values.new_zeros(num_rows + 1, values.shape[1])
        for column in index.unbind(1):
            total.index_add_(0, column, values)
        return total[:-1]
    # On a CPU sorting and summing runs of rows takes half the time of index_add.
    flat = index.reshape(-1)
    small = flat.to(torch.int16 if num_rows < 2**15 else torch.int32)
    rows = torch.argsort(small, stable=True).div_(index.shape[1], rounding_mode="floor")
    counts = torch.bincount(flat, minlength=num_rows + 1)
    kept = len(flat) - int(counts[-1])
    starts = counts[:-1].cumsum(0).sub_(counts[:-1])
    return nn.functional.embedding_bag(rows[:kept], values, starts, mode="sum")
