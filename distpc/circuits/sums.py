"""Sums: one matrix product, its weights read out of statistics, and flows in backward.

Messages and flows are explained in `layers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.lost import TINY
from distpc.circuits.statistics import random_statistics, read_out


class SumFunction(torch.autograd.Function):
    """u, S -> u @ theta(S)^T, and the least weight (T,) of each theta.

    Saves S, not theta: under ZeRO-3 a saved theta would keep the whole circuit on every rank.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, statistics: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        num_tables, num_units, fan_in = statistics.shape
        theta = read_out(statistics, smoothing)
        grouped = u.reshape(num_tables, -1, fan_in)
        out = torch.matmul(grouped, theta.mT).view(*u.shape[:2], num_units)
        ctx.save_for_backward(u, statistics, out)
        ctx.smoothing = smoothing
        smallest = theta.amin((1, 2))
        ctx.mark_non_differentiable(smallest)
        return out, smallest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
        u, statistics, out = ctx.saved_tensors
        num_tables, num_units, fan_in = statistics.shape
        theta = read_out(statistics, ctx.smoothing)
        # A unit at 0 has flow 0, so the clamp makes its ratio 0.
        ratio = out.clamp_min(TINY)
        torch.div(flow, ratio, out=ratio)
        ratio = ratio.view(num_tables, -1, num_units)
        flow_u = torch.matmul(ratio, theta).view(u.shape).mul_(u)
        flow_s = torch.matmul(ratio.mT, u.reshape(num_tables, -1, fan_in)).mul_(theta)
        return flow_u, flow_s, None


class SumBank(nn.Module):
    """The weight matrices of one fold.

    Attributes:
        statistics: S, shape (T, K', K): T matrices of K' sum units over K child units.
        smoothing: eps of the read-out.
    """

    def __init__(self, num_tables: int, num_units: int, fan_in: int) -> None:
        super().__init__()
        self.statistics = nn.Parameter(torch.empty(num_tables, num_units, fan_in))
        self.smoothing = 0.0

    def forward(self, u: Tensor, in_logs: bool = False) -> tuple[Tensor, Tensor | None]:
        """(E, B, K) -> (E, B, K'); consecutive rows share a matrix where E > T.

        Also the least weight of each matrix (T,), None in logs.
        """
        if in_logs:
            return LogSumFunction.apply(u, self.statistics, self.smoothing), None
        return SumFunction.apply(u, self.statistics, self.smoothing)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """theta, shape (T, K', K)."""
        return read_out(self.statistics.detach().to(dtype), self.smoothing)

    def init(self, noise: float, generator: torch.Generator) -> None:
        """Random statistics."""
        shape = tuple(self.statistics.shape)
        self.statistics.data = random_statistics(shape, noise, generator)

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a row, spread over its entries."""
        self.smoothing = pseudocount / (num_samples * self.statistics.shape[-1])


class LogSumFunction(torch.autograd.Function):
    """Log-domain twin of SumFunction: logs in, logs out, the same flows, any range of values."""

    CHUNK_ENTRIES = 2**22

    @staticmethod
    def forward(ctx: Any, logs: Tensor, statistics: Tensor, smoothing: float) -> Tensor:
        num_tables, num_units, fan_in = statistics.shape
        log_theta = read_out(statistics.to(logs.dtype), smoothing).log()
        grouped = logs.reshape(num_tables, -1, fan_in)
        chunks = grouped.split(_chunk_size(statistics), dim=1)
        out = torch.cat([_log_terms(chunk, log_theta).logsumexp(-1) for chunk in chunks], dim=1)
        out = out.view(*logs.shape[:2], num_units)
        ctx.save_for_backward(logs, statistics, out)
        ctx.smoothing = smoothing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor, Tensor, None]:
        logs, statistics, out = ctx.saved_tensors
        num_tables, num_units, fan_in = statistics.shape
        log_theta = read_out(statistics.to(logs.dtype), ctx.smoothing).log()
        size = _chunk_size(statistics)
        flow_logs, flow_s = [], torch.zeros_like(log_theta)
        for chunk, chunk_out, chunk_flow in zip(
            logs.reshape(num_tables, -1, fan_in).split(size, dim=1),
            out.view(num_tables, -1, num_units).split(size, dim=1),
            flow.reshape(num_tables, -1, num_units).split(size, dim=1),
            strict=True,
        ):
            # exp(-inf - -inf) would be NaN: an impossible unit passes nothing on.
            shift = torch.where(chunk_out.isneginf(), 0.0, chunk_out)
            shares = (_log_terms(chunk, log_theta) - shift.unsqueeze(-1)).exp_()
            shares.mul_(chunk_flow.unsqueeze(-1))
            flow_logs.append(shares.sum(2))
            flow_s += shares.sum(1)
        return torch.cat(flow_logs, dim=1).view(logs.shape), flow_s.to(statistics.dtype), None


def _chunk_size(statistics: Tensor) -> int:
    return max(1, LogSumFunction.CHUNK_ENTRIES // max(1, statistics.numel()))


def _log_terms(logs: Tensor, log_theta: Tensor) -> Tensor:
    """(T, N, K), (T, K', K) -> (T, N, K', K)."""
    return logs.unsqueeze(2) + log_theta.unsqueeze(1)
