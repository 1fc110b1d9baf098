"""Mixtures of circuits of any structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import RegionGraph


def mixture(graphs: Sequence[RegionGraph]) -> RegionGraph:
    """One root unit that mixes the roots of several graphs over the same variables.

    The components share nothing: component i's latents come after those of the components before
    it, and its ties get the prefix "component/i/".

    Args:
        graphs: at least one.

    Raises:
        StructureError: no graphs, or graphs over different numbers of variables.
    """
    sizes = [graph.num_variables for graph in graphs]
    if len(set(sizes)) != 1:
        raise StructureError(
            "a mixture's components are over the same variables",
            where="graphs",
            found=f"graphs over {sizes} variables",
            expected="at least one graph, all over equally many variables",
        )
    builder = GraphBuilder()
    roots = []
    latents = 0
    for number, graph in enumerate(graphs):
        start = len(builder.regions)
        for region in graph.regions:
            builder.regions.append(
                replace(
                    region,
                    children=tuple(start + child for child in region.children),
                    tie=None if region.tie is None else f"component/{number}/{region.tie}",
                    latent=None if region.latent is None else latents + region.latent,
                )
            )
        latents += graph.num_latents
        roots.append(len(builder.regions) - 1)
    return builder.finish(builder.concat(roots), sizes[0])
