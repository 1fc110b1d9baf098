"""Sums: one matrix product, its weights read out of statistics, and flows in backward.

Messages and flows are explained in `layers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.bank import Bank
from distpc.circuits.blocks import Blocks
from distpc.circuits.lost import TINY
from distpc.circuits.statistics import Masked, read_out, row_scale

_ENTRIES_AT_ONCE = 2**22

SURE = 1e-25
"""With more smoothing than this no weight, and so no unit of a sum, comes near TINY."""


class SumFunction(torch.autograd.Function):
    """u, S -> u @ theta(S)^T, and the least weight (T,) of each theta if it may be near 0.

    Saves S, not theta: under ZeRO-3 a saved theta would keep the whole circuit on every rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        statistics: Tensor,
        smoothing: float | Masked,
        blocks: Blocks,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        num_tables, num_units, _ = statistics.shape
        # One number a row, kept for backward, saves it a pass over S.
        scale = row_scale(statistics, smoothing) if _is_sure(smoothing, blocks) else None
        theta, norm = _rounded(_weights(statistics, smoothing, scale), dtype)
        grouped = blocks.split_units(u.to(dtype), num_tables)
        products = torch.bmm(grouped, blocks.split_rows(theta).mT).to(u.dtype)
        out = blocks.join_units(products, (*u.shape[:2], num_units))
        _divide_rows_(out, norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, statistics, out, scale)
        ctx.smoothing, ctx.blocks, ctx.dtype = smoothing, blocks, dtype
        if scale is not None:
            return out, None
        smallest = _smallest(theta, blocks)
        ctx.mark_non_differentiable(smallest)
        return out, smallest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        u, statistics, out, scale = ctx.saved_tensors
        num_tables, blocks, dtype = len(statistics), ctx.blocks, ctx.dtype
        theta, norm = _rounded(_weights(statistics, ctx.smoothing, scale), dtype)
        # Where a unit may be 0 it has flow 0, so the clamp makes its ratio 0.
        ratio = flow / (out if scale is not None else out.clamp_min(TINY))
        _divide_rows_(ratio, norm)
        ratio = blocks.split_units(ratio.to(dtype), num_tables)
        flow_u = torch.bmm(ratio, blocks.split_rows(theta)).to(u.dtype)
        flow_u = blocks.join_units(flow_u, u.shape).mul_(u)
        flow_s = torch.bmm(ratio.mT, blocks.split_units(u.to(dtype), num_tables))
        flow_s = blocks.join_rows(flow_s, num_tables).to(statistics.dtype).mul_(theta)
        return flow_u, flow_s, None, None, None


