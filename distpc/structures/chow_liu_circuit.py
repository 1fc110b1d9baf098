"""Chow-Liu trees as deterministic circuits: indicators of the values, tables on the edges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.chow_liu import ChowLiuModel
from distpc.structures.determinism import INDICATOR
from distpc.structures.layers import check_size
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree


def chow_liu_circuit(tree: Tree, num_categories: Sequence[int]) -> RegionGraph:
    """The region graph of a tree-shaped distribution.

    Unit k of variable v's region says "v is k": an indicator times, for each child in the tree,
    row k of the child's conditional probability table, which is the sum on that edge. The root
    unit's weights are the root's distribution.

    Args:
        tree: over the V variables.
        num_categories: (V,) number of values of each.

    Raises:
        StructureError: categories that do not fit the tree.
    """
    if len(num_categories) != tree.num_nodes:
        raise StructureError(
            "a tree's nodes and the variables' categories differ in number",
            where="num_categories",
            found=f"{len(num_categories)} entries",
            expected=f"{tree.num_nodes}, one a node",
        )
    builder = GraphBuilder()
    indicators = []
    for variable, categories in enumerate(num_categories):
        units = check_size(f"num_categories[{variable}]", categories)
        indicators.append(builder.input(units, variable, family=INDICATOR))
    return builder.finish(builder.hidden_tree(tree, indicators, first_latent=None), tree.num_nodes)


def chow_liu_tables(model: ChowLiuModel) -> tuple[RegionGraph, dict[int, np.ndarray]]:
    """The circuit of a fitted tree, and the weights with which it has the tree's likelihoods.

    Write them with `circuit.statistics_of(region)[:] = table` for each, then
    `circuit.rescale_to_uses_()`.

    Returns:
        the region graph, and for every sum region its table, a row a unit: (values of the parent,
        values of the child), and (1, values of the root) for the root.
    """
    sizes = [0] * model.tree.num_nodes
    sizes[model.tree.root] = len(model.root_log_prob)
    for _, child in model.tree.edges().tolist():
        sizes[child] = model.conditional_log_probs[child].shape[1]
    graph = chow_liu_circuit(model.tree, sizes)
    # The variable that a region's units are values of: its own indicator's, below it.
    values_of: dict[int, int] = {}
    tables = {}
    for index, region in enumerate(graph.regions):
        if region.kind == "input":
            assert region.variable is not None
            values_of[index] = region.variable
        elif region.kind == "product":
            values_of[index] = values_of[region.children[0]]
        else:
            variable = values_of[region.children[0]]
            is_root = variable == model.tree.root
            logs = model.root_log_prob[None] if is_root else model.conditional_log_probs[variable]
            tables[index] = np.exp(logs)
    return graph, tables
