"""What holds of every registered structure."""

import json
from dataclasses import replace

import numpy as np
import pytest

from distpc.errors import StructureError
from distpc.structures import HcltLeaf, RegionGraph, Tree, hmm
from distpc.structures.registry import STRUCTURES

SMALL = [(name, small) for name, entry in STRUCTURES.items() for small in entry.small]


def build(name, small, **changes):
    return STRUCTURES[name].build(**{**STRUCTURES[name].small[small], **changes})


@pytest.mark.parametrize(("name", "small"), SMALL)
def test_survives_json(name, small):
    graph = build(name, small)
    again = RegionGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again.regions == graph.regions
    assert again.num_variables == graph.num_variables
    assert again.is_structured_decomposable == graph.is_structured_decomposable
    assert again.is_deterministic == graph.is_deterministic


@pytest.mark.parametrize(("name", "small"), SMALL)
def test_is_made_the_same_way_twice_and_uses_every_region(name, small):
    graph = build(name, small)
    assert graph.regions == build(name, small).regions
    used = {child for region in graph.regions for child in region.children}
    assert used == set(range(graph.root))
    assert graph.is_smooth and graph.is_decomposable


@pytest.mark.parametrize(("name", "small"), SMALL)
def test_a_product_over_a_shared_variable_is_refused_by_its_number(name, small):
    """Point one input at another input's variable: some product above both is broken."""
    graph = build(name, small)
    if graph.num_variables == 1:
        return
    regions = [
        replace(region, variable=1) if region.variable == 0 else region for region in graph.regions
    ]
    with pytest.raises(StructureError) as caught:
        RegionGraph(regions, graph.num_variables)
    index = int(caught.value.where.split()[1])
    assert graph.regions[index].kind in ("product", "kronecker", "concat", "sum")
    assert caught.value.where == f"region {index} ({graph.regions[index].kind})"


def test_which_are_structured_and_deterministic():
    structured = {f"{n}/{s}" for n, s in SMALL if build(n, s).is_structured_decomposable}
    split_one_way = {"factorised", "chow_liu", "hclt", "hmm", "patches", "quad_tree"}
    assert structured == {
        *(f"{n}/{s}" for n, s in SMALL if n in split_one_way),
        "rat/monarch",  # one repetition
        "poon_domingos/bounded",
        "poon_domingos/coarse",
    }
    assert {n for n, s in SMALL if build(n, s).is_deterministic} == {"factorised", "chow_liu"}


@pytest.mark.parametrize(
    ("name", "small", "changes", "where"),
    [
        ("factorised", "own", {"num_variables": 0}, "num_variables"),
        ("hclt", "cp", {"num_states": 0}, "num_states"),
        ("hclt", "cp", {"layer": "tucker"}, "layer"),
        ("hmm", "tied", {"length": 2.5}, "length"),
        ("hmm", "monarch", {"blocks": 4}, "blocks"),
        ("patches", "product", {"num_clusters": 0}, "num_clusters"),
        ("patches", "product", {"tree": Tree((-1, 0, 1))}, "tree"),
        ("patches", "product", {"leaf": HcltLeaf(Tree((-1,)), 2)}, "leaf"),
        ("patches", "product", {"leaf": HcltLeaf(Tree((-1, 0)), 2, 9)}, "num_groups"),
        ("quad_tree", "halves", {"image_shape": (4, 0)}, "image_shape"),
        ("quad_tree", "halves", {"image_shape": (4,)}, "image_shape"),
        ("quad_tree", "halves", {"num_splits": 3}, "num_splits"),
        ("quad_tree", "tucker", {"num_splits": 4}, "layer"),
        ("quad_graph", "cp", {"layer": "dense"}, "layer"),
        ("quad_graph", "cp", {"num_input_units": 0}, "num_input_units"),
        ("rat", "cp", {"num_repetitions": 0}, "num_repetitions"),
        ("rat", "cp", {"max_depth": 0}, "max_depth"),
        ("poon_domingos", "cp", {"delta": 0}, "delta"),
        ("poon_domingos", "cp", {"max_products": 0}, "max_products"),
        ("poon_domingos", "cp", {"max_depth": -1}, "max_depth"),
        ("mixture", "of-three", {"graphs": []}, "graphs"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name, small, changes, where):
    with pytest.raises(StructureError) as caught:
        build(name, small, **changes)
    assert caught.value.where == where


def test_numpy_sizes_are_sizes():
    graph = hmm(np.int64(3), np.int32(2))
    assert json.dumps(graph.to_json()) == json.dumps(hmm(3, 2).to_json())


def test_json_that_is_no_graph_is_refused():
    good = build("hmm", "tied").to_json()
    for wrong in (
        [],
        {**good, "regions": 3},
        {**good, "regions": [{"kind": "input"}]},
        {**good, "regions": [{**good["regions"][0], "colour": "red"}]},
        {k: v for k, v in good.items() if k != "num_variables"},
        {**good, "regions": []},
        {**good, "format_version": 99},
    ):
        with pytest.raises(StructureError):
            RegionGraph.from_json(wrong)
