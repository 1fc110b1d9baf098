"""MPE against every induced tree; approximate marginal MAP against every value."""

from __future__ import annotations

import math

import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.errors import EvidenceError
from distpc.structures.builder import GraphBuilder

from .graphs import SMALL, chain, random_evidence, shared_child, small_circuit
from .trees import enumerate_trees


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_mpe_is_the_best_of_all_trees(name: str) -> None:
    circuit = small_circuit(name, seed=3, noise=3.0)
    x, _ = random_evidence(circuit, 4, 5, missing=0.0)
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    observed[0] = True
    if circuit.num_variables < 7:
        observed[1] = False
    found = circuit.mpe(x, observed)
    assert found.x.dtype == torch.int64
    assert torch.equal(found.x[observed], x[observed])
    for row in range(len(x)):
        trees = enumerate_trees(circuit, torch.where(observed[row], x[row], -1))
        best, second = trees.log_prob.topk(2).values.tolist() if len(trees.log_prob) > 1 else (0, 0)
        top = int(trees.log_prob.argmax())
        assert float(found.log_prob[row]) == pytest.approx(float(trees.log_prob[top]), abs=1e-9)
        if best - second > 1e-6 or best == second == 0:
            assert torch.equal(found.x[row], trees.x[top].long())
            assert torch.equal(found.latents[row], trees.latents[top].long())


def test_mpe_does_not_depend_on_batches() -> None:
    circuit = small_circuit("tucker", noise=3.0)
    x, _ = random_evidence(circuit, 7, 1)
    from distpc.circuits import queries

    whole, single = queries.mpe(circuit, x), queries.mpe(circuit, x, batch_size=1)
    for a, b in zip(whole, single, strict=True):
        assert torch.equal(a, b)
    assert circuit.mpe(x[:0]).x.shape == (0, 4)
    again = circuit.mpe(whole.x)
    assert torch.equal(again.latents, whole.latents)
    torch.testing.assert_close(again.log_prob, whole.log_prob, rtol=0, atol=1e-12)


def test_ties_go_to_the_lowest_unit_and_category() -> None:
    circuit = Circuit(chain(3, 4), [3] * 3, init_noise=0.0)
    found = circuit.mpe(torch.full((2, 3), -1))
    assert (found.x == 0).all()
    assert (found.latents == 0).all()
    assert float(found.log_prob[0]) == pytest.approx(3 * math.log(1 / 4) + 3 * math.log(1 / 3))


def test_latents_that_a_completion_does_not_use_are_missing() -> None:
    builder = GraphBuilder()
    units = []
    for latent in (0, 1):
        factors = [builder.input(2, 0), builder.input(2, 1)]
        units.append(builder.product(factors, latent=latent))
    graph = builder.finish(builder.concat(units), 2)
    circuit = Circuit(graph, [2, 2], seed=1)
    latents = circuit.mpe(torch.tensor([[0, 1], [1, -1]])).latents
    assert ((latents == -1).sum(1) == 1).all()


def test_missing_real_variables_take_their_units_mean() -> None:
    builder = GraphBuilder()
    state = builder.product([builder.input(2, 0), builder.input(2, 1)], latent=0)
    circuit = Circuit(builder.finish(state, 2), [None, 2], seed=0)
    real = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 0)
    other = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 1)
    # Uses, sum and sum of squares: N(1, 0.25) and N(-2, 4).
    circuit.statistics_of(real)[:] = torch.tensor([[1.0, 1.0, 1.25], [1.0, -2.0, 8.0]])
    circuit.statistics_of(other)[:] = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
    circuit.statistics_of(circuit.graph.root)[:] = torch.tensor([[0.2, 0.8]])
    x = torch.tensor([[torch.nan, 1.0], [-2.5, torch.nan], [torch.nan, torch.nan]])
    found = circuit.mpe(x)
    assert found.x.tolist() == [[1.0, 1.0], [-2.5, 0.0], [-2.0, 0.0]]
    assert found.latents[:, 0].tolist() == [0, 1, 1]
    normal = torch.distributions.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]))
    expected = [
        math.log(0.2 * 0.7) + float(normal.log_prob(torch.tensor(1.0))[0]),
        math.log(0.8 * 0.9) + float(normal.log_prob(torch.tensor(-2.5))[1]),
        math.log(0.8 * 0.9) + float(normal.log_prob(torch.tensor(-2.0))[1]),
    ]
    assert found.log_prob.tolist() == pytest.approx(expected, abs=1e-6)


def test_impossible_evidence_has_no_explanation() -> None:
    circuit = Circuit(chain(3, 2), [2] * 3)
    leaf = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 1)
    circuit.statistics_of(leaf)[:, 1] = 0.0
    x = torch.tensor([[0, 0, -1], [0, 1, -1]])
    assert circuit.mpe(x[:1]).x[0, 1] == 0
    with pytest.raises(EvidenceError, match="probability 0") as caught:
        circuit.mpe(x)
    assert "[1]" in str(caught.value)
    with pytest.raises(EvidenceError, match="probability 0"):
        circuit.marginal_map_approximate(x, None, [2])


def exact_marginal_map(circuit: Circuit, x: torch.Tensor, variables: list[int]) -> float:
    worlds = enumerate_worlds(tuple(circuit.num_categories[v] for v in variables))
    trials = x.repeat(len(worlds), 1)
    trials[:, variables] = worlds
    return float(log_prob_exact(circuit, trials).max())


def test_marginal_map_scores_exactly_and_from_below() -> None:
    circuit = small_circuit("two-splits", seed=2, noise=3.0)
    x, _ = random_evidence(circuit, 6, 1, missing=0.0)
    x[:, [0, 2, 3]] = -1
    few = circuit.marginal_map_approximate(x, None, [0, 3], num_candidates=1)
    many = circuit.marginal_map_approximate(x, None, [0, 3], num_candidates=40, seed=1)
    assert many.num_candidates == 40
    assert (many.log_prob >= few.log_prob).all()
    assert (many.x[:, 2] == -1).all()
    assert torch.equal(many.x[:, 1], x[:, 1])
    exact = log_prob_exact(circuit, many.x)
    torch.testing.assert_close(many.log_prob.double(), exact, rtol=1e-5, atol=1e-5)
    for row in range(len(x)):
        best = exact_marginal_map(circuit, x[row], [0, 3])
        # 40 samples of six worlds miss none that matters.
        assert float(many.log_prob[row]) == pytest.approx(best, abs=1e-5)


def test_coordinate_ascent_leaves_no_better_neighbour() -> None:
    circuit = Circuit(shared_child(), [4, 5, 6], seed=4, init_noise=4.0)
    x = torch.tensor([[-1, -1, -1], [-1, 3, -1]])
    found = circuit.marginal_map_approximate(x, None, [0, 2], num_candidates=1, num_sweeps=3)
    for row in range(len(x)):
        for variable, size in ((0, 4), (2, 6)):
            trials = found.x[row].repeat(size, 1)
            trials[:, variable] = torch.arange(size)
            assert log_prob_exact(circuit, trials).max() <= found.log_prob[row] + 1e-5


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"variables": []}, "known variables"),
        ({"variables": [9]}, "known variables"),
        ({"variables": [0], "num_candidates": 0}, "num_candidates"),
        ({"variables": [0], "num_sweeps": -1}, "num_sweeps"),
    ],
)
def test_marginal_map_refuses(arguments: dict, what: str) -> None:
    circuit = small_circuit("two-splits")
    with pytest.raises(EvidenceError) as caught:
        circuit.marginal_map_approximate(torch.full((1, 4), -1), None, **arguments)
    assert what in str(caught.value)
