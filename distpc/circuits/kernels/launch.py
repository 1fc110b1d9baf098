"""Launches of the kernels: tile shapes, and whether Triton or the reference runs.

Triton runs on CUDA, and on a CPU where its interpreter is switched on (TRITON_INTERPRET=1, tests).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from distpc.circuits.kernels import reference
from distpc.circuits.kernels.layout import ALIGN, Layout, Leaves, Tables

_MESSAGE_ENTRIES = 4096
"""Entries of messages that one program of a product handles."""


@dataclass(frozen=True)
class Tile:
    """How a program of `learn_sums` is shaped."""

    m: int
    n: int
    b: int
    warps: int
    stages: int
    parts: int = 1
    group: int = 8


def tile_of(tables: Tables, is_half: bool) -> Tile:
    """The tile of a shape."""
    rows, units = tables.shape
    if not is_half:
        return Tile(min(64, _block(rows)), min(64, _block(units)), 32, 4, 2)
    if rows < 64 or units < 64:
        return Tile(min(64, _block(rows)), min(128, _block(units)), 64, 4, 3)
    if rows < 128 or units < 128:
        return Tile(64, 64, 64, 4, 3)
    return Tile(128, 128, 64, 8, 3, 2)


def uses_triton(device: torch.device) -> bool:
    """Whether Triton runs the kernels on a device."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


class Nodes:
    """Nodes of one number of units that are multiplied, or split, in one launch."""

    def __init__(self, layout: Layout, nodes: list[int]) -> None:
        self.nodes = nodes
        self.units = layout.plan.nodes[nodes[0]].shape[1]
        self.index = torch.tensor(nodes, dtype=torch.int32, device=layout.device)

    def grid(self, layout: Layout) -> tuple[tuple[int, int], dict[str, int]]:
        """Of a launch, and its constants."""
        block = _block(self.units)
        samples = max(1, min(_MESSAGE_ENTRIES // block, _block(layout.batch)))
        constants = {
            "K": self.units,
            "BLOCK_K": block,
            "BLOCK_B": samples,
            "ALIGN": _align(layout),
            "num_warps": 4 if block * samples <= 4096 else 8,
        }
        return (len(self.nodes), -(-layout.batch // samples)), constants


def multiply(layout: Layout, nodes: Nodes) -> None:
    """See `reference.multiply`."""
    if not uses_triton(layout.device):
        reference.multiply(layout, nodes.nodes)
        return
    from distpc.circuits.kernels import triton_products

    grid, constants = nodes.grid(layout)
    triton_products.multiply[grid](
        layout.u,
        layout.log_top,
        layout.y,
        layout.inverse,
        layout.leaf_base,
        layout.leaf_inverse,
        layout.codes,
        nodes.index,
        layout.node_at,
        layout.leaf_start,
        layout.leaf_variable,
        layout.leaf_at,
        layout.leaf_inverse_of,
        layout.leaf_floor,
        layout.sum_start,
        layout.sum_at,
        layout.sum_inverse_at,
        layout.batch,
        **constants,
    )


def split(layout: Layout, nodes: Nodes) -> None:
    """See `reference.split`."""
    if not uses_triton(layout.device):
        reference.split(layout, nodes.nodes)
        return
    from distpc.circuits.kernels import triton_products

    grid, constants = nodes.grid(layout)
    triton_products.split[grid](
        layout.u,
        layout.v,
        layout.y,
        nodes.index,
        layout.node_at,
        layout.sum_start,
        layout.sum_at,
        layout.batch,
        **constants,
    )


def learn_sums(layout: Layout, tables: Tables, step_size: Tensor, tile: Tile | None = None) -> None:
    """See `reference.learn_sums`."""
    if not uses_triton(layout.device):
        reference.learn_sums(layout, tables, step_size)
        return
    from distpc.circuits.kernels import triton_sums

    is_half = layout.dtype != torch.float32
    tile = tile or tile_of(tables, is_half)
    rows, units = tables.shape
    num_m, num_n = -(-rows // tile.m), -(-units // tile.n)
    row_sums = layout.u.new_empty(tables.count, rows, num_n, dtype=torch.float32)
    triton_sums.learn_sums[(tables.count * num_m * num_n,)](
        tables.statistics,
        tables.weights,
        row_sums,
        layout.u,
        layout.y,
        step_size,
        tables.at,
        tables.u_at,
        tables.ratio_at,
        tables.lengths,
        tables.floor,
        1.0 / layout.batch,
        M=rows,
        N=units,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_B=tile.b,
        GROUP_M=tile.group,
        ALIGN=_align(layout) if rows % ALIGN == 0 else 1,
        PRECISION="tf32" if is_half else "ieee",
        EVEN=not (rows % tile.m or units % tile.n or layout.batch % tile.b),
        PARTS=tile.parts,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    torch.reciprocal(row_sums.sum(-1), out=tables.inverse)


def read_weights(layout: Layout, tables: Tables) -> None:
    """See `reference.read_weights`."""
    if not uses_triton(layout.device):
        reference.read_weights(tables)
        return
    from distpc.circuits.kernels import triton_sums

    rows, units = tables.shape
    block_n = min(1024, _block(units))
    block_m = max(1, min(_MESSAGE_ENTRIES // block_n, _block(rows)))
    row_sums = torch.empty_like(tables.inverse)
    triton_sums.read_weights[(-(-rows // block_m), tables.count)](
        tables.statistics,
        tables.weights,
        row_sums,
        tables.at,
        tables.floor,
        M=rows,
        N=units,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ALIGN=_align(layout),
    )
    torch.reciprocal(row_sums, out=tables.inverse)


def learn_leaves(layout: Layout, leaves: Leaves, step_size: Tensor) -> None:
    """See `reference.learn_leaves`."""
    if not uses_triton(layout.device):
        reference.learn_leaves(layout, leaves, step_size)
        return
    from distpc.circuits.kernels import triton_leaves

    is_half = layout.dtype != torch.float32
    order = starts = leaves.size
    if leaves.is_sorted:
        codes = layout.codes[leaves.variable_index].view(leaves.count, -1)
        codes, order = codes.sort(dim=1)
        starts = torch.searchsorted(codes, leaves.bounds, out_int32=True)
    block_k = min(64, _block(leaves.units))
    grid = (leaves.count * leaves.num_chunks * -(-leaves.units // block_k),)
    triton_leaves.learn_leaves[grid](
        layout.leaf_base,
        leaves.totals,
        layout.u,
        layout.v,
        layout.codes,
        order,
        starts,
        step_size,
        leaves.at,
        leaves.size,
        leaves.reads * layout.batch,
        leaves.variable,
        leaves.factor_at,
        1.0 / layout.batch,
        layout.batch,
        leaves.num_chunks,
        K=leaves.units,
        BLOCK_C=leaves.chunk,
        BLOCK_K=block_k,
        BLOCK_T=32,
        SORTED=leaves.is_sorted,
        ALIGN=_align(layout),
        PRECISION="tf32" if is_half else "ieee",
        num_warps=8 if leaves.chunk * block_k > 8192 else 4,
    )


def _align(layout: Layout) -> int:
    return ALIGN if layout.is_aligned else 1


def _block(count: int) -> int:
    """The least power of two that is not below a count, at least 16."""
    return max(16, 1 << (count - 1).bit_length())
