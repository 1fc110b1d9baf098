"""Patch circuits of given leaf densities: circuits over one patch, put at every position of a grid.

A leaf circuit has one latent, its head, and each of its heads is a value of every patch's latent.
All that has parameters in it is shared by all positions. `patch_graph` is for banks of one shape;
here every leaf circuit is what learning its structure made of it.
Legend: Z patches, D variables of a patch, K heads of all leaf circuits together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree


@dataclass(frozen=True)
class Composed:
    """A composed patch circuit and where its parts came from.

    Attributes:
        graph: over all variables; latent i is patch i's.
        sources: of every region that is a copy, the number of the leaf circuit and of its region.
    """

    graph: RegionGraph
    sources: dict[int, tuple[int, int]]


def composed_graph(variables: np.ndarray, tree: Tree, leaves: Sequence[RegionGraph]) -> Composed:
    """The circuit whose patch latents choose among the heads of all leaf circuits.

    Args:
        variables: (Z, D) the variables of every patch, each variable once.
        tree: over the Z patches.
        leaves: over D variables each, their root mixing a product that carries latent 0.

    Raises:
        StructureError: parts that do not fit together.
    """
    if variables.ndim != 2 or len(variables) != tree.num_nodes or not len(leaves):
        raise StructureError(
            "a patch circuit's tree has a node a patch, and a leaf circuit at least",
            where="tree",
            found=f"{tree.num_nodes} nodes, variables of shape {variables.shape}, "
            f"{len(leaves)} leaf circuits",
        )
    for number, leaf in enumerate(leaves):
        if leaf.num_variables != variables.shape[1] or leaf.regions[-2].latent != 0:
            raise StructureError(
                "a leaf circuit is over the variables of a patch and names its head",
                where=f"leaves[{number}]",
                found=f"{leaf.num_variables} variables, {leaf.num_latents} latents",
                expected=f"{variables.shape[1]} variables, latent 0 below the root",
            )
    builder = GraphBuilder()
    sources: dict[int, tuple[int, int]] = {}
    emissions = []
    for row in variables.tolist():
        heads = [_copy(builder, row, leaf, n, sources) for n, leaf in enumerate(leaves)]
        emissions.append(heads[0] if len(heads) == 1 else builder.concat(heads))
    top = builder.hidden_tree(tree, emissions)
    return Composed(builder.finish(top, variables.size), sources)


def top_graph(tree: Tree, num_values: int) -> RegionGraph:
    """The part of a patch circuit above its leaves, as a circuit over the patch latents.

    Variable i is patch i's latent, seen by indicators: given soft evidence on it (see `Evidence`),
    the likelihoods of its patch under every leaf density, the circuit is the composed one.

    Args:
        tree: over the Z patches.
        num_values: K of every latent.
    """
    builder = GraphBuilder()
    inputs = [
        builder.input(num_values, patch, family="indicator") for patch in range(tree.num_nodes)
    ]
    return builder.finish(builder.hidden_tree(tree, inputs), tree.num_nodes)


def _copy(
    builder: GraphBuilder,
    variables: Sequence[int],
    leaf: RegionGraph,
    number: int,
    sources: dict[int, tuple[int, int]],
) -> int:
    """Put a leaf circuit over some variables; returns the region of its heads."""
    start = len(builder.regions)
    for index, region in enumerate(leaf.regions[:-1]):
        has_weights = region.kind in ("sum", "input")
        sources[start + index] = number, index
        builder.regions.append(
            replace(
                region,
                children=tuple(start + child for child in region.children),
                variable=None if region.variable is None else variables[region.variable],
                tie=f"leaf/{number}/{region.tie or index}" if has_weights else None,
                latent=None,
            )
        )
    return len(builder.regions) - 1
