"""Launches of the kernels: tile shapes, and whether Triton or the reference runs.

Triton runs on CUDA, and on a CPU where its interpreter is switched on (TRITON_INTERPRET=1, tests).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distpc.circuits.kernels import reference
from distpc.circuits.kernels.layout import ALIGN, Layout, Leaves, Tables
from distpc.circuits.kernels.plan import Group

_MESSAGE_ENTRIES = 4096
"""Entries of messages that one program of a product handles."""

PREFETCH = True
"""Whether statistics are asked for before the matrix product whose epilogue updates them."""

_PROGRAMS = 1024
"""Programs that fill a large GPU."""


@dataclass(frozen=True)
class Tile:
    """How a program of a matrix product is shaped; `registers` bounds those of a thread, 0: not."""

    m: int
    n: int
    b: int
    warps: int
    stages: int
    parts: int = 1
    registers: int = 0
    group: int = 8
    prefetch: bool = PREFETCH

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launch takes."""
        bound = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **bound}


def tile_of(tables: Tables, is_half: bool) -> Tile:
    """The tile of a shape."""
    rows, units = tables.shape
    if not is_half:
        return Tile(min(64, _block(rows)), min(64, _block(units)), 32, 4, 2)
    if rows < 64 or units < 64:
        return Tile(min(64, _block(rows)), min(128, _block(units)), 64, 4, 3)
    if rows < 128 or units < 128:
        return Tile(64, 64, 64, 4, 3)
    if tables.longest >= 4096 and rows * units >= 4096**2:
        return Tile(128, 256, 64, 8, 4, 4)
    return Tile(128, 128, 64, 8, 3, 2)


def uses_triton(device: torch.device) -> bool:
    """Whether Triton runs the kernels on a device."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


class Nodes:
    """Nodes of one number of units that are multiplied, or split, in one launch."""

    def __init__(self, layout: Layout, nodes: list[int]) -> None:
        self.nodes = nodes
        self.units = layout.plan.nodes[nodes[0]].shape[1]
        self.heads = layout.heads(nodes)
        self.has_one_leaf = all(len(layout.plan.nodes[i].leaves) == 1 for i in nodes)

    def grid(self, layout: Layout) -> tuple[tuple[int, int], dict[str, int]]:
        """Of a launch, and its constants."""
        block = _block(self.units)
        samples = max(1, min(_MESSAGE_ENTRIES // block, _block(layout.batch)))
        # A launch over few nodes takes as long as one program does: more and smaller ones.
        rows = len(self.nodes) * layout.batch
        while samples > 1 and samples * block > 256 and rows // samples < _PROGRAMS:
            samples //= 2
        constants = {
            "K": self.units,
            "BLOCK_K": block,
            "BLOCK_B": samples,
            "ALIGN": _align(layout),
            "num_warps": max(1, min(16 if block > 4096 else 4, block * samples // 256)),
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
        nodes.heads,
        layout.leaf_variable,
        layout.leaf_at,
        layout.leaf_inverse_of,
        layout.leaf_floor,
        layout.sum_at,
        layout.sum_inverse_at,
        layout.batch,
        ONE_LEAF=nodes.has_one_leaf,
        EVEN=constants["K"] == constants["BLOCK_K"] and layout.batch % constants["BLOCK_B"] == 0,
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
        nodes.heads,
        layout.sum_at,
        layout.batch,
        **constants,
    )


class Products:
    """The matrix products of a group of nodes: y = u @ W^T forward, flows from ratios backward."""

    def __init__(self, layout: Layout, group: Group) -> None:
        self.rows_per_table = group.rows
        self.shape = group.shape
        rows, units = group.shape
        tables = layout.tables[group.shape].weights
        self.weights = tables[group.table : group.table + group.tables]
        self.nodes = list(range(group.node, group.node + group.tables * group.rows))
        self.heads = layout.heads(self.nodes)
        count = len(self.nodes) * layout.batch

        def batched(buffer: Tensor, at: int, width: int) -> Tensor:
            return buffer[at : at + count * width].view(group.tables, -1, width)

        self.u = batched(layout.u, layout.u_at[group.node], units)
        self.v = batched(layout.v, layout.u_at[group.node], units)
        self.y = batched(layout.y, layout.y_at[group.node], rows)
        self.split = Nodes(layout, self.nodes)
        self.tile = descent_tile(layout, self.shape, len(self.nodes))


def descent_tile(layout: Layout, shape: tuple[int, int], nodes: int) -> Tile | None:
    """The tile (samples, units, inner) of `descend`; None: a plain product is faster, or the
    kernel is not for this shape."""
    rows, units = shape
    if rows < 16 or not uses_triton(layout.device):
        return None
    if layout.dtype == torch.float32:
        return Tile(16, min(64, _block(units)), 16, 4, 2)
    inner = min(64, _block(rows))
    wide = min(128, _block(units))
    programs = nodes * -(-layout.batch // 128) * -(-units // wide)
    if programs < 132:
        # Measured on an H200: for long products of few tiles cuBLAS, which splits them, is faster.
        return None if rows >= 4096 else Tile(64, min(64, wide), inner, 4, 4)
    if rows >= 8192 and units >= 8192:
        return Tile(128, 256, inner, 8, 3, 2)
    return Tile(128, wide, inner, 8, 3, 2 if wide == 128 else 1, 128)


def descend(layout: Layout, products: Products) -> None:
    """y of a group are ratios: flows in `v`, ratios of the sums below; with an epilogue, or as a
    product and then `split`."""
    if products.tile is None:
        torch.bmm(products.y, products.weights, out=products.v)
        split(layout, products.split)
        return
    from distpc.circuits.kernels import triton_descend

    tile, (rows, units) = products.tile, products.shape
    tiles = -(-layout.batch // tile.m) * -(-units // tile.n)
    triton_descend.descend[(len(products.nodes) * tiles,)](
        layout.u,
        layout.v,
        layout.y,
        products.weights,
        products.heads,
        layout.sum_at,
        products.y,
        layout.batch,
        products.rows_per_table,
        M=rows,
        K=units,
        BLOCK_B=tile.m,
        BLOCK_K=tile.n,
        BLOCK_M=tile.b,
        ALIGN=_align(layout),
        PRECISION=_precision(layout),
        EVEN=not (layout.batch % tile.m or units % tile.n or rows % tile.b),
        PARTS=tile.parts,
        **tile.options,
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
        layout.seed,
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
        PRECISION=_precision(layout),
        EVEN=not (rows % tile.m or units % tile.n or layout.batch % tile.b),
        PARTS=tile.parts,
        PREFETCH=_prefetches(tile),
        AT_RANDOM=layout.at_random,
        **tile.options,
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


def leaf_tile(leaves: Leaves) -> Tile:
    """The tile (values, units, tokens) of `learn_leaves`."""
    if leaves.chunk <= 16:
        return Tile(leaves.chunk, min(256, _block(leaves.units)), 32, 4, 3)
    return Tile(leaves.chunk, min(64, _block(leaves.units)), 32 if leaves.is_sorted else 64, 4, 3)


class Tokens(NamedTuple):
    """What a table's leaves read in a batch, by value: see `triton_leaves.learn_leaves`."""

    codes: Tensor
    order: Tensor
    starts: Tensor


