"""How one region's units become another's: the layers that builders of graphs can choose from."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder

Layer = Literal["cp", "tucker", "monarch"]
"""``cp``: every factor of a product goes through a dense matrix of its own; ``monarch``: through
two block-diagonal ones; ``tucker``: a dense matrix over all products of two factors' units."""


def check_size(name: str, value: object, least: int = 1) -> int:
    """A size as an int; what is no whole number of at least `least` is refused.

    Raises:
        StructureError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise StructureError(
            "a structure's size is wrong",
            where=name,
            found=repr(value),
            expected=f"a whole number of at least {least}",
        )
    return int(value)


def check_layer(layer: str, allowed: Sequence[str] = get_args(Layer)) -> None:
    """Refuse a layer that a structure does not have.

    Raises:
        StructureError: naming the argument.
    """
    if layer not in allowed:
        raise StructureError(
            "a structure has no such layer",
            where="layer",
            found=repr(layer),
            expected=", ".join(allowed),
        )


def mix(
    builder: GraphBuilder,
    layer: str,
    num_units: int,
    child: int,
    tie: str | None = None,
    blocks: int | None = None,
) -> int:
    """Mixtures of a region's units: a dense sum, or (layer monarch) two block-diagonal ones.

    Args:
        builder: that the regions are added to.
        layer: "cp" or "monarch".
        num_units: K', units of the result.
        child: the region that is mixed.
        tie: name of shared parameters.
        blocks: of a Monarch matrix; default: those that take the fewest weights.

    Raises:
        StructureError: blocks that do not fit.
    """
    if layer != "monarch":
        return builder.sum(num_units, child, tie)
    units = builder.regions[child].num_units
    if blocks is None:
        blocks = monarch_blocks(units, num_units)
    elif blocks < 1 or units % blocks or num_units % (units // blocks):
        raise StructureError(
            "blocks of a Monarch matrix do not fit its units",
            where="blocks",
            found=f"{blocks} blocks for a matrix of {num_units} x {units}",
            expected="a divisor of the columns whose quotient divides the rows",
        )
    return builder.monarch(num_units, child, blocks, tie)


def monarch_blocks(num_columns: int, num_rows: int) -> int:
    """The number of blocks with which a Monarch matrix has the fewest weights.

    Columns C, rows R and k blocks take C * C / k + k * R weights.
    """
    fitting = (
        k
        for k in range(1, num_columns + 1)
        if not num_columns % k and not num_rows % (num_columns // k)
    )
    return min(fitting, key=lambda k: num_columns * num_columns // k + k * num_rows)
