"""Joined hidden Chow-Liu trees: many densities over the same variables, of which trees are shared.

Every head is a mixture over the states of several hidden trees. Trees are united as region graphs:
inputs are shared by all, and so is every subtree that hangs alike in several trees. After Liu X. et
al., "Understanding the Distillation Process from Deep Generative Models to Tractable Probabilistic
Circuits" (ICML 2023), where a tree is learnt from the data of each head.
"""

from __future__ import annotations

from collections.abc import Sequence

from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.layers import check_size
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree


def joined_graph(trees: Sequence[Tree], num_states: int, num_heads: int) -> RegionGraph:
    """A circuit over D variables with one latent, the head.

    Args:
        trees: over the D variables, at least one; equal ones count once.
        num_states: K, hidden states a variable.
        num_heads: values of the latent.

    Raises:
        StructureError: trees of different sizes, none, or sizes below 1.
    """
    num_states, num_heads = check_size("num_states", num_states), check_size("num_heads", num_heads)
    sizes = [tree.num_nodes for tree in trees]
    if len(set(sizes)) != 1:
        raise StructureError(
            "joined trees are over the same variables",
            where="trees",
            found=f"trees of {sizes} nodes",
            expected="at least one tree, all of equally many nodes",
        )
    builder = GraphBuilder()
    inputs = [builder.input(num_states, variable) for variable in range(sizes[0])]
    states: dict[tuple[int, tuple[int, ...]], int] = {}
    sums: dict[int, int] = {}
    roots = list(dict.fromkeys(_add_tree(builder, tree, inputs, states, sums) for tree in trees))
    mixed = roots[0] if len(roots) == 1 else builder.concat(roots)
    heads = builder.sum(num_heads, mixed)
    return builder.finish(builder.product([heads], latent=0), sizes[0])


def _add_tree(
    builder: GraphBuilder,
    tree: Tree,
    inputs: Sequence[int],
    states: dict[tuple[int, tuple[int, ...]], int],
    sums: dict[int, int],
) -> int:
    """Add what of a tree is not there yet; returns the region of its root.

    Args:
        states: regions of all trees by variable and the regions below.
        sums: over those regions.
    """
    own: dict[int, int] = {}
    for node in reversed(tree.top_down):
        below = tuple(own[child] for child in tree.children[node])
        key = node, below
        if key not in states:
            for region in below:
                if region not in sums:
                    sums[region] = builder.sum(builder.regions[region].num_units, region)
            factors = [inputs[node], *(sums[region] for region in below)]
            states[key] = factors[0] if len(factors) == 1 else builder.product(factors)
        own[node] = states[key]
    return own[tree.root]
