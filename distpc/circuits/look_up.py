"""Looking values up in tables over categories: one function for all families.

The gradient of a log-likelihood with respect to a log-table entry is the entry's flow, so what a
look-up hands back is the flow of every entry. A family that keeps counts takes it as it is; others
map it to their parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.lost import new_scale, underflow

if TYPE_CHECKING:
    from distpc.circuits.inputs import TableBank


class LookUpFunction(torch.autograd.Function):
    """Products of `width` table rows; the flow of a product goes to each of its entries.

    Where there are far fewer look-ups than rows, as with large vocabularies, only the rows that
    are looked up are read out. (A row costs about twice what it costs in a whole table.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        bank: TableBank,
        index: Tensor,
        mask: Tensor | None,
        in_logs: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        ctx.like, ctx.bank = (source.shape, source.dtype), bank
        num_rows, batch, width = index.shape
        shape = (num_rows, batch, source.shape[1])
        is_sparse = 2 * index.numel() < bank.num_rows
        dtype = torch.float64 if in_logs else source.dtype
        table = bank.read(source, index.view(-1) if is_sparse else None, dtype)
        if width == 1 and mask is None and not in_logs:
            if bank.is_bounded_below:
                # The products and sums that follow can do without a maximum of 1.
                values, scale = table, table.new_zeros(1, 2, dtype=torch.float64)
            else:
                values, scale = scaled_rows_(table, bank.reads_logs)
                scale = scale if is_sparse else scale[index.view(-1)]
            if not is_sparse:
                values = nn.functional.embedding(index.view(-1), values)
            values = values.view(shape)
            scale = scale.expand(len(index) * batch, 2).view(*shape[:2], 2)
        else:
            logs = table if bank.reads_logs else table.log_()
            if not is_sparse:
                logs = nn.functional.embedding_bag(index.view(-1, width), logs, mode="sum")
            elif width > 1:
                logs = logs.view(-1, width, shape[2]).sum(1)
            logs = logs.view(shape)
            if mask is not None:
                logs = torch.where(mask, logs, -torch.inf)
            if in_logs:
                return logs
            values, scale = scaled_rows_(logs, is_log=True, mask=mask)
        ctx.mark_non_differentiable(scale)
        return values, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        (num_rows, num_units), dtype = ctx.like
        flow = flow.reshape(-1, num_units).to(dtype)
        flow_rows = scatter_rows(flow, index.view(-1, index.shape[-1]), num_rows)
        return ctx.bank.shared_out_(flow_rows), None, None, None, None


def scaled_rows_(rows: Tensor, is_log: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows (..., K) divided by their maxima, in place, and the scale (..., 2), see `lost`.

    A row of zeros stays what it is, with log-scale -inf.
    """
    top = rows.amax(-1, keepdim=True)
    if is_log:
        rows = rows.sub_(torch.where(top.isneginf(), 0.0, top)).exp_()
        log_top = top
    else:
        rows = rows.div_(torch.where(top > 0, top, 1.0))
        log_top = top.log_()
    return rows, new_scale(log_top.squeeze(-1), underflow(rows, mask))


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
