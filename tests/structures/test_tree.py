import numpy as np
import pytest

from distpc.errors import StructureError
from distpc.structures import Tree


def test_path_is_rooted_in_the_middle():
    tree = Tree.from_edges(7, [(node, node + 1) for node in range(6)])
    assert tree.root == 3
    assert tree.depth == 3
    assert tree.parents == (1, 2, 3, -1, 3, 4, 5)


def test_centre_has_least_depth_of_all_roots():
    rng = np.random.default_rng(1)
    edges = [(int(rng.integers(node)), node) for node in range(1, 40)]
    tree = Tree.from_edges(40, edges)
    found = {tuple(sorted(edge)) for edge in tree.edges().tolist()}
    assert found == {tuple(sorted(edge)) for edge in edges}
    neighbours = {node: set() for node in range(40)}
    for one, other in edges:
        neighbours[one].add(other)
        neighbours[other].add(one)

    def eccentricity(start):
        level, seen, count = {start}, {start}, -1
        while level:
            level = {other for node in level for other in neighbours[node]} - seen
            seen |= level
            count += 1
        return count

    assert tree.depth == min(map(eccentricity, range(40)))


def test_orders_and_children():
    tree = Tree((2, 2, -1, 0))
    assert tree.children == ((3,), (), (0, 1), ())
    assert tree.top_down == (2, 0, 1, 3)
    assert tree.edges().tolist() == [[2, 0], [2, 1], [0, 3]]
    assert Tree.balanced(7).depth == 2
    assert Tree((-1,)).edges().shape == (0, 2)


@pytest.mark.parametrize(
    "parents", [(1, 0), (-1, -1), (-1, 5), (-1, 2, 1)], ids=["no root", "two", "range", "cycle"]
)
def test_no_tree_is_refused(parents):
    with pytest.raises(StructureError):
        Tree(parents)


def test_edges_that_are_no_tree_are_refused():
    with pytest.raises(StructureError):
        Tree.from_edges(3, [(0, 1)])
    with pytest.raises(StructureError):
        Tree.from_edges(4, [(0, 1), (1, 2), (2, 0)])
