"""HMM, random binary, mixture; and determinism as the graph tells it."""

import pytest

from distpc.structures import Region, RegionGraph, hclt_graph, hmm, mixture, random_binary
from distpc.structures.layers import monarch_blocks
from distpc.structures.size import depth, num_parameters
from distpc.structures.tree import Tree


def test_an_hmm_is_a_chain_from_its_first_step():
    tied, own = hmm(5, 4), hmm(5, 4, tied=False)
    assert num_parameters(tied, [7] * 5) == 4 * 7 + 16 + 4
    assert num_parameters(own, [7] * 5) == 5 * 4 * 7 + 4 * 16 + 4
    assert tied.num_latents == 5 and depth(tied) == 5
    top = tied.regions[tied.regions[tied.root].children[0]]
    assert top.latent == 0 and tied.scopes[top.children[0]] == {0}


def test_a_monarch_transition_has_fewer_weights():
    graph = hmm(3, 64, layer="monarch")
    assert num_parameters(graph, [2] * 3) == 2 * 64 + 2 * 64 * 8 + 64
    chosen = hmm(3, 64, layer="monarch", blocks=16)
    assert num_parameters(chosen, [2] * 3) == 2 * 64 + 64 * 4 + 64 * 16 + 64


@pytest.mark.parametrize(
    ("columns", "rows", "blocks"), [(64, 64, 8), (16, 4, 8), (6, 6, 2), (7, 7, 1), (3, 4, 3)]
)
def test_blocks_of_monarch_matrices(columns, rows, blocks):
    assert monarch_blocks(columns, rows) == blocks


def test_random_halves_are_seeded_and_as_deep_as_asked():
    graph = random_binary(10, 3, num_repetitions=2, seed=1)
    assert graph.regions == random_binary(10, 3, num_repetitions=2, seed=1).regions
    assert graph.scopes != random_binary(10, 3, num_repetitions=2, seed=2).scopes
    sizes = {len(scope) for scope in random_binary(10, 3, max_depth=1).scopes}
    assert sizes == {1, 5, 10}
    assert random_binary(1, 3).num_variables == 1
    assert random_binary(10, 3, num_repetitions=1).is_structured_decomposable


def test_components_of_a_mixture_share_nothing():
    graph = mixture([hmm(3, 2), hmm(3, 2)])
    assert graph.num_latents == 6
    assert num_parameters(graph, [5] * 3) == 2 * num_parameters(hmm(3, 2), [5] * 3) + 2
    ties = {region.tie for region in graph.regions if region.tie}
    assert ties == {f"component/{i}/{name}" for i in (0, 1) for name in ("emission", "transition")}


def indicators(*variables_and_units):
    return [Region("input", k, variable=v, family="indicator") for v, k in variables_and_units]


def test_supports_are_compared_pair_by_pair():
    """All pairs of values are disjoint, though no one variable tells all of them apart."""
    inputs = indicators((0, 2), (1, 2))
    pairs = [*inputs, Region("kronecker", 4, (0, 1))]
    assert RegionGraph([*pairs, Region("sum", 1, (2,))], 2).is_deterministic
    # With x0 = x1 = 0 and x0 = x1 = 1 once more, two units are possible for the same values.
    twice = [*pairs, Region("product", 2, (0, 1)), Region("concat", 6, (2, 3))]
    assert not RegionGraph([*twice, Region("sum", 1, (4,))], 2).is_deterministic
    # Each in a block of its own, unit by unit, nothing is mixed.
    alone = Region("sum", 4, (2,), blocks=4)
    assert RegionGraph([*pairs, alone, Region("sum", 1, (3,))], 2).is_deterministic


def test_a_sum_over_all_values_restricts_nothing():
    any_value = [*indicators((0, 2)), Region("sum", 2, (0,)), *indicators((1, 2))]
    again = RegionGraph([*any_value, Region("product", 2, (1, 2)), Region("sum", 1, (3,))], 2)
    assert again.is_deterministic
    plain = [*any_value[:2], Region("input", 2, variable=1)]
    lost = RegionGraph([*plain, Region("product", 2, (1, 2)), Region("sum", 1, (3,))], 2)
    assert not lost.is_deterministic
    assert not hclt_graph(Tree((-1,)), 2).is_deterministic
