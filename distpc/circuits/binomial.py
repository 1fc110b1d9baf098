"""Binomial units over 0 .. C - 1: successes in C - 1 trials, stored as shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.inputs import TableBank
from distpc.circuits.statistics import read_out


class BinomialBank(TableBank):
    """Tables of binomial units.

    With n = C - 1 trials, the sufficient statistics "uses" and "sum of x" are kept as the shares
    of failures and successes, (1 - x / n) and x / n a use: both are positive, their sum is the
    uses, and the chance of success is read out of them as a categorical of two would be. A
    pseudocount is that many imaginary uses, half of their trials successful; without one, a unit
    that saw only x = 0 rules out all else.

    Attributes:
        statistics: S, shape (T, 2, K): failures and successes, per trial and sample.
        pseudocount: leaf pseudocount / number of samples.
    """

    def __init__(self, sizes: Sequence[int], num_units: int) -> None:
        super().__init__(sizes, num_units)
        self.statistics = nn.Parameter(torch.empty(len(sizes), 2, num_units, device="meta"))
        self.pseudocount = 0.0

    def log_tables(self, tables: slice, size: int, dtype: torch.dtype) -> Tensor:
        return BinomialFunction.apply(self.statistics[tables], self.pseudocount, size, dtype)

    def statistics_of(self, table: int) -> Tensor:
        """Failures and successes, (K, 2)."""
        return self.statistics.detach()[table].T

    def totals(self, values: Tensor) -> Tensor:
        return values.sum(1, keepdim=True)

    def pseudo_samples(self, pseudocount: float) -> Tensor:
        return torch.tensor(pseudocount / 2.0, device=self.statistics.device)

    def start_near_(self, table: int, shares: Tensor) -> None:
        success = torch.linspace(0.0, 1.0, len(shares)).to(shares) @ shares
        chances = torch.stack([1.0 - success, success]).to(self.statistics)
        self.statistics[table] *= chances.unsqueeze(1)

    def rescale_(self, uses: Sequence[Tensor]) -> None:
        chances = read_out(self.statistics, self.pseudocount / 2.0, dim=1)
        self.statistics.copy_(chances * torch.stack(list(uses)).unsqueeze(1))

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a unit."""
        self.pseudocount = pseudocount / num_samples


class BinomialFunction(torch.autograd.Function):
    """Statistics (T, 2, K) -> log-tables (T, C, K); flows of entries -> flows of statistics."""

    @staticmethod
    def forward(
        ctx: Any, statistics: Tensor, pseudocount: float, size: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.dtype = statistics.dtype
        logs = read_out(statistics.to(dtype), pseudocount / 2.0, dim=1).log_()
        failed, succeeded = logs.unsqueeze(2).unbind(1)
        n = size - 1
        x = torch.arange(size, dtype=torch.float64, device=logs.device).unsqueeze(1)
        choices = math.lgamma(size) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        x = x.to(dtype)
        table = succeeded * x
        # 0 * log 0 = 0: what did not happen needs no chance.
        table[:, 0] = 0.0
        table[:, :-1].addcmul_(failed, n - x[:-1])
        return table.add_(choices.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        size = flow.shape[1]
        share = torch.arange(size, dtype=flow.dtype, device=flow.device) / max(size - 1, 1)
        flow_s = torch.matmul(torch.stack([1.0 - share, share]), flow)
        return flow_s.to(ctx.dtype), None, None, None
