"""The same structure with more or fewer units, and with inputs that are shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from distpc.errors import StructureError
from distpc.structures.determinism import INDICATOR
from distpc.structures.layers import check_size
from distpc.structures.region_graph import Region, RegionGraph


def width_of(graph: RegionGraph) -> int:
    """The most units of an input or a sum: what builders call the number of states."""
    return max(r.num_units for r in graph.regions if r.kind in ("input", "sum"))


def with_num_states(graph: RegionGraph, num_states: int) -> RegionGraph:
    """The graph with another number of states, region by region.

    Inputs and sums of as many units as `width_of` get `num_states`, those of fewer units their
    share of it (rounded, at least 2), single units stay single. Mixing layers (as many blocks as
    units) follow.

    Args:
        graph: of any structure without Monarch layers and without indicator inputs.
        num_states: K, at least 2.

    Raises:
        StructureError: a region whose units cannot be other ones, a K below 2, or one of which
            groups of units cannot have whole shares.
    """
    num_states = check_size("num_states", num_states, 2)
    widest = width_of(graph)
    regions: list[Region] = []
    for index, region in enumerate(graph.regions):
        children = [regions[child].num_units for child in region.children]
        units = region.num_units
        if region.kind in ("input", "sum") and units > 1:
            units = max(2, round(units * num_states / widest))
        elif region.kind == "product":
            units = children[0]
        elif region.kind == "kronecker":
            units = math.prod(children)
        elif region.kind == "concat":
            units = sum(children)
        is_mixing = region.strided and region.blocks == region.num_units
        if (region.blocks > 1 and not is_mixing) or region.family == INDICATOR:
            raise StructureError(
                "a structure cannot have another number of states",
                where=f"region {index} ({region.kind})",
                found="units that are categories"
                if region.family == INDICATOR
                else f"a block-diagonal sum of {region.blocks} blocks",
                expected="dense sums and mixing layers, inputs of any number of units",
                fix="use layer cp or tucker, and a structure with latents",
            )
        blocks = units if region.blocks > 1 else 1
        regions.append(replace(region, num_units=units, blocks=blocks))
    try:
        return RegionGraph(regions, graph.num_variables)
    except StructureError as error:
        raise StructureError(
            "units of a structure cannot be scaled to that number of states",
            where="num_states",
            found=f"{num_states}: {error.where} would have {error.found}",
            expected=f"whole shares of all regions, as multiples of {widest} give",
        ) from error


def with_shared_inputs(graph: RegionGraph, num_categories: Sequence[int | None]) -> RegionGraph:
    """The graph in which inputs of one family, size and number of units are the same ones.

    Args:
        graph: of any structure.
        num_categories: of each variable.
    """

    def shared(region: Region) -> Region:
        if region.kind != "input" or region.variable is None:
            return region
        size = num_categories[region.variable]
        return replace(region, tie=f"shared/{region.family}/{size}/{region.num_units}")

    return RegionGraph([shared(region) for region in graph.regions], graph.num_variables)
