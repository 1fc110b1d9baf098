"""Products and concatenations of scaled messages, with flows as their gradients.

A message has shape (E, B, K) (E regions folded, B batch, K units), entries in [0, 1], and a
scale kept outside autograd: a log-scale (E, B) and a bound on what underflow took (see `lost`).
What autograd calls the gradient of a message is here its *flow*

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

from distpc.circuits.lost import (
    FLOAT_FLOOR,
    MAX_NATS,
    Scale,
    concat_lost,
    is_above,
    may_hold,
    new_scale,
    some_underflow,
    underflow,
)
from distpc.circuits.routing import uses_each_row_once
from distpc.circuits.rows import Rows
from distpc.circuits.schedule import ProductPlan

WEAK = 1e-30
"""A product whose largest unit is below this may have lost units that matter later."""


def rescale_(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Divide a message by its maximum, in place.

    Returns:
        The log of the maximum (E, B), float64; and which samples (B,) are too weak to trust, None
        for none. They are evaluated again elsewhere; here their units become 1, so that no sum
        is 0.
    """
    top = values.amax(-1)
    if is_above(top, WEAK):
        values.mul_(top.reciprocal().unsqueeze(-1))
        return top.double().log_(), None
    is_weak = ~(top >= WEAK)
    top = torch.where(is_weak, 1.0, top)
    values.mul_(top.reciprocal().unsqueeze(-1)).masked_fill_(is_weak.unsqueeze(-1), 1.0)
    return top.log().double(), is_weak.any(0)


