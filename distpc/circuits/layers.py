"""Sums, products and concatenations of scaled messages, with flows as their gradients.

A message has shape (E, B, K) (E regions folded, B batch, K units), entries in [0, 1], and a
log-scale (E, B) kept outside autograd: the likelihood of unit k is values[e, b, k] *
exp(log_scale[e, b]). What autograd calls the gradient of a message is here its *flow*

    F = u * d log p / d u      (times the upstream factor, to which everything is linear)

which is the posterior probability of using that unit. In this convention a product passes a flow
on to each child unchanged, rescaling needs no gradient at all, and routing (split, index_select)
is ordinary autograd. The gradient d log p / d u itself could reach 1 / u and overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.rows import Rows
from distpc.circuits.schedule import ProductPlan
from distpc.circuits.statistics import random_statistics, read_out

WEAK = 1e-30
"""A product whose largest unit is below this may have lost units that matter later."""

TINY = 1e-34
"""Units below this (of a message with maximum about 1) carry no flow worth keeping."""

FLOAT_FLOOR = 1.2e-38
"""Smallest normal float32: an entry below it may stand for anything smaller."""

LOST_NATS = 16.0
"""exp(-16) relative to the maximum is below float32 precision."""


class SumFunction(torch.autograd.Function):
    """u, S -> u @ theta(S)^T. Saves S, not theta: under ZeRO-3 a saved theta would keep the whole
    circuit on every rank."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, statistics: Tensor, smoothing: float) -> Tensor:
        num_tables, num_units, fan_in = statistics.shape
        theta = read_out(statistics, smoothing)
        grouped = u.reshape(num_tables, -1, fan_in)
        out = torch.matmul(grouped, theta.mT).view(*u.shape[:2], num_units)
        ctx.save_for_backward(u, statistics, out)
        ctx.smoothing = smoothing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor, Tensor, None]:
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

    def forward(self, u: Tensor, in_logs: bool = False) -> Tensor:
        """(E, B, K) -> (E, B, K'); consecutive rows share a matrix where E > T."""
        function = LogSumFunction if in_logs else SumFunction
        return function.apply(u, self.statistics, self.smoothing)

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


def rescale_(values: Tensor) -> tuple[Tensor, Tensor]:
    """Divide a message by its maximum, in place.

    Returns:
        The log of the maximum (E, B), float64; and which samples (B,) are too weak to trust.
    """
    top = values.amax(-1)
    is_weak = top < WEAK
    # A weak sample is evaluated again elsewhere; here it only has to stay finite.
    top = torch.where(is_weak, 1.0, top)
    values.div_(top.unsqueeze(-1))
    return top.log().double(), is_weak.any(0)