def order_tokens(layout: Layout, leaves: Leaves) -> Tokens:
    """Sort a batch's tokens by value, where `learn_leaves` wants them so."""
    if not (leaves.is_sorted and uses_triton(layout.device)):
        return Tokens(layout.codes, leaves.size, leaves.size)
    codes, order = layout.codes[leaves.variable_index].view(leaves.count, -1).sort(dim=1)
    return Tokens(codes, order, torch.searchsorted(codes, leaves.bounds, out_int32=True))


def learn_leaves(
    layout: Layout,
    leaves: Leaves,
    step_size: Tensor,
    tokens: Tokens | None = None,
    tile: Tile | None = None,
) -> None:
    """See `reference.learn_leaves`; `tokens` of the batch, if they were ordered before."""
    if not uses_triton(layout.device):
        reference.learn_leaves(layout, leaves, step_size)
        return
    from distpc.circuits.kernels import triton_leaves

    tokens = tokens or order_tokens(layout, leaves)
    tile = tile or leaf_tile(leaves)
    grid = (leaves.count * leaves.num_chunks * -(-leaves.units // tile.n),)
    triton_leaves.learn_leaves[grid](
        layout.leaf_base,
        leaves.totals,
        layout.v,
        *tokens,
        step_size,
        leaves.at,
        leaves.size,
        leaves.reads,
        leaves.variable,
        leaves.factor_at,
        1.0 / layout.batch,
        layout.batch,
        leaves.num_chunks,
        K=leaves.units,
        BLOCK_C=tile.m,
        BLOCK_K=tile.n,
        BLOCK_T=tile.b,
        SORTED=leaves.is_sorted,
        ALIGN=_align(layout),
        PRECISION=_precision(layout),
        EVEN=not (layout.batch % tile.b or leaves.units % tile.n),
        PREFETCH=_prefetches(tile) and leaves.units % 32 == 0,
        **tile.options,
    )


def _align(layout: Layout) -> int:
    return ALIGN if layout.is_aligned else 1


def _prefetches(tile: Tile) -> bool:
    """Triton's interpreter knows no assembler."""
    return tile.prefetch and os.environ.get("TRITON_INTERPRET") != "1"


def _precision(layout: Layout) -> str:
    """Of products of float32; tests want exact ones."""
    return "ieee" if layout.dtype == torch.float32 else "tf32"


def _block(count: int) -> int:
    """The least power of two that is not below a count, at least 16."""
    return max(16, 1 << (count - 1).bit_length())