class RescaleFunction(torch.autograd.Function):
    """A message divided by its maximum; the flow stays what it is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out = values.clone()
        log_top, is_weak = rescale_(out)
        mark_constant(ctx, log_top, is_weak)
        return out, log_top, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> Tensor:
        return flow


def mark_constant(ctx: Any, *outputs: Tensor | None) -> None:
    """Outputs that no gradient goes through, nor zeros in its place."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output for output in outputs if output is not None))


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
        self.registered = nn.ModuleList(self.factors)
        self.flow_rows = nn.ModuleList(
            [self._flow_rows(plan, piece) for piece in range(len(plan.requests[0].pieces))]
        )
        pairs = list(zip(plan.terms, self.factors, strict=True))
        self.in_logs = [f for term, f in pairs if term.in_logs]
        direct = [[f for t, f in pairs if not t.in_logs and t.number == n] for n in range(4)]
        self.first, self.second, self.rest = direct[0], direct[1], direct[2] + direct[3]
        # Rows with a second factor, where they come before those without one.
        self.num_paired = self._paired_rows()

    def _flow_rows(self, plan: ProductPlan, piece: int) -> nn.Module:
        """The product that uses each row of a piece; Identity where some are used repeatedly."""
        product_of = {
            row: target
            for term in plan.terms
            if term.piece == piece
            for row, target in zip(term.rows, term.targets, strict=True)
        }
        if not uses_each_row_once(plan, piece):
            return nn.Identity()
        return Rows([product_of[row] for row in range(len(product_of))])

    def _paired_rows(self) -> int:
        """Rows whose first two factors can be multiplied without being copied first."""
        if len(self.first) != 1 or len(self.second) != 1:
            return 0
        (first,), (second,) = self.first, self.second
        into, paired = first.targets.slice, second.targets.slice
        if into is None or paired is None or into.start != paired.start:
            return 0
        return paired.stop - paired.start

    def multiply(
        self, pieces: Sequence[Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Product, log of its maximum (E, B), its own loss (E, B) and weak samples (B,)."""
        out = pieces[0].new_empty(self.num_rows, *pieces[0].shape[1:])
        self._multiply_into(out, pieces)
        log_rows = slice(0, self.num_log_rows)
        if self.num_log_rows:
            logs, bound = self._add_logs(pieces, None if mask is None else mask[log_rows])
            top = torch.where(logs.amax(-1).isneginf(), 0.0, logs.amax(-1))
            out[log_rows] = (logs - top.unsqueeze(-1)).exp_()
        lost = some_underflow(out, mask)
        if mask is not None:
            out = torch.where(mask, out, 0.0)
        log_top, is_weak = rescale_(out)
        if lost is not None:
            lost *= (-log_top).exp()
        if self.num_log_rows:
            log_top[log_rows] += top
            if may_hold(~bound.isneginf()):
                lost = torch.zeros_like(log_top) if lost is None else lost
                lost[log_rows] += (bound - top).double().exp_()
        return out, log_top, lost, is_weak

    def _multiply_into(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        paired = self.num_paired
        if paired:
            (first,), (second,) = self.first, self.second
            a = first.rows.take(pieces[first.piece])
            b = second.rows.take(pieces[second.piece])
            targets = first.targets.take(out)
            torch.mul(a[:paired], b, out=targets[:paired])
            if len(a) > paired:
                targets[paired:] = a[paired:]
        else:
            for factor in self.first:
                factor.targets.put_(out, factor.rows.take(pieces[factor.piece]))
            for factor in self.second:
                factor.targets.multiply_(out, factor.rows.take(pieces[factor.piece]))
        for factor in self.rest:
            factor.targets.multiply_(out, factor.rows.take(pieces[factor.piece]))

    def _add_logs(self, pieces: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logs of the products, and of what one with an underflowed factor could be (E, B)."""
        logs = pieces[0].new_zeros(self.num_log_rows, *pieces[0].shape[1:])
        zeros = torch.zeros(logs.shape, dtype=torch.int32, device=logs.device)
        for factor in self.in_logs:
            values = factor.rows.take(pieces[factor.piece])
            factor.targets.add_(logs, values.clamp_min(FLOAT_FLOOR).log_())
            factor.targets.add_(zeros, (values < FLOAT_FLOOR).int())
        has_zero = zeros > 0
        if mask is not None:
            logs = torch.where(mask, logs, -torch.inf)
        bound = torch.where(has_zero, logs, -torch.inf).amax(-1)
        return torch.where(has_zero, -torch.inf, logs), bound

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
        flows = []
        for number, (size, rows) in enumerate(zip(sizes, self.flow_rows, strict=True)):
            if isinstance(rows, Rows):
                flows.append(rows.take(flow))
                continue
            total = flow.new_zeros(size, *flow.shape[1:])
            for factor in self.factors:
                if factor.piece == number:
                    factor.rows.add_(total, factor.targets.take(flow))
            flows.append(total)
        return flows


class ProductFunction(torch.autograd.Function):
    """Pieces -> what `ProductLayer.multiply` gives; flows pass unchanged."""

    @staticmethod
    def forward(
        ctx: Any, layer: ProductLayer, mask: Tensor | None, *pieces: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.layer = layer
        ctx.sizes = [len(piece) for piece in pieces]
        out, log_top, lost, is_weak = layer.multiply(pieces, mask)
        mark_constant(ctx, log_top, lost, is_weak)
        return out, log_top, lost, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.layer.pass_flow(flow, ctx.sizes))


class KroneckerFunction(torch.autograd.Function):
    """(E, B, K1), (E, B, K2) -> (E, B, K1 * K2) of all products; a flow goes to both factors."""

    @staticmethod
    def forward(
        ctx: Any, mask: Tensor | None, left: Tensor, right: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.units = left.shape[-1], right.shape[-1]
        out = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
        lost = some_underflow(out, mask)
        if mask is not None:
            out = torch.where(mask, out, 0.0)
        log_top, is_weak = rescale_(out)
        if lost is not None:
            lost *= (-log_top).exp()
        mark_constant(ctx, log_top, lost, is_weak)
        return out, log_top, lost, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        flow = flow.unflatten(-1, ctx.units)
        return None, flow.sum(-1), flow.sum(-2)


def side_by_side(
    mask: Tensor | None, scales: Sequence[Scale], groups: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Groups (E, B, K_j) with scales (E, B) each -> one message, both halves of its scale, and
    weak samples (B,)."""
    logs = [scale.log for scale in scales if scale.log is not None]
    tops = [log + g.amax(-1).log() for log, g in zip(logs, groups, strict=True)]
    common = torch.stack(tops).amax(0)
    common = torch.where(common.isneginf(), 0.0, common)
    shifts = [(log - common).clamp_max(80.0).exp() for log in logs]
    out = torch.cat(
        [
            group * shift.to(group.dtype).unsqueeze(-1)
            for group, shift in zip(groups, shifts, strict=True)
        ],
        dim=-1,
    )
    lost = underflow(out, mask)
    lost += torch.stack([concat_lost(scale, common) for scale in scales]).amax(0)
    if mask is not None:
        out = torch.where(mask, out, 0.0)
    log_top, is_weak = rescale_(out)
    # A bound that is 0 stays 0, whatever the top; any other becomes large enough.
    lost *= (-log_top).clamp_max(MAX_NATS).exp_()
    return out, new_scale(common + log_top, lost), is_weak


class ConcatFunction(torch.autograd.Function):
    """Groups (E, B, K_j) with scales (E, B) each -> one message, both halves of its scale."""

    @staticmethod
    def forward(
        ctx: Any, mask: Tensor | None, scales: Sequence[Scale], *groups: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.sizes = [group.shape[-1] for group in groups]
        out, scale, is_weak = side_by_side(mask, scales, groups)
        mark_constant(ctx, scale, is_weak)
        return out, scale, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (None, None, *flow.split(ctx.sizes, dim=-1))


class RootFunction(torch.autograd.Function):
    """The root's likelihood -> log-likelihood (B,); impossible or broken samples get no flow."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor | None) -> Tensor:
        logs = values if scale is None else values.log().double() + scale
        ctx.save_for_backward(logs.isfinite())
        ctx.dtype = values.dtype
        return logs.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (is_finite,) = ctx.saved_tensors
        return torch.where(is_finite, upstream, 0.0).to(ctx.dtype), None
