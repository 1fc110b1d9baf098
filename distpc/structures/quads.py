"""Quad-trees and quad-graphs: images halved, row-wise and column-wise, down to the pixel.

Loconte et al., "What is the relationship between tensor factorizations and circuits (and how can
we exploit it)?", TMLR 2025, section 4.1. Cuts lie on the grid of powers of two, whatever the size
of the image, so that blocks away from the far edges have one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distpc.errors import StructureError
from distpc.structures.images import Rectangle, check_image
from distpc.structures.partitions import Hierarchy, partition_circuit
from distpc.structures.region_graph import RegionGraph


def quad_tree(
    image_shape: Sequence[int],
    num_states: int,
    *,
    num_splits: int = 2,
    num_input_units: int | None = None,
    layer: str = "cp",
    tied: bool = False,
    family: str | None = None,
) -> RegionGraph:
    """Blocks of pixels in halves (rows, then columns) or in quarters.

    Args:
        image_shape: (height, width) or (height, width, channels); the channels of a pixel are
            independent given its unit.
        num_states: K, units of every block.
        num_splits: 2 or 4 parts of a block.
        num_input_units: units of every input; default K.
        layer: cp, monarch, or (in halves) tucker.
        tied: whether blocks of equal size share parameters, and all pixels their distributions.
        family: of the inputs.

    Raises:
        StructureError: naming the argument that does not fit.
    """
    if num_splits not in (2, 4):
        raise StructureError(
            "a quad-tree has another number of splits",
            where="num_splits",
            found=num_splits,
            expected="2 or 4",
        )
    return _circuit(
        image_shape,
        _quarters if num_splits == 4 else lambda block: _halves(block)[:1],
        num_states,
        num_input_units=num_input_units,
        layer=layer,
        tied=tied,
        family=family,
    )


def quad_graph(
    image_shape: Sequence[int],
    num_states: int,
    *,
    num_input_units: int | None = None,
    layer: str = "cp",
    tied: bool = False,
    family: str | None = None,
) -> RegionGraph:
    """Blocks of pixels in halves both ways, mixed: rows then columns, and columns then rows.

    Args and errors: as of `quad_tree`.
    """
    return _circuit(
        image_shape,
        _halves,
        num_states,
        num_input_units=num_input_units,
        layer=layer,
        tied=tied,
        family=family,
    )


def _circuit(
    image_shape: Sequence[int],
    split: Callable[[Rectangle], list[tuple[Rectangle, ...]]],
    num_states: int,
    **options: Any,
) -> RegionGraph:
    height, width, channels = check_image(image_shape)
    root = Rectangle(0, 0, height, width)
    splits: dict[Rectangle, list[tuple[Rectangle, ...]]] = {}
    pending = [root]
    while pending:
        block = pending.pop()
        if block not in splits and (found := split(block)):
            splits[block] = found
            pending += [part for parts in found for part in parts]
    hierarchy = Hierarchy(
        root,
        splits,
        variables=lambda block: block.variables(width, channels),
        shape=lambda block: f"{block.height}x{block.width}",
        input_tie=lambda variable: f"pixel/{variable % channels}",
    )
    return partition_circuit(hierarchy, height * width * channels, num_states, **options)


def _cut(block: Rectangle) -> int:
    """Half of the least power of two that is not below the block's longer side."""
    return 1 << (max(block.height, block.width) - 1).bit_length() >> 1


def _halves(block: Rectangle) -> list[tuple[Rectangle, ...]]:
    """Row-wise and column-wise halves, as far as the block is longer than the cut."""
    cut = _cut(block)
    found: list[tuple[Rectangle, ...]] = []
    if cut and block.height > cut:
        found.append(block.cut_rows(cut))
    if cut and block.width > cut:
        found.append(block.cut_columns(cut))
    return found


def _quarters(block: Rectangle) -> list[tuple[Rectangle, ...]]:
    cut = _cut(block)
    rows: tuple[Rectangle, ...]
    rows = block.cut_rows(cut) if cut and block.height > cut else (block,)
    if cut and block.width > cut:
        rows = tuple(part for half in rows for part in half.cut_columns(cut))
    return [rows] if len(rows) > 1 else []