def _rounded(theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights in the type of the products, and their row sums where rounding moved those."""
    if theta.dtype == dtype:
        return theta, None
    theta = theta.to(dtype)
    return theta, theta.sum(-1, dtype=torch.float32)


def _divide_rows_(values: Tensor, norm: Tensor | None) -> None:
    """Divide units (E, B, K') by the sums (T, K') of their rows of weights."""
    if norm is not None:
        values.view(len(norm), -1, values.shape[-1]).div_(norm.unsqueeze(1))


def _weights(statistics: Tensor, floor: float | Masked, scale: Tensor | None) -> Tensor:
    if scale is None or isinstance(floor, Masked):
        return read_out(statistics, floor)
    return torch.add(statistics, floor).mul_(scale)


def _is_sure(floor: float | Masked, blocks: Blocks) -> TypeGuard[float]:
    """Whether no unit of a sum can come near TINY."""
    return isinstance(floor, float) and floor > SURE and blocks.count == 1


class SumBank(Bank):
    """The weight matrices of one fold.

    Args:
        num_tables: T.
        num_units: K'.
        fan_in: child units that a unit mixes (K; K / blocks of a block-diagonal sum).
        blocks, strided: see `Region`.

    Attributes:
        statistics: S, shape (T, K', fan_in).
        smoothing: eps of the read-out.
        mask: bool (T, K', fan_in), False where an edge is pruned; None: no edge is.
        matmul_dtype: of the matrix products in training. bfloat16 rounds weights and messages;
            what adds up inside a product, statistics, scales and reported likelihoods stay float32.
    """

    mask: Tensor | None

    def __init__(
        self,
        num_tables: int,
        num_units: int,
        fan_in: int,
        blocks: int = 1,
        strided: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = Blocks(blocks, strided)
        self.statistics = nn.Parameter(torch.empty(num_tables, num_units, fan_in, device="meta"))
        self.smoothing = 0.0
        self.matmul_dtype = torch.float32
        self.register_buffer("mask", None)

    @property
    def floor(self) -> float | Masked:
        """What the read-out adds to statistics."""
        return self._floor(self.smoothing)

    def _floor(self, smoothing: float, place: Any = ...) -> float | Masked:
        return smoothing if self.mask is None else Masked(smoothing, self.mask[place])

    def forward(self, u: Tensor, in_logs: bool = False) -> tuple[Tensor, Tensor | None]:
        """(E, B, K) -> (E, B, K'); consecutive rows share a matrix where E > T.

        Also the least weight of each matrix (T,) where it may be near 0, else None.
        """
        if in_logs:
            return LogSumFunction.apply(u, self.statistics, self.floor, self.blocks), None
        dtype = self.matmul_dtype if torch.is_grad_enabled() else u.dtype
        return SumFunction.apply(u, self.statistics, self.floor, self.blocks, dtype)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """theta, shape (T, K', fan_in)."""
        return read_out(self.statistics.detach().to(dtype), self.floor)

    def weight_blocks(
        self, dtype: torch.dtype, *, smoothed: bool = True
    ) -> Iterator[tuple[int, range, Tensor]]:
        """(table, units, theta (n, fan-in)) of all units, few enough at once to bound memory.

        Without smoothing they say what the data alone gave.
        """
        num_tables, num_units, fan_in = self.statistics.shape
        smoothing = self.smoothing if smoothed else 0.0
        if self.statistics.numel() <= _ENTRIES_AT_ONCE:
            weights = read_out(self.statistics.detach().to(dtype), self._floor(smoothing))
            yield from ((table, range(num_units), weights[table]) for table in range(num_tables))
            return
        size = max(1, _ENTRIES_AT_ONCE // fan_in)
        for table in range(num_tables):
            for first in range(0, num_units, size):
                units = range(first, min(first + size, num_units))
                place = table, slice(units.start, units.stop)
                floor = self._floor(smoothing, place)
                yield table, units, read_out(self.statistics.detach()[place].to(dtype), floor)

    def smallest_weights(self) -> Tensor:
        """The least weight of each matrix (T,)."""
        return _smallest(self.weights(), self.blocks)

    def statistics_of(self, table: int) -> Tensor:
        """S (K', fan-in)."""
        return self.statistics.detach()[table]

    def weights_of(self, table: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """theta (K', fan-in)."""
        floor = self._floor(self.smoothing, table)
        return read_out(self.statistics.detach()[table].to(dtype), floor)

    def totals(self, values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True)

    def pseudo_samples(self, pseudocount: float) -> Tensor:
        prior = torch.full((), pseudocount / self.statistics.shape[-1])
        return prior if self.mask is None else prior * self.mask

    def rescale_(self, uses: Sequence[Tensor]) -> None:
        self.statistics.copy_(self.weights() * torch.stack(list(uses)).unsqueeze(-1))

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a row, spread over its entries."""
        self.smoothing = pseudocount / (num_samples * self.statistics.shape[-1])


def _smallest(theta: Tensor, blocks: Blocks) -> Tensor:
    # A block may hold none of the large units, whatever its weights.
    return theta.amin((1, 2)) if blocks.count == 1 else theta.new_zeros(len(theta))


class LogSumFunction(torch.autograd.Function):
    """Log-domain twin of SumFunction: logs in, logs out, the same flows, any range of values."""

    CHUNK_ENTRIES = 2**22

    @staticmethod
    def forward(
        ctx: Any, logs: Tensor, statistics: Tensor, smoothing: float | Masked, blocks: Blocks
    ) -> Tensor:
        num_tables, num_units, _ = statistics.shape
        log_theta = blocks.split_rows(read_out(statistics.to(logs.dtype), smoothing).log())
        chunks = blocks.split_units(logs, num_tables).split(_chunk_size(statistics), dim=1)
        out = torch.cat([_log_terms(chunk, log_theta).logsumexp(-1) for chunk in chunks], dim=1)
        ctx.save_for_backward(logs, statistics, out)
        ctx.smoothing, ctx.blocks = smoothing, blocks
        return blocks.join_units(out, (*logs.shape[:2], num_units))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        logs, statistics, out = ctx.saved_tensors
        num_tables, blocks = len(statistics), ctx.blocks
        log_theta = blocks.split_rows(read_out(statistics.to(logs.dtype), ctx.smoothing).log())
        size = _chunk_size(statistics)
        flow_logs, flow_s = [], torch.zeros_like(log_theta)
        for chunk, chunk_out, chunk_flow in zip(
            blocks.split_units(logs, num_tables).split(size, dim=1),
            out.split(size, dim=1),
            blocks.split_units(flow, num_tables).split(size, dim=1),
            strict=True,
        ):
            # exp(-inf - -inf) would be NaN: an impossible unit passes nothing on.
            shift = torch.where(chunk_out.isneginf(), 0.0, chunk_out)
            shares = (_log_terms(chunk, log_theta) - shift.unsqueeze(-1)).exp_()
            shares.mul_(chunk_flow.unsqueeze(-1))
            flow_logs.append(shares.sum(2))
            flow_s += shares.sum(1)
        flow_s = blocks.join_rows(flow_s, num_tables).to(statistics.dtype)
        return blocks.join_units(torch.cat(flow_logs, dim=1), logs.shape), flow_s, None, None


def _chunk_size(statistics: Tensor) -> int:
    return max(1, LogSumFunction.CHUNK_ENTRIES // max(1, statistics.numel()))


def _log_terms(logs: Tensor, log_theta: Tensor) -> Tensor:
    """(T, N, K), (T, K', K) -> (T, N, K', K)."""
    return logs.unsqueeze(2) + log_theta.unsqueeze(1)
