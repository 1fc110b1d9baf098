import json

import numpy as np
import pytest
from distill_runs import NUM_CLUSTERS, Runs, make_config

from distpc.data.index import ShardIndex
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError
from distpc.structures import PatchLayout, RegionGraph, Tree
from distpc.structures.size import num_parameters
from distpc.training import structure
from distpc.training.structure import sketch


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def read(ctx):
    folder = ctx.input("structure").path
    graph = RegionGraph.from_json(json.loads((folder / "region_graph.json").read_text()))
    return graph, json.loads((folder / "tree.json").read_text()), ctx.input("structure").metadata


def spec_of(ctx):
    return ShardIndex.load(ctx.input("index").path).spec


def distance(tree: Tree, columns: int) -> float:
    """Mean distance in the grid over the tree's edges."""
    places = np.stack(np.divmod(np.arange(tree.num_nodes), columns), axis=1)
    pairs = tree.edges()
    return float(np.abs(places[pairs[:, 0]] - places[pairs[:, 1]]).sum(1).mean())


def test_hclt_of_digits_links_neighbours(runs):
    hclt = {"structure": {"kind": "hclt", "num_states": 8}, "teacher": {"kind": "none"}}
    ctx = runs.variant("hclt", finetune={"initialization": "random"}, **hclt)
    graph, trees, facts = read(ctx)
    tree = Tree(tuple(trees["variables"]["parents"]))
    assert distance(tree, 8) < 2.5
    assert facts["num_parameters"] == num_parameters(graph, spec_of(ctx).num_categories)
    assert facts["num_regions"] == len(graph.regions)
    assert facts["tree_information_nats"]["variables"] > 10
    drawn = sketch(ctx.config, spec_of(ctx))
    assert num_parameters(drawn, spec_of(ctx).num_categories) == facts["num_parameters"]
    assert len(drawn.regions) == len(graph.regions)


@pytest.mark.parametrize("groups", [0, 2], ids=["product", "hclt leaves"])
def test_patch_circuit_of_digits(runs, groups):
    leaf = {"leaf": "hclt", "leaf_num_groups": groups, "leaf_num_states": 5} if groups else {}
    ctx = runs.variant(f"patches-{groups}", structure={"kind": "patches", **leaf})
    graph, trees, facts = read(ctx)
    layout = PatchLayout.of(graph)
    assert layout.tree == Tree(tuple(trees["patches"]["parents"]))
    assert layout.num_clusters == NUM_CLUSTERS
    assert distance(layout.tree, 4) < 1.6
    assert (layout.leaf is not None) == bool(groups)
    if layout.leaf is not None:
        assert layout.leaf.tree == Tree(tuple(trees["leaf"]["parents"]))
        assert layout.leaf.num_groups == 2
        assert distance(layout.leaf.tree, 2) == 1
    drawn = sketch(ctx.config, spec_of(ctx))
    assert num_parameters(drawn, spec_of(ctx).num_categories) == facts["num_parameters"]


def test_the_same_data_give_the_same_graph(runs):
    first, second = (runs.variant(name) for name in ("one", "two"))
    assert read(first)[0].regions == read(second)[0].regions


def test_structures_that_do_not_fit_are_refused():
    real = DatasetSpec("table", "array", 3, (2, None, 4))
    with pytest.raises(ConfigError) as caught:
        sketch(make_config(), real)
    assert caught.value.where == "structure.kind"
    image = DatasetSpec("images", "image", 16, (4,) * 16, image_shape=(4, 4, 1))
    many = make_config(structure={"leaf": "hclt", "leaf_num_groups": 40})
    with pytest.raises(ConfigError) as caught:
        structure.sketch(many, image)
    assert caught.value.where == "structure.leaf_num_groups"
    odd = make_config(data={"source": {"kind": "digits"}, "patch_size_pixels": 3})
    with pytest.raises(ConfigError):
        sketch(odd, image)
