"""Choosing the family of inputs of a structure that is built already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph


def with_family(graph: RegionGraph, family: str | Sequence[str | None] | None) -> RegionGraph:
    """The same structure over inputs of another family.

    Args:
        graph: any structure.
        family: of all inputs, or a list of one for each variable; None: categorical, or Gaussian
            where the variable is real. The known ones are in `distpc.circuits.families`.

    Raises:
        StructureError: a list of another length than there are variables. Whether a family is
            known and fits its variable is checked when the circuit is built.
    """
    if family is None or isinstance(family, str):
        families = [family] * graph.num_variables
    else:
        families = list(family)
    if len(families) != graph.num_variables:
        raise StructureError(
            "the variables and their families differ in number",
            where="family",
            found=f"{len(families)} families",
            expected=f"one for each of {graph.num_variables} variables",
        )
    regions = [
        region if region.variable is None else replace(region, family=families[region.variable])
        for region in graph.regions
    ]
    return RegionGraph(regions, graph.num_variables)
