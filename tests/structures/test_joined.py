"""Joined trees, and patch circuits of given leaf circuits."""

import numpy as np
import pytest

from distpc.errors import StructureError
from distpc.structures import Tree
from distpc.structures.composed import composed_graph, top_graph
from distpc.structures.joined import joined_graph

CHAIN, STAR = Tree((-1, 0, 1)), Tree((-1, 0, 0))


def test_equal_trees_are_one_and_others_share_inputs_and_subtrees():
    one, two = joined_graph([CHAIN], 4, 3), joined_graph([CHAIN, CHAIN], 4, 3)
    assert [r.kind for r in one.regions] == [r.kind for r in two.regions]
    both = joined_graph([CHAIN, STAR], 4, 3)
    inputs = [region for region in both.regions if region.kind == "input"]
    assert len(inputs) == 3
    concat = next(region for region in both.regions if region.kind == "concat")
    assert concat.num_units == 8
    # The sum over the last variable's states is one, whoever hangs it up.
    over_last = [r for r in both.regions if r.kind == "sum" and r.children == (2,)]
    assert len(over_last) == 1
    assert both.regions[-2].latent == 0 and both.regions[-2].num_units == 3


@pytest.mark.parametrize(
    ("trees", "sizes", "named"),
    [
        ([], (2, 2), "trees"),
        ([CHAIN, Tree((-1,))], (2, 2), "trees"),
        ([CHAIN], (0, 2), "num_states"),
        ([CHAIN], (2, 0), "num_heads"),
    ],
)
def test_what_cannot_be_joined_is_named(trees, sizes, named):
    with pytest.raises(StructureError) as caught:
        joined_graph(trees, *sizes)
    assert caught.value.where == named


def test_composed_graphs_have_a_copy_a_patch_and_one_table_for_all():
    leaves = [joined_graph([CHAIN, STAR], 4, 3), joined_graph([CHAIN], 2, 2)]
    variables = np.array([[0, 1, 2], [5, 4, 3]])
    parts = composed_graph(variables, Tree((-1, 0)), leaves)
    graph = parts.graph
    owners = [region for region in graph.regions if region.latent is not None]
    assert [region.num_units for region in owners] == [5, 5]
    inputs = [(i, r) for i, r in enumerate(graph.regions) if r.kind == "input"]
    assert len(inputs) == 2 * (3 + 3)
    for index, region in inputs:
        number, source = parts.sources[index]
        patch = int(region.variable in (3, 4, 5))
        assert variables[patch, leaves[number].regions[source].variable] == region.variable
    ties = {region.tie for region in graph.regions if region.tie}
    expected = sum(r.kind in ("sum", "input") for leaf in leaves for r in leaf.regions[:-1])
    assert len(ties) == expected
    assert top_graph(Tree((-1, 0)), 5).num_latents == 2


def test_parts_that_do_not_fit_are_named():
    leaf = joined_graph([CHAIN], 2, 2)
    with pytest.raises(StructureError, match="node a patch"):
        composed_graph(np.arange(6).reshape(2, 3), Tree((-1,)), [leaf])
    with pytest.raises(StructureError, match="node a patch"):
        composed_graph(np.arange(6).reshape(2, 3), Tree((-1, 0)), [])
    with pytest.raises(StructureError) as caught:
        composed_graph(np.arange(4).reshape(2, 2), Tree((-1, 0)), [leaf])
    assert caught.value.where == "leaves[0]"