class RescaleFunction(torch.autograd.Function):
    """A message divided by its maximum; the flow stays what it is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = values.clone()
        log_top, is_weak = rescale_(out)
        ctx.mark_non_differentiable(log_top, is_weak)
        return out, log_top, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> Tensor:
        return flow


class Factor(nn.Module):
    """Some rows of a piece that multiply some rows of a product."""

    def __init__(self, piece: int, rows: Sequence[int], targets: Sequence[int]) -> None:
        super().__init__()
        self.piece = piece
        self.rows = Rows(rows)
        self.targets = Rows(targets)


class ProductLayer(nn.Module):
    """The products of one fold; rows sorted by falling number of factors.

    Up to 4 factors are multiplied and then rescaled. More of them add logs, subtract the maximum
    and exponentiate: multiplied one by one they would underflow long before anything is zero.
    """

    def __init__(self, plan: ProductPlan) -> None:
        super().__init__()
        self.num_rows = len(plan.regions)
        self.num_log_rows = plan.num_log_rows
        self.factors = [Factor(term.piece, term.rows, term.targets) for term in plan.terms]
        # Registered, so that their indices move to the circuit's device.
        self.modules_of_factors = nn.ModuleList(self.factors)
        pairs = list(zip(plan.terms, self.factors, strict=True))
        self.in_logs = [f for term, f in pairs if term.in_logs]
        self.first = [f for term, f in pairs if term.first and not term.in_logs]
        self.rest = [f for term, f in pairs if not term.first and not term.in_logs]

    def multiply(self, pieces: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        """Product, log of its maximum (E, B) and weak samples (B,)."""
        out = pieces[0].new_empty(self.num_rows, *pieces[0].shape[1:])
        for factor in self.first:
            factor.targets.put_(out, factor.rows.take(pieces[factor.piece]))
        for factor in self.rest:
            factor.targets.multiply_(out, factor.rows.take(pieces[factor.piece]))
        if mask is not None:
            out = torch.where(mask, out, 0.0)
        if not self.num_log_rows:
            return (out, *rescale_(out))
        log_rows = slice(0, self.num_log_rows)
        logs, lost = self._add_logs(pieces, None if mask is None else mask[log_rows])
        top = torch.where(logs.amax(-1).isneginf(), 0.0, logs.amax(-1))
        out[log_rows] = (logs - top.unsqueeze(-1)).exp_()
        log_top, is_weak = rescale_(out)
        log_top[log_rows] += top
        return out, log_top, is_weak | lost

    def _add_logs(self, pieces: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        logs = pieces[0].new_zeros(self.num_log_rows, *pieces[0].shape[1:])
        zeros = torch.zeros(logs.shape, dtype=torch.int32, device=logs.device)
        for factor in self.in_logs:
            values = factor.rows.take(pieces[factor.piece])
            factor.targets.add_(logs, values.clamp_min(FLOAT_FLOOR).log_())
            factor.targets.add_(zeros, (values < FLOAT_FLOOR).int())
        # With zeros at the floor, `logs` bounds what a unit with an underflowed factor could be.
        has_zero = zeros > 0
        if mask is not None:
            logs = torch.where(mask, logs, -torch.inf)
        bound = torch.where(has_zero, logs, -torch.inf).amax(-1)
        logs = torch.where(has_zero, -torch.inf, logs)
        lost = (bound > logs.amax(-1) - LOST_NATS) & ~bound.isneginf()
        return logs, lost.any(0)

    def add(self, pieces: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """The product of messages that are logs, by ordinary autograd."""
        total = pieces[0].new_zeros(self.num_rows, *pieces[0].shape[1:])
        for factor in self.factors:
            targets = torch.arange(self.num_rows, device=total.device)
            values = factor.rows.take(pieces[factor.piece])
            total = total.index_add(0, factor.targets.take(targets), values)
        return total if mask is None else torch.where(mask, total, -torch.inf)

    def pass_flow(self, flow: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The flow of each piece (of `sizes` rows): that of its product, row by row."""
        factors: list[list[Factor]] = [[] for _ in sizes]
        for factor in self.factors:
            factors[factor.piece].append(factor)
        flows = []
        for size, own in zip(sizes, factors, strict=True):
            if len(own) == 1 and own[0].rows.slice == slice(0, size):
                flows.append(own[0].targets.take(flow))
                continue
            total = flow.new_zeros(size, *flow.shape[1:])
            for factor in own:
                factor.rows.add_(total, factor.targets.take(flow))
            flows.append(total)
        return flows


class ProductFunction(torch.autograd.Function):
    """Pieces -> (values, log of their maximum, weak samples); flows pass unchanged."""

    @staticmethod
    def forward(
        ctx: Any, layer: ProductLayer, mask: Tensor | None, *pieces: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layer = layer
        ctx.sizes = [len(piece) for piece in pieces]
        out, log_top, is_weak = layer.multiply(pieces, mask)
        ctx.mark_non_differentiable(log_top, is_weak)
        return out, log_top, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.layer.pass_flow(flow, ctx.sizes))


class ConcatFunction(torch.autograd.Function):
    """Groups (E, B, K_j) with scales (E, B) each -> one message with one common scale."""

    @staticmethod
    def forward(
        ctx: Any, mask: Tensor | None, scales: Sequence[Tensor], *groups: Tensor
    ) -> tuple[Tensor, ...]:
        tops = [s + g.amax(-1).log() for s, g in zip(scales, groups, strict=True)]
        common = torch.stack(tops).amax(0)
        common = torch.where(common.isneginf(), 0.0, common)
        out = torch.cat(
            [
                group * (scale - common).clamp_max(80.0).exp().to(group.dtype).unsqueeze(-1)
                for group, scale in zip(groups, scales, strict=True)
            ],
            dim=-1,
        )
        if mask is not None:
            out = torch.where(mask, out, 0.0)
        log_top, is_weak = rescale_(out)
        ctx.sizes = [group.shape[-1] for group in groups]
        scale = common + log_top
        ctx.mark_non_differentiable(scale, is_weak)
        return out, scale, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (None, None, *flow.split(ctx.sizes, dim=-1))


class RootFunction(torch.autograd.Function):
    """The root's likelihood -> log-likelihood (B,); impossible or broken samples get no flow."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, log_scale: Tensor | None) -> Tensor:
        logs = values if log_scale is None else values.log().double() + log_scale
        ctx.save_for_backward(logs.isfinite())
        ctx.dtype = values.dtype
        return logs.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (is_finite,) = ctx.saved_tensors
        return torch.where(is_finite, upstream, 0.0).to(ctx.dtype), None
