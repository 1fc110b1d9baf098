import numpy as np
import pytest

from distpc.data.patches import PatchGrid
from distpc.errors import StructureError
from distpc.structures import HcltLeaf, PatchLayout, RegionGraph, Tree, hclt_graph, patch_graph
from distpc.structures.patches import group_graph, group_ranges
from distpc.structures.size import num_parameters

VARIABLES = PatchGrid(4, 6, 1, 2).variables()
TREE = Tree((1, -1, 1, 0, 1, 2))
LEAF_TREE = Tree((-1, 0, 0, 1))


def test_product_leaves_are_shared_by_all_patches():
    graph = patch_graph(VARIABLES, TREE, 8)
    layout = PatchLayout.of(RegionGraph.from_json(graph.to_json()))
    assert layout.tree == TREE
    assert layout.num_clusters == 8
    assert layout.leaf is None
    np.testing.assert_array_equal(layout.variables, VARIABLES)
    assert sorted(layout.tied) == [f"leaf/{d}" for d in range(4)]
    assert num_parameters(graph, [17] * 24) == 4 * 8 * 17 + 5 * 64 + 8
    for patch, parent in enumerate(TREE.parents):
        assert graph.scopes[layout.emissions[patch]] == set(VARIABLES[patch].tolist())
        if parent >= 0:
            child = graph.regions[graph.regions[layout.transitions[patch]].children[0]]
            assert child.latent == patch


@pytest.mark.parametrize("num_groups", [1, 3])
def test_hclt_leaves_and_their_groups(num_groups):
    leaf = HcltLeaf(LEAF_TREE, 5, num_groups)
    graph = patch_graph(VARIABLES, TREE, 8, leaf)
    layout = PatchLayout.of(graph)
    assert layout.leaf == leaf
    assert layout.tree == TREE
    np.testing.assert_array_equal(layout.variables, VARIABLES)
    body = 4 * 5 * 17 + 3 * 25
    assert num_parameters(graph, [17] * 24) == num_groups * body + 8 * 5 + 5 * 64 + 8
    assert [len(clusters) for clusters in layout.groups] == ([8] if num_groups == 1 else [2, 3, 3])
    kind = graph.regions[layout.emissions[0]].kind
    assert kind == ("sum" if num_groups == 1 else "concat")


def test_a_groups_own_circuit_has_the_same_ties():
    leaf = HcltLeaf(LEAF_TREE, 5, 2)
    layout = PatchLayout.of(patch_graph(VARIABLES, TREE, 8, leaf))
    ties = set()
    for group, clusters in enumerate(layout.groups):
        piece = group_graph(leaf, group, len(clusters))
        assert piece.num_latents == 1
        assert piece.num_variables == 4
        ties |= {region.tie for region in piece.regions if region.tie}
    assert ties == set(layout.tied)


def test_one_variable_patches():
    graph = patch_graph(np.arange(3)[:, None], Tree((-1, 0, 0)), 4)
    assert PatchLayout.of(graph).variables.tolist() == [[0], [1], [2]]
    leaf = HcltLeaf(Tree((-1,)), 2, 2)
    assert (
        PatchLayout.of(patch_graph(np.arange(3)[:, None], Tree((-1, 0, 0)), 4, leaf)).leaf == leaf
    )


def test_ranges_cover_the_clusters():
    ranges = group_ranges(10, 3)
    assert [value for clusters in ranges for value in clusters] == list(range(10))
    with pytest.raises(StructureError):
        group_ranges(2, 3)


def test_other_graphs_have_no_layout():
    with pytest.raises(StructureError):
        PatchLayout.of(hclt_graph(Tree.balanced(4), 3))
