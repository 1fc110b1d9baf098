"""How large the circuit of a region graph will be, before any tensor exists."""

from __future__ import annotations

from collections.abc import Sequence

from distpc.structures.determinism import INDICATOR
from distpc.structures.region_graph import RegionGraph

GAUSSIAN_STATISTICS = 3
"""Entries of a Gaussian unit: expected use, first and second moment."""


def num_parameters(graph: RegionGraph, num_categories: Sequence[int | None]) -> int:
    """Entries of all parameter tensors; regions that share a tie count once.

    Args:
        num_categories: (V,) categories of each variable; None for a real one.
    """
    ties: set[str] = set()
    total = 0
    for index, region in enumerate(graph.regions):
        if region.kind not in ("input", "sum"):
            continue
        if region.tie is not None:
            if region.tie in ties:
                continue
            ties.add(region.tie)
        if region.kind == "sum":
            total += region.num_units * graph.fan_in(index)
        else:
            assert region.variable is not None
            if region.family == INDICATOR:
                continue
            categories = num_categories[region.variable]
            total += region.num_units * (GAUSSIAN_STATISTICS if categories is None else categories)
    return total


def depth(graph: RegionGraph) -> int:
    """Sum regions on the longest way from the root to an input: steps that must follow another."""
    depths: list[int] = []
    for region in graph.regions:
        below = max((depths[child] for child in region.children), default=0)
        depths.append(below + (region.kind == "sum"))
    return depths[-1]
