"""Poon-Domingos: rectangles of pixels cut in two at every line of a grid.

Poon and Domingos, "Sum-product networks: a new deep architecture", UAI 2011, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from distpc.structures.images import Rectangle, check_image
from distpc.structures.layers import check_size
from distpc.structures.partitions import Hierarchy, partition_circuit
from distpc.structures.region_graph import RegionGraph


def poon_domingos(
    image_shape: Sequence[int],
    num_states: int,
    *,
    delta: int = 4,
    max_products: int | None = None,
    max_depth: int | None = None,
    num_input_units: int | None = None,
    layer: str = "cp",
    tied: bool = False,
    family: str | None = None,
) -> RegionGraph:
    """All cuts of rectangles at rows and columns that are multiples of `delta`, mixed.

    Pixels of a rectangle that no line crosses are independent given its unit. Rectangles grow as
    (rows * columns / delta^2)^2: bound them by `delta` and `max_products`.

    Args:
        image_shape: (height, width) or (height, width, channels).
        num_states: K, units of every rectangle.
        delta: step of the grid in pixels.
        max_products: cuts kept of one rectangle, those nearest to its middle; default: all.
        max_depth: a rectangle that takes so many cuts to reach is not cut again; default: no
            limit.
        num_input_units: units of every input; default K.
        layer: see `Layer`.
        tied: whether rectangles of one size and the same cuts share parameters, and all pixels
            their distributions.
        family: of the inputs.

    Raises:
        StructureError: naming the argument that does not fit.
    """
    height, width, channels = check_image(image_shape)
    delta = check_size("delta", delta)
    if max_products is not None:
        max_products = check_size("max_products", max_products)
    if max_depth is not None:
        max_depth = check_size("max_depth", max_depth)
    root = Rectangle(0, 0, height, width)
    cuts = _all_cuts(root, delta, max_products, max_depth)
    splits: dict[Rectangle, list[tuple[Rectangle, ...]]] = {
        block: [
            block.cut_rows(offset) if axis == 0 else block.cut_columns(offset)
            for axis, offset in found
        ]
        for block, found in cuts.items()
    }
    hierarchy = Hierarchy(
        root,
        splits,
        variables=lambda block: block.variables(width, channels),
        shape=lambda block: _name(block, cuts[block]),
        input_tie=lambda variable: f"pixel/{variable % channels}",
    )
    return partition_circuit(
        hierarchy,
        height * width * channels,
        num_states,
        num_input_units=num_input_units,
        layer=layer,
        tied=tied,
        family=family,
    )


def _all_cuts(
    root: Rectangle, delta: int, max_products: int | None, max_depth: int | None
) -> dict[Rectangle, list[tuple[int, int]]]:
    """The cuts (axis, offset) of every rectangle below the root, breadth first."""
    cuts: dict[Rectangle, list[tuple[int, int]]] = {}
    level = {root}
    depth = 0
    while level and (max_depth is None or depth < max_depth):
        below: set[Rectangle] = set()
        for block in sorted(level):
            found = _cuts(block, delta)[:max_products]
            if not found:
                continue
            cuts[block] = found
            for axis, offset in found:
                below.update(block.cut_rows(offset) if axis == 0 else block.cut_columns(offset))
        level = below - cuts.keys()
        depth += 1
    return cuts


def _cuts(block: Rectangle, delta: int) -> list[tuple[int, int]]:
    """(axis, offset) of all lines through a rectangle, nearest to its middle first."""
    found = []
    for axis, (start, length) in enumerate(((block.top, block.height), (block.left, block.width))):
        first = (start // delta + 1) * delta
        for line in range(first, start + length, delta):
            offset = line - start
            found.append((abs(2 * offset - length) / length, axis, offset))
    return [(axis, offset) for _, axis, offset in sorted(found)]


def _name(block: Rectangle, cuts: Sequence[tuple[int, int]]) -> str:
    lines = ",".join(f"{'rc'[axis]}{offset}" for axis, offset in cuts)
    return f"{block.height}x{block.width}/{lines}"
