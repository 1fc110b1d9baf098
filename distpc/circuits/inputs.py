"""Input units: categorical and Gaussian distributions of one variable, stored as statistics.

An input step has E rows; each is one input region, or the product of `width` categorical regions
(a bag), evaluated at once as a sum of log rows. Statistics of categories lie as (categories,
units), so that looking up a value is gathering a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.statistics import random_statistics, read_out

VARIANCE_FLOOR = 1e-4
"""Least variance of a Gaussian unit, in units of the variable's squared spread."""

MISSING = -1


class CategoricalBank(nn.Module):
    """Tables of categorical units.

    Args:
        sizes: number of categories of each table, tables of one size side by side.
        num_units: K.

    Attributes:
        statistics: S, shape (sum of sizes, K): the tables one below the other.
        offsets: first row of each table.
        pseudocount: leaf pseudocount / number of samples; eps of a table is this / categories.
    """

    def __init__(self, sizes: Sequence[int], num_units: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.offsets = tuple(sum(sizes[:table]) for table in range(len(sizes)))
        self.statistics = nn.Parameter(torch.empty(sum(sizes), num_units))
        self.pseudocount = 0.0
        self.blocks: list[tuple[int, int, int]] = []
        for size, group in groupby(range(len(sizes)), key=lambda table: sizes[table]):
            tables = list(group)
            self.blocks.append((self.offsets[tables[0]], len(tables), size))

    def forward(
        self, index: Tensor, mask: Tensor | None, in_logs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Messages of an input step.

        Args:
            index: (E, B, width) rows of `statistics`; `num_rows` for a missing value.
            mask: (E, B, K) units allowed by latent evidence, or None.
            in_logs: return logs (float64) instead of scaled values.

        Returns:
            Message (E, B, K) and log-scale (E, B), None with logs.
        """
        if in_logs:
            return CategoricalFunction.apply(self.statistics, self, index, mask, True), None
        return CategoricalFunction.apply(self.statistics, self, index, mask, False)

    @property
    def num_rows(self) -> int:
        """Rows of the statistics."""
        return sum(self.sizes)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """theta, shape (sum of sizes, K): each table's columns sum to one."""
        return self._table(self.statistics.detach().to(dtype))[:-1]

    def table(self, index: int) -> slice:
        """Rows of one table."""
        return slice(self.offsets[index], self.offsets[index] + self.sizes[index])

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a table column, spread over its categories."""
        self.pseudocount = pseudocount / num_samples

    def init(self, noise: float, generator: torch.Generator) -> None:
        """Random statistics."""
        shape = tuple(self.statistics.shape)
        self.statistics.data = random_statistics(shape, noise, generator)

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
        ctx.like = statistics.shape, statistics.dtype
        table = bank._table(statistics.double() if in_logs else statistics)
        num_rows, batch, width = index.shape
        shape = (num_rows, batch, table.shape[1])
        if width == 1 and mask is None and not in_logs:
            top = table.amax(-1, keepdim=True)
            table.div_(torch.where(top > 0, top, 1.0))
            values = nn.functional.embedding(index.view(-1), table).view(shape)
            log_scale = torch.where(top > 0, top, 1.0).log_().double().view(-1)
            log_scale = log_scale[index.view(-1)].view(shape[:2])
        else:
            bags = index.view(-1, width)
            logs = nn.functional.embedding_bag(bags, table.log_(), mode="sum").view(shape)
            if mask is not None:
                logs = torch.where(mask, logs, -torch.inf)
            if in_logs:
                return logs
            top = logs.amax(-1)
            top = torch.where(top.isneginf(), 0.0, top)
            values = logs.sub_(top.unsqueeze(-1)).exp_()
            log_scale = top.double()
        ctx.mark_non_differentiable(log_scale)
        return values, log_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        (num_rows, num_units), dtype = ctx.like
        flow = flow.reshape(-1, num_units).to(dtype)
        flow_s = scatter_rows(flow, index.view(-1, index.shape[-1]), num_rows)
        return flow_s, None, None, None, None


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


class GaussianBank(nn.Module):
    """Tables of Gaussian units as running moments.

    Values are standardised first, z = (x - centre) / spread, because raw float32 moments lose
    small variances of variables far from zero.

    Attributes:
        statistics: S, shape (T, 3, K): uses, sum of z and sum of z^2 per sample.
        centre, spread: (T,), in the variable's units.
        pseudocount: weight of one standard normal pseudo-observation, over samples.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, num_tables: int, num_units: int) -> None:
        super().__init__()
        self.statistics = nn.Parameter(torch.empty(num_tables, 3, num_units))
        self.register_buffer("centre", torch.zeros(num_tables, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(num_tables, dtype=torch.float64))
        self.pseudocount = 0.0

    def forward(
        self, z: Tensor, tables: Tensor, in_logs: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Log densities (E, B, K) of standardised values z (E, B), NaN = missing (log 1)."""
        return GaussianFunction.apply(self.statistics, self, z, tables, mask, in_logs)

    def moments(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (T, K) of standardised values."""
        uses, first, second = statistics.unbind(1)
        uses = (uses + self.pseudocount).clamp_min(torch.finfo(uses.dtype).tiny)
        mean = first / uses
        variance = (second + self.pseudocount) / uses - mean.square()
        return mean, variance.clamp_min(VARIANCE_FLOOR)

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a unit."""
        self.pseudocount = pseudocount / num_samples

    def init(self, noise: float, generator: torch.Generator) -> None:
        """Means spread by `noise` standard deviations, variance 1."""
        num_tables, _, num_units = self.statistics.shape
        mean = noise * torch.randn((num_tables, num_units), generator=generator)
        moments = [torch.ones_like(mean), mean, 1.0 + mean.square()]
        self.statistics.data = torch.stack(moments, dim=1)


class GaussianFunction(torch.autograd.Function):
    """Log density of Gaussian units; the flow goes to the sufficient statistics (1, z, z^2)."""

    @staticmethod
    def forward(
        ctx: Any,
        statistics: Tensor,
        bank: GaussianBank,
        z: Tensor,
        tables: Tensor,
        mask: Tensor | None,
        in_logs: bool,
    ) -> Tensor:
        dtype = torch.float64 if in_logs else statistics.dtype
        mean, variance = (m[tables].unsqueeze(1) for m in bank.moments(statistics.to(dtype)))
        ctx.save_for_backward(z, tables)
        ctx.like = statistics.shape, statistics.dtype
        logs = (z.to(dtype).unsqueeze(-1) - mean).square_().div_(-2.0 * variance)
        logs -= 0.5 * variance.log() + 0.5 * math.log(2 * math.pi)
        logs -= bank.spread[tables].log().to(dtype).view(-1, 1, 1)
        logs = torch.where(z.isnan().unsqueeze(-1), 0.0, logs)
        return logs if mask is None else torch.where(mask, logs, -torch.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        z, tables = ctx.saved_tensors
        shape, dtype = ctx.like
        seen = torch.where(z.isnan(), 0.0, 1.0)
        z = torch.where(z.isnan(), 0.0, z)
        powers = torch.stack([seen, z, z.square()], dim=1).to(flow.dtype)
        flow_rows = torch.matmul(powers, flow).to(dtype)
        flow_s = torch.zeros(shape, dtype=dtype, device=flow.device)
        return flow_s.index_add_(0, tables, flow_rows), None, None, None, None, None


class ScaleLogsFunction(torch.autograd.Function):
    """Logs -> values with maximum 1 and log-scale (E, B); the flow stays what it is."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor) -> tuple[Tensor, Tensor]:
        top = logs.amax(-1)
        top = torch.where(top.isneginf(), 0.0, top)
        log_scale = top.double()
        ctx.mark_non_differentiable(log_scale)
        return (logs - top.unsqueeze(-1)).exp_(), log_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> Tensor:
        return flow
