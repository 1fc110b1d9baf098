"""Patch circuits: one bank of leaf densities for all patches, under a tree over patch latents.

A patch's density given its latent value k is shared by all positions; a transition matrix an edge
of the tree links the latents. Region and tie names are read back by `PatchLayout`. Latents are
numbered patch by patch, 0 .. Z - 1; behind them come those inside of leaves, where they have a
name: Z + D * patch + d for variable d of a patch, one for all groups.
Legend: Z patches (and their latents), K clusters, D variables of a patch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.layers import check_size
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree


@dataclass(frozen=True)
class HcltLeaf:
    """Leaf densities as multi-head hidden Chow-Liu trees over a patch's variables.

    A body gives a vector of states for the patch; every cluster is a head, a mixture of them.

    Attributes:
        tree: over the D variables of a patch.
        num_states: hidden states of a body.
        num_groups: the clusters are cut into this many ranges with a body of their own.
        has_latents: whether the hidden state of each variable is a latent, which can be observed.
        emissions: (D,) number of each variable's emission table; variables of one number share it.
            Default: a table a variable.
    """

    tree: Tree
    num_states: int
    num_groups: int = 1
    has_latents: bool = False
    emissions: tuple[int, ...] | None = None

    @property
    def tables(self) -> tuple[int, ...]:
        """(D,) number of each variable's emission table."""
        return tuple(range(self.tree.num_nodes)) if self.emissions is None else self.emissions


def group_ranges(num_clusters: int, num_groups: int) -> list[range]:
    """Clusters of each group: consecutive, sizes differing by at most one.

    Raises:
        StructureError: more groups than clusters, or none.
    """
    if not 1 <= num_groups <= num_clusters:
        raise StructureError(
            "clusters cannot be cut into so many groups",
            where="num_groups",
            found=num_groups,
            expected=f"1 .. {num_clusters}",
        )
    edges = [num_clusters * group // num_groups for group in range(num_groups + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def patch_graph(
    variables: np.ndarray, tree: Tree, num_clusters: int, leaf: HcltLeaf | None = None
) -> RegionGraph:
    """The region graph of a patch circuit.

    Args:
        variables: (Z, D) the variables of every patch, each variable once.
        tree: over the Z patches.
        num_clusters: K, values of a patch latent.
        leaf: hidden Chow-Liu leaf densities; default: a product over the patch's variables.

    Raises:
        StructureError: patches, tree and clusters that do not fit together.
    """
    num_clusters = check_size("num_clusters", num_clusters)
    if variables.ndim != 2 or len(variables) != tree.num_nodes:
        raise StructureError(
            "a patch circuit's tree has a node a patch",
            where="tree",
            found=f"{tree.num_nodes} nodes, variables of shape {variables.shape}",
        )
    if leaf is not None and leaf.tree.num_nodes != variables.shape[1]:
        raise StructureError(
            "the tree inside a patch has a node a variable",
            where="leaf",
            found=f"{leaf.tree.num_nodes} nodes, {variables.shape[1]} variables a patch",
        )
    if leaf is not None and len(leaf.tables) != variables.shape[1]:
        raise StructureError(
            "every variable of a patch has an emission table",
            where="leaf.emissions",
            found=f"{len(leaf.tables)} tables, {variables.shape[1]} variables a patch",
        )
    builder = GraphBuilder()
    emissions = []
    for patch, row in enumerate(variables.tolist()):
        if leaf is None:
            inputs = [builder.input(num_clusters, v, f"leaf/{d}") for d, v in enumerate(row)]
            emissions.append(builder.product(inputs))
            continue
        first = variables.shape[0] + patch * variables.shape[1] if leaf.has_latents else None
        heads = [
            _heads(builder, row, leaf, group, len(clusters), first)
            for group, clusters in enumerate(group_ranges(num_clusters, leaf.num_groups))
        ]
        emissions.append(heads[0] if len(heads) == 1 else builder.concat(heads))
    return builder.finish(builder.hidden_tree(tree, emissions), variables.size)


def group_graph(leaf: HcltLeaf, group: int, num_heads: int) -> RegionGraph:
    """One group's leaf densities as a circuit over a single patch, its head the only latent.

    Given the head, this is the piece of a patch circuit that shares nothing with other groups;
    it carries the same ties.
    """
    builder = GraphBuilder()
    heads = _heads(builder, list(range(leaf.tree.num_nodes)), leaf, group, num_heads)
    return builder.finish(builder.product([heads], latent=0), leaf.tree.num_nodes)


def _heads(
    builder: GraphBuilder,
    variables: list[int],
    leaf: HcltLeaf,
    group: int,
    num_heads: int,
    first_latent: int | None = None,
) -> int:
    """Add one group's body over `variables` and its heads; returns the heads' region."""
    prefix = f"leaf/{group}"
    inputs = [
        builder.input(leaf.num_states, variable, f"{prefix}/emission/{table}")
        for variable, table in zip(variables, leaf.tables, strict=True)
    ]
    body = builder.hidden_tree(
        leaf.tree,
        inputs,
        first_latent=first_latent,
        transition_ties=[f"{prefix}/transition/{d}" for d in range(len(variables))],
    )
    return builder.sum(num_heads, body, f"{prefix}/heads")
