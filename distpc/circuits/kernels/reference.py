"""Every kernel of the fused step as plain PyTorch: what Triton is tested against, and the path
where there is no Triton. Loops over nodes and tables; nothing here is fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distpc.circuits.kernels.layout import Layout, Leaves, Tables


def multiply(layout: Layout, nodes: Sequence[int]) -> None:
    """`u` and `log_top` of some nodes: products of leaves and sums, divided by their maxima."""
    for i in nodes:
        node = layout.plan.nodes[i]
        values = torch.ones(layout.batch, node.shape[1], device=layout.device)
        total = torch.zeros(layout.batch, device=layout.device)
        for leaf in node.leaves:
            leaves, table = layout.leaf_place[leaf.bank, leaf.table]
            floor = leaves.banks[table].pseudocount / leaves.sizes[table]
            theta = (leaves.statistics_of(table) + floor) * leaves.inverse[table]
            codes = layout.codes[leaf.variable].long()
            values *= torch.where((codes < 0).unsqueeze(1), 1.0, theta[codes.clamp_min(0)])
            values, total = _rescale(values, total)
        for s in node.sums:
            child = layout.plan.nodes[s]
            at = layout.inverse_at[child.bank, child.table]
            scale = layout.inverse[at : at + child.shape[0]]
            values *= layout.message(layout.y, s).float() * scale
            values, total = _rescale(values, total)
        layout.message(layout.u, i).copy_(values)
        layout.log_top[i] = total


def _rescale(values: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    top = values.amax(-1)
    top = torch.where(top > 0, top, 1.0)
    return values / top.unsqueeze(-1), total + top.log()


def split(layout: Layout, nodes: Sequence[int]) -> None:
    """`v` of some nodes becomes their flow u * v, and `y` of the sums below flow / y."""
    for i in nodes:
        v = layout.message(layout.v, i)
        flow = layout.message(layout.u, i).float() * v.float()
        v.copy_(flow)
        for s in layout.plan.nodes[i].sums:
            y = layout.message(layout.y, s)
            values = y.float()
            y.copy_(torch.where(values > 0, flow / values, 0.0))


def learn_sums(layout: Layout, tables: Tables, step_size: Tensor) -> None:
    """S <- (1 - step) S + step * flow / B, where the flow is (S + eps) * (ratio^T u); then W."""
    for table, (first, count) in enumerate(layout.plan.spans[tables.shape]):
        rows = range(first, first + count)
        u = torch.cat([layout.message(layout.u, i) for i in rows]).float()
        ratio = torch.cat([layout.message(layout.y, i) for i in rows]).float()
        statistics = tables.statistics_of(table)
        flow = (statistics + tables.floor) * (ratio.T @ u)
        statistics.mul_(1 - step_size).add_(flow * (step_size / layout.batch))
    read_weights(tables)


def read_weights(tables: Tables) -> None:
    """W = S + eps, rounded, and the inverse sums of its rows."""
    for table in range(tables.count):
        tables.weights[table] = tables.statistics_of(table) + tables.floor
        tables.inverse[table] = tables.weights[table].float().sum(-1).reciprocal()


def learn_leaves(layout: Layout, leaves: Leaves, step_size: Tensor) -> None:
    """S <- (1 - step) S + step * flow / B, and the totals of its columns."""
    for table, reads in enumerate(leaves.factors):
        statistics = leaves.statistics_of(table)
        flow = torch.zeros_like(statistics)
        for node, variable in reads:
            codes = layout.codes[variable].long()
            seen = codes >= 0
            flow.index_add_(0, codes[seen], layout.message(layout.v, node).float()[seen])
        statistics.mul_(1 - step_size).add_(flow * (step_size / layout.batch))
    leaves.read_totals()
