"""Counted circuits: with all latents known, counts are what the exact judge maximises."""

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.config.distillation import DistillConfig
from distpc.errors import StructureError
from distpc.structures import HcltLeaf, PatchLayout, Tree, hclt_graph, patch_graph, quad_tree
from distpc.structures.composed import composed_graph
from distpc.structures.joined import joined_graph
from distpc.training.counting import assemble_counted_, count_tables, table_names

PURE = DistillConfig(emission_noise=0.0, transition_noise=0.0, pseudocount=0.0)
VARIABLES = np.array([[0, 1], [3, 2]])


def leaf_graph(**settings):
    leaf = HcltLeaf(Tree((-1, 0)), 3, has_latents=True, **settings)
    return patch_graph(VARIABLES, Tree((-1, 0)), 4, leaf)


GRAPHS = {
    "inner": leaf_graph(),
    "inner-groups": leaf_graph(num_groups=2),
    "inner-tied": leaf_graph(emissions=(0, 0)),
    "product": patch_graph(VARIABLES, Tree((1, -1)), 4),
    "hclt": hclt_graph(Tree((-1, 0, 0, 1)), 3),
}


def samples(circuit, number, seed=0):
    rng = np.random.default_rng(seed)
    x = np.stack([rng.integers(0, c, number) for c in circuit.num_categories], axis=1)
    latents = np.stack([rng.integers(0, k, number) for k in circuit.latent_sizes], axis=1)
    return x, latents


@pytest.mark.parametrize("name", GRAPHS)
def test_counts_are_flows_and_pieces_are_the_whole(name):
    circuit = Circuit(GRAPHS[name], [5, 5, 5, 5], seed=1)
    x, latents = samples(circuit, 60)
    x[:7, 2] = -1
    tables = count_tables(circuit.graph, circuit.num_categories, x, latents)
    parts = [count_tables(circuit.graph, circuit.num_categories, x[rows], latents[rows])
             for rows in (slice(20), slice(20, 60))]  # fmt: skip
    (-circuit(torch.from_numpy(x), latents=torch.from_numpy(latents)).sum() / len(x)).backward()
    flows = Circuit(circuit.graph, circuit.num_categories)
    for parameter, other in zip(flows.parameters(), circuit.parameters(), strict=True):
        parameter.data.copy_(-other.grad)
    for region, table in table_names(circuit.graph).items():
        assert torch.equal(parts[0][table] + parts[1][table], tables[table])
        expected = flows.statistics_of(region) * len(x)
        if circuit.graph.regions[region].kind == "input":
            # A missing value has a flow that is spread; only what was seen is counted.
            seen = tables[table].sum(-1) > 0
            known = (tables[table].sum(-1) - expected.sum(-1)).abs() < 0.5
            expected, counts = expected[seen & known], tables[table][seen & known]
        else:
            counts = tables[table]
        torch.testing.assert_close(counts.float(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", GRAPHS)
def test_assembled_counts_are_relative_frequencies_and_the_exact_judge_agrees(name):
    circuit = Circuit(GRAPHS[name], [3, 3, 3, 3], seed=1)
    x, latents = samples(circuit, 400)
    tables = count_tables(circuit.graph, circuit.num_categories, x, latents)
    assemble_counted_(circuit, tables, len(x), PURE, seed=0)
    expected = np.zeros(len(x))
    units = latents_of_tables(circuit, x, latents)
    for table, cells in units.items():
        counts = tables[table].double().numpy()
        weights = counts / counts.sum(-1, keepdims=True)
        for rows, own, column in cells:
            expected[rows] += np.log(weights[own, column])
    judged = log_prob_exact(circuit, torch.from_numpy(x), latents=torch.from_numpy(latents))
    np.testing.assert_allclose(judged, expected, rtol=1e-5, atol=1e-5)
    found = circuit.log_prob(torch.from_numpy(x), latents=torch.from_numpy(latents))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def latents_of_tables(circuit, x, latents):
    """For every table the cells that samples use, found by following them down from the root."""
    graph = circuit.graph
    names = table_names(graph)
    used = {}
    for sample in range(len(x)):
        pending = [(graph.root, 0)]
        while pending:
            index, unit = pending.pop()
            region = graph.regions[index]
            if region.kind == "input":
                used.setdefault(names[index], []).append((sample, unit, x[sample, region.variable]))
            elif region.kind == "product":
                pending += [(child, unit) for child in region.children]
            elif region.kind == "concat":
                for child in region.children:
                    if unit < graph.regions[child].num_units:
                        pending.append((child, unit))
                        break
                    unit -= graph.regions[child].num_units
            else:
                below = graph.regions[region.children[0]].latent
                value = int(latents[sample, below])
                used.setdefault(names[index], []).append((sample, unit, value))
                pending.append((region.children[0], value))
    return used


def test_states_without_samples_keep_small_random_rows():
    circuit = Circuit(GRAPHS["inner"], [3, 3, 3, 3], seed=1)
    x, latents = samples(circuit, 50)
    latents[latents == 2] = 1
    tables = count_tables(circuit.graph, circuit.num_categories, x, latents)
    assemble_counted_(circuit, tables, len(x), DistillConfig(), seed=0)
    for region, table in table_names(circuit.graph).items():
        rows, counted = circuit.statistics_of(region).sum(-1), tables[table].sum(-1)
        assert (rows > 0).all()
        if (counted == 0).any() and (counted > 0).any():
            assert rows[counted == 0].max() < rows[counted > 0].max()
    assert torch.isfinite(circuit.log_prob(torch.from_numpy(x))).all()


@pytest.mark.parametrize(
    "graph",
    [
        quad_tree((2, 2), 2),
        patch_graph(VARIABLES, Tree((-1, 0)), 4, HcltLeaf(Tree((-1, 0)), 3)),
        composed_graph(VARIABLES, Tree((-1, 0)), [joined_graph([Tree((-1, 0))], 2, 2)]).graph,
        hclt_graph(Tree((-1, 0)), 4, layer="monarch"),
    ],
)
def test_circuits_with_hidden_units_are_refused(graph):
    with pytest.raises(StructureError, match="cannot be counted") as caught:
        count_tables(graph, [3] * graph.num_variables, np.zeros((2, graph.num_variables), int),
                     np.zeros((2, max(1, graph.num_latents)), int))  # fmt: skip
    assert "region" in caught.value.where


@pytest.mark.parametrize("groups", [1, 2])
def test_layouts_tell_latents_of_patches_from_those_inside(groups):
    leaf = HcltLeaf(Tree((1, -1, 1)), 3, groups, True, (0, 1, 0))
    graph = patch_graph(np.arange(9).reshape(3, 3), Tree((-1, 0, 1)), 4, leaf)
    layout = PatchLayout.of(graph)
    assert (layout.leaf, layout.num_patches, graph.num_latents) == (leaf, 3, 3 + 9)
    assert layout.variables.tolist() == np.arange(9).reshape(3, 3).tolist()
    with pytest.raises(StructureError) as caught:
        patch_graph(np.arange(9).reshape(3, 3), Tree((-1, 0, 1)), 4,
                    HcltLeaf(Tree((1, -1, 1)), 3, emissions=(0, 1)))  # fmt: skip
    assert caught.value.where == "leaf.emissions"
