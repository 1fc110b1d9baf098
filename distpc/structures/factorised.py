"""Independent variables: the plainest baseline."""

from __future__ import annotations

from distpc.structures.builder import GraphBuilder
from distpc.structures.layers import check_size
from distpc.structures.region_graph import RegionGraph


def factorised(num_variables: int, *, tied: bool = False, family: str | None = None) -> RegionGraph:
    """One input unit a variable, and their product.

    Args:
        num_variables: V.
        tied: whether all variables have one distribution.
        family: of the inputs.

    Raises:
        StructureError: naming the argument that does not fit.
    """
    num_variables = check_size("num_variables", num_variables)
    builder = GraphBuilder()
    tie = "input" if tied else None
    inputs = [builder.input(1, variable, tie, family) for variable in range(num_variables)]
    if num_variables > 1:
        builder.product(inputs)
    return RegionGraph(builder.regions, num_variables)
