"""What ranks that share a circuit's units tell each other about messages and flows.

A message is *split* (each rank has its own units, on a scale of its own) or *whole* (all units, the
same bits on every rank). Between the two lie four ways to read, each with the backward pass that
leaves every split message with the flow of its own units, and every whole one with all of it:

    gather          split -> whole, read alike by all ranks       backward: take one's own slice
    gather, shared  split -> whole, read for one's own rows       backward: sum and scatter
    cut             whole -> split, one's own units               backward: gather
    share           whole -> whole, read for one's own rows       backward: sum

Legend: E regions folded, B batch, K units, R ranks of the axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distpc.circuits.layers import mark_constant, side_by_side
from distpc.circuits.lost import Scale
from distpc.circuits.sharding import NodeTable, Reading
from distpc.circuits.step import Message
from distpc.parallel.axis import Axis


class NodeExchange:
    """The readings of a table, done over an axis of ranks; see `step.Exchange`.

    Args:
        table: says who reads what how.
        axis: the ranks that share the units.
    """

    def __init__(self, table: NodeTable, axis: Axis) -> None:
        self.table = table
        self.axis = axis

    def bring(self, message: Message, step: int, request: int, piece: int) -> Message:
        """The message as that step has to read it; a collective of the axis."""
        reading = self.table.readings[step, request, piece]
        values, scale = message.values, message.scale
        if reading is Reading.AS_IS:
            return message
        if reading is Reading.CUT:
            return Message(CutFunction.apply(values, self.axis), scale)
        if reading is Reading.SHARE:
            return Message(ShareFunction.apply(values, self.axis), scale)
        is_shared = reading is Reading.GATHER_SHARED
        if scale is None:
            return Message(GatherLogsFunction.apply(values, self.axis, is_shared), None)
        out, halves, is_weak = GatherFunction.apply(values, scale, self.axis, is_shared)
        return Message(out, Scale.of(halves), is_weak)

    def agree(self, is_weak: Tensor) -> Tensor:
        """Samples (B,) that any rank marks, so that all of them evaluate these again."""
        return self.axis.sum(is_weak.float()) > 0


class GatherFunction(torch.autograd.Function):
    """(E, B, K / R) with a scale of each rank's own -> (E, B, K) on one scale, see `layers`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Scale, axis: Axis, is_shared: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.axis, ctx.is_shared = axis, is_shared
        assert scale.log is not None
        lost = torch.zeros_like(scale.log) if scale.lost is None else scale.lost
        # One message instead of two: the scale's bits as a few units more.
        halves = torch.stack([scale.log, lost], dim=-1).view(values.dtype)
        parts = axis.all_gather(torch.cat([values, halves], dim=-1))
        num_units = values.shape[-1]
        groups = parts[..., :num_units].unbind(0)
        of_parts = parts[..., num_units:].contiguous().view(torch.float64).unbind(0)
        scales = [Scale(*of_part.unbind(-1)) for of_part in of_parts]
        out, common, is_weak = side_by_side(None, scales, groups)
        mark_constant(ctx, common, is_weak)
        return out, common, is_weak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _own_flow(flow, ctx.axis, ctx.is_shared), None, None, None


class GatherLogsFunction(torch.autograd.Function):
    """(E, B, K / R) -> (E, B, K) of messages that are logs."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, axis: Axis, is_shared: bool) -> Tensor:
        ctx.axis, ctx.is_shared = axis, is_shared
        return _joined(logs, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        return _own_flow(flow, ctx.axis, ctx.is_shared), None, None


class CutFunction(torch.autograd.Function):
    """(E, B, K) -> (E, B, K / R), this rank's units; their scale stays."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _own(values, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        return _joined(flow, ctx.axis), None


class ShareFunction(torch.autograd.Function):
    """(E, B, K) as it is; its flow is the sum of what the ranks' rows pass on."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.sum(flow), None


def _own(values: Tensor, axis: Axis) -> Tensor:
    """This rank's slice of the last dimension, a tensor of its own."""
    return values.chunk(axis.size, dim=-1)[axis.rank].contiguous()


def _joined(values: Tensor, axis: Axis) -> Tensor:
    return torch.cat(axis.all_gather(values).unbind(0), dim=-1)


def _own_flow(flow: Tensor, axis: Axis, is_shared: bool) -> Tensor:
    """The flow of this rank's units, from those of all units."""
    if not is_shared:
        return _own(flow, axis)
    return axis.sum_scatter(torch.stack(flow.chunk(axis.size, dim=-1)))
