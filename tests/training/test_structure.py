import json
from typing import get_args

import numpy as np
import pytest
from distill_runs import NUM_CLUSTERS, Runs, make_config

from distpc.circuits import Circuit
from distpc.config.schema import StructureConfig
from distpc.data.index import ShardIndex
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError
from distpc.structures import PatchLayout, RegionGraph, Tree
from distpc.structures.registry import STRUCTURES
from distpc.structures.size import num_parameters
from distpc.training import structure
from distpc.training.fit import fit
from distpc.training.samples import take_rows
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


WITHOUT_TEACHER = {"teacher": {"kind": "none"}, "finetune": {"initialization": "random"}}
KINDS = [
    {"kind": "factorised"},
    {"kind": "chow_liu"},
    {"kind": "hmm", "num_states": 3, "tied": True},
    {"kind": "hmm", "num_states": 4, "layer": "monarch"},
    {"kind": "quad_tree", "num_states": 3, "num_splits": 4},
    {"kind": "quad_graph", "num_states": 3, "num_input_units": 4, "layer": "tucker"},
    {"kind": "rat", "num_states": 3, "num_repetitions": 2, "max_depth": 3},
    {"kind": "poon_domingos", "num_states": 2, "delta_pixels": 4, "max_products": 2},
]


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: fields["kind"])
def test_every_kind_makes_the_graph_that_was_sketched(runs, fields):
    name = "-".join(map(str, fields.values()))
    ctx = runs.variant(name, structure=fields, **WITHOUT_TEACHER)
    graph, trees, facts = read(ctx)
    assert graph.num_variables == 64
    assert sorted(trees) == (["variables"] if fields["kind"] == "chow_liu" else [])
    drawn = sketch(ctx.config, spec_of(ctx))
    assert num_parameters(drawn, spec_of(ctx).num_categories) == facts["num_parameters"]


def test_a_quad_tree_learns_digits_through_the_stage(runs):
    fields = {"kind": "quad_tree", "num_states": 4, "tied": True}
    ctx = runs.variant("trained", structure=fields, **WITHOUT_TEACHER)
    graph, _, _ = read(ctx)
    index = ShardIndex.load(ctx.input("index").path)
    x = np.concatenate(list(take_rows(index, "train", 500)))
    circuit = Circuit(graph, index.spec.num_categories)
    before = circuit.log_prob(x).mean()
    fit(circuit, x, epochs=3, batch_size=100)
    assert circuit.log_prob(x).mean() > before + 1


def test_kinds_are_registered_and_fields_fit_them():
    kinds = get_args(StructureConfig.model_fields["kind"].annotation)
    assert set(kinds) == set(STRUCTURES) - {"mixture"}
    for fields, word in [
        ({"kind": "hmm", "layer": "tucker"}, "layer"),
        ({"kind": "quad_tree", "layer": "tucker", "num_splits": 4}, "num_splits"),
        ({"kind": "factorised", "layer": "monarch"}, "layer"),
        ({"kind": "hclt", "num_input_units": 3}, "num_input_units"),
        ({"kind": "chow_liu", "tied": True}, "tied"),
    ]:
        with pytest.raises(ConfigError, match=word):
            make_config(structure=fields, **WITHOUT_TEACHER)
    with pytest.raises(ConfigError, match=r"teacher\.kind"):
        make_config(structure={"kind": "hmm"}, finetune={"initialization": "random"})


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"kind": "quad_graph"}, "structure.kind"),
        ({"kind": "chow_liu"}, "structure.kind"),
        ({"kind": "hmm", "tied": True}, "structure.tied"),
    ],
)
def test_kinds_that_do_not_fit_the_data_are_refused(fields, where):
    real = DatasetSpec("table", "array", 3, (2, None, 4))
    with pytest.raises(ConfigError) as caught:
        sketch(make_config(structure=fields, **WITHOUT_TEACHER), real)
    assert caught.value.where == where


def test_patches_refuse_codebooks_of_their_own(runs):
    latents = {"num_clusters": NUM_CLUSTERS, "codebook": "per_position"}
    with pytest.raises(ConfigError, match="shares its leaves") as caught:
        runs.variant("own", latents=latents)
    assert caught.value.where == "latents.codebook"


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
