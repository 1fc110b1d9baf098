"""Quad-trees, quad-graphs and Poon-Domingos circuits over images."""

import itertools

import pytest

from distpc.structures import poon_domingos, quad_graph, quad_tree
from distpc.structures.images import Rectangle
from distpc.structures.size import depth, num_parameters


def rectangles(graph, width):
    """(height, width) of the bounding boxes of all scopes."""
    found = set()
    for scope in graph.scopes:
        rows, columns = {v // width for v in scope}, {v % width for v in scope}
        size = (max(rows) - min(rows) + 1, max(columns) - min(columns) + 1)
        assert size[0] * size[1] == len(scope), "a scope is a rectangle"
        found.add(size)
    return found


def test_regions_of_a_square_image():
    halves, quarters = quad_tree((4, 4), 3), quad_tree((4, 4), 3, num_splits=4)
    assert rectangles(halves, 4) == {(4, 4), (2, 4), (2, 2), (1, 2), (1, 1)}
    assert rectangles(quarters, 4) == {(4, 4), (2, 2), (1, 1)}
    both = quad_graph((4, 4), 3)
    assert rectangles(both, 4) == {(4, 4), (2, 4), (4, 2), (2, 2), (1, 2), (2, 1), (1, 1)}
    # 16 pixels, 15 splits in two, a matrix for each part; a row for the root.
    assert num_parameters(halves, [5] * 16) == 16 * 3 * 5 + 30 * 9 + 3
    assert num_parameters(quarters, [5] * 16) == 16 * 3 * 5 + 20 * 9 + 3
    # Five squares split both ways, each with 2 x 2 halves split once: 30 splits and 5 mixings.
    assert num_parameters(both, [5] * 16) == 16 * 3 * 5 + 60 * 9 + 5 * 3 * 2 + 3
    assert depth(quarters) == 3


@pytest.mark.parametrize("build", [quad_tree, quad_graph])
@pytest.mark.parametrize("shape", [(7, 5, 1), (1, 6, 1), (5, 1, 2), (3, 4, 3), (1, 1, 1)])
def test_any_size_works_and_tied_blocks_share(build, shape):
    height, width, channels = shape
    size = height * width * channels
    own = num_parameters(build(shape, 3), [2] * size)
    tied = build(shape, 3, tied=True)
    assert tied.scopes[tied.root] == set(range(size))
    assert len({r.tie for r in tied.regions if r.kind == "input"}) == channels
    assert num_parameters(tied, [2] * size) <= own
    quarters = quad_tree(shape, 3, num_splits=4)
    assert quarters.scopes[quarters.root] == set(range(size))


def test_a_tied_quad_tree_does_not_grow_with_the_image():
    """Twice the side takes one level more, not four times the parameters."""
    sizes = [num_parameters(quad_tree((n, n), 4, tied=True), [2] * n * n) for n in (8, 16, 32)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 4 * 16


def test_poon_domingos_has_all_rectangles_of_the_grid():
    graph = poon_domingos((3, 2), 2, delta=1)
    boxes = {frozenset(scope) for scope in graph.scopes}
    spans = [(a, b) for n in (3, 2) for a, b in itertools.combinations(range(n + 1), 2)]
    rows, columns = spans[:6], spans[6:]
    every = {
        frozenset(Rectangle(top, left, bottom - top, right - left).variables(2, 1))
        for (top, bottom), (left, right) in itertools.product(rows, columns)
    }
    assert boxes == every
    # Cuts of h x w: (h - 1) + (w - 1) of each rectangle.
    products = sum((b - a - 1) + (d - c - 1) for (a, b), (c, d) in itertools.product(rows, columns))
    assert sum(region.kind == "product" for region in graph.regions) == products


def test_poon_domingos_limits():
    def products(graph):
        return sum(region.kind == "product" for region in graph.regions)

    whole = poon_domingos((8, 8), 2, delta=2)
    few = poon_domingos((8, 8), 2, delta=2, max_products=2)
    flat = poon_domingos((8, 8), 2, delta=2, max_depth=1)
    assert products(flat) < products(few) < products(whole)
    assert max(len(r.children) for r in few.regions if r.kind == "concat") == 2
    # One cut: the six lines through the image, and leaves of many pixels.
    assert len(flat.regions[flat.regions[flat.regions[-1].children[0]].children[0]].children) == 6
    assert rectangles(few, 8) >= {(8, 8), (4, 8), (8, 4)}
