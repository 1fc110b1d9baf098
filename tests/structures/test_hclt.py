import numpy as np

from distpc.structures import RegionGraph, Tree, hclt, hclt_graph
from distpc.structures.size import depth, num_parameters


def test_regions_of_a_small_tree():
    graph = hclt_graph(Tree((1, -1, 1)), 4)
    assert graph.num_variables == graph.num_latents == 3
    root = graph.regions[graph.root]
    top = graph.regions[root.children[0]]
    assert (top.kind, top.latent, top.num_units) == ("product", 1, 4)
    assert graph.regions[top.children[0]].variable == 1
    below = [graph.regions[graph.regions[child].children[0]].latent for child in top.children[1:]]
    assert below == [0, 2]
    assert graph.is_structured_decomposable
    assert RegionGraph.from_json(graph.to_json()).regions == graph.regions


def test_size():
    graph = hclt_graph(Tree.balanced(10), 4)
    assert num_parameters(graph, [2] * 9 + [5]) == 9 * 16 + 4 + 9 * 8 + 20
    assert num_parameters(graph, [None] * 10) == 9 * 16 + 4 + 10 * 12
    assert depth(graph) == 4


def test_from_data_follows_dependence():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 50, 3000)
    noise = rng.integers(0, 50, 3000)
    data = np.stack([first, noise, first + rng.integers(0, 3, 3000)], axis=1)
    graph = hclt(data, 8, max_samples=1000)
    scopes = {tuple(sorted(scope)) for scope in graph.scopes}
    assert (0, 2) in scopes or graph.regions[graph.regions[graph.root].children[0]].latent in (0, 2)
    assert hclt(data.astype(np.float32), 8).num_variables == 3


def test_deep_trees_need_no_recursion():
    graph = hclt_graph(Tree(tuple(range(-1, 1999))), 2)
    assert depth(graph) == 2000
