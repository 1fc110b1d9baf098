"""Entropies, mutual information and moments against enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from distpc.circuits import families
from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.circuits.inputs import CategoricalBank
from distpc.errors import EvidenceError
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import Region, RegionGraph

from .graphs import SMALL, chain, random_evidence, small_circuit
from .trees import enumerate_trees


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def entropy_of(log_prob: torch.Tensor) -> float:
    return float(torch.special.entr(log_prob.exp()).sum())


@pytest.mark.parametrize("name", sorted(SMALL))
def test_entropies_match_enumeration(name: str) -> None:
    circuit = small_circuit(name, seed=2, noise=3.0)
    found = circuit.entropy(num_samples=4000, seed=1)
    nothing = torch.full((circuit.num_variables,), -1)
    joint = entropy_of(enumerate_trees(circuit, nothing).log_prob)
    of_latents = entropy_of(enumerate_trees(circuit, nothing, sum_out=True).log_prob)
    truth = entropy_of(log_prob_exact(circuit, enumerate_worlds(circuit.num_categories)))
    assert found.joint == pytest.approx(joint, abs=1e-9)
    assert found.given_latents == pytest.approx(joint - of_latents, abs=1e-9)
    assert found.given_latents - 1e-9 <= truth <= found.joint + 1e-9
    assert (found.exact is None) == (name != "one-input")
    assert abs(found.estimate - truth) < 5 * found.standard_error
    assert 0 < found.standard_error < 0.1
    assert found.num_samples == 4000


def test_differential_entropies_of_real_variables() -> None:
    graph = RegionGraph([Region("input", 1, variable=0)], 1)
    circuit = Circuit(graph, [None], seed=1)
    mean, variance = circuit.weights_of(0, torch.float64)[0]
    found = circuit.entropy(num_samples=5000)
    expected = float(torch.distributions.Normal(mean, variance.sqrt()).entropy())
    assert found.exact == pytest.approx(expected, abs=1e-9)
    assert abs(found.estimate - expected) < 5 * found.standard_error
    alone = circuit.entropy()
    assert math.isnan(alone.estimate) and math.isnan(alone.standard_error)
    with pytest.raises(EvidenceError, match="number of samples"):
        circuit.entropy(num_samples=-1)


def with_indicators(monkeypatch) -> None:
    """The family of inputs whose unit k is category k, if this build has none of its own."""
    if "indicator" in families.FAMILIES:
        return

    class Bank(CategoricalBank):
        def weights(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.cat([torch.eye(size, dtype=dtype) for size in self.sizes])

        def forward(self, index, mask, in_logs=False):
            for table in range(len(self.sizes)):
                self.statistics.data[self.table(table)] = torch.eye(self.num_units)
            return super().forward(index, mask, in_logs)

    family = families.Family(
        lambda plan: Bank(plan.sizes, plan.num_units), units_are_categories=True
    )
    monkeypatch.setitem(families.FAMILIES, "indicator", family)


def chow_liu_chain(length: int) -> RegionGraph:
    """A Markov chain of ternary variables: the states are the values."""
    builder = GraphBuilder()
    state = builder.input(3, length - 1, family="indicator")
    for variable in reversed(range(length - 1)):
        leaf = builder.input(3, variable, family="indicator")
        state = builder.product([leaf, builder.sum(3, state)])
    return builder.finish(state, length)


def test_deterministic_circuits_have_an_exact_entropy(monkeypatch) -> None:
    with_indicators(monkeypatch)
    graph = chow_liu_chain(4)
    circuit = Circuit(graph, [3] * 4, seed=1, init_noise=2.0)
    truth = entropy_of(log_prob_exact(circuit, enumerate_worlds(circuit.num_categories)))
    found = circuit.entropy(num_samples=500)
    assert found.exact == pytest.approx(truth, abs=1e-6)
    assert found.given_latents == 0.0
    # One hidden layer above the values, and the choices are not seen any more.
    builder = GraphBuilder()
    builder.regions = list(graph.regions[:-1])
    above = builder.sum(2, len(graph.regions) - 2)
    assert not builder.finish(above, 4).is_deterministic


def test_determinism_is_structural() -> None:
    assert chow_liu_chain(3).is_deterministic
    assert not chain(3, 2).is_deterministic
    builder = GraphBuilder()
    pairs = builder.kronecker(
        builder.input(2, 0, family="indicator"), builder.input(2, 1, family="indicator")
    )
    # Pairs with one first value differ in the second; all four differ in neither alone.
    blocks = Region("sum", 2, (pairs,), blocks=2)
    regions = [*builder.regions, blocks, Region("sum", 1, (len(builder.regions),))]
    assert RegionGraph(regions, 2).is_deterministic
    builder = GraphBuilder()
    same = [builder.product([builder.input(2, 0, family="indicator")]) for _ in range(2)]
    assert not builder.finish(builder.concat(same), 1).is_deterministic


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"one-input"}))
def test_mutual_information_matches_enumeration(name: str) -> None:
    circuit = small_circuit(name, seed=5, noise=3.0)
    worlds = enumerate_worlds(circuit.num_categories)
    shares = log_prob_exact(circuit, worlds).exp()
    found = circuit.mutual_information()
    assert torch.equal(found, found.T)
    sizes = [int(size or 0) for size in circuit.num_categories]
    for i in range(circuit.num_variables):
        for j in range(circuit.num_variables):
            pair = torch.zeros(sizes[i], sizes[j], dtype=torch.float64)
            pair.index_put_((worlds[:, i], worlds[:, j]), shares, accumulate=True)
            entropies = [torch.special.entr(p).sum() for p in (pair.sum(0), pair.sum(1), pair)]
            expected = entropies[0] + entropies[1] - entropies[2]
            if i == j:
                expected = entropies[0]
            assert float(found[i, j]) == pytest.approx(float(expected), abs=2e-6)


def test_mutual_information_of_some_variables_in_small_batches() -> None:
    from distpc.circuits import queries

    circuit = small_circuit("hclt", seed=5, noise=3.0)
    leaf = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 4)
    circuit.statistics_of(leaf)[:, 2] = 0.0
    whole = circuit.mutual_information()
    assert whole.isfinite().all()
    some = queries.mutual_information(circuit, [4, 1], batch_size=1)
    torch.testing.assert_close(some, whole[[4, 1]][:, [4, 1]], rtol=0, atol=1e-6)
    assert circuit.mutual_information([]).shape == (0, 0)
    with pytest.raises(EvidenceError, match="twice"):
        circuit.mutual_information([1, 1])
    graph = RegionGraph([Region("input", 1, variable=0)], 1)
    with pytest.raises(EvidenceError, match="real variable"):
        Circuit(graph, [None]).mutual_information()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_moments_match_enumeration(name: str) -> None:
    circuit = small_circuit(name, seed=6, noise=3.0)
    x, _ = random_evidence(circuit, 4, 2, missing=0.0)
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    found = circuit.expectation(x, observed)
    worlds = enumerate_worlds(circuit.num_categories)
    log_prob = log_prob_exact(circuit, worlds)
    for row in range(len(x)):
        agree = ((worlds == x[row]) | ~observed[row]).all(1)
        shares = torch.softmax(torch.where(agree, log_prob, -torch.inf), 0).unsqueeze(1)
        mean = (shares * worlds).sum(0)
        variance = (shares * (worlds - mean).square()).sum(0)
        torch.testing.assert_close(found.mean[row].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.variance[row].double(), variance, rtol=1e-4, atol=1e-5)


def test_moments_of_a_mixture_of_gaussians_far_from_zero() -> None:
    builder = GraphBuilder()
    state = builder.product([builder.input(2, 0), builder.input(2, 1)])
    circuit = Circuit(builder.finish(state, 2), [None, 2], seed=0)
    circuit.standardise(torch.tensor([1e4, 0.0]), torch.tensor([2.0, 1.0]))
    x = torch.tensor([[torch.nan, 1.0], [10003.0, torch.nan]])
    found = circuit.expectation(x)
    real = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 0)
    table = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 1)
    mean, variance = circuit.weights_of(real, torch.float64).unbind(-1)
    share = circuit.weights_of(circuit.graph.root, torch.float64)[0]
    share = share * circuit.weights_of(table, torch.float64)[:, 1]
    share /= share.sum()
    expected = float(share @ mean)
    spread = float(share @ (variance + (mean - expected).square()))
    assert float(found.mean[0, 0]) == pytest.approx(expected, rel=1e-6)
    assert float(found.variance[0, 0]) == pytest.approx(spread, rel=1e-4)
    assert float(found.mean[1, 0]) == 10003.0
    assert float(found.variance[1, 0]) == 0.0
    with pytest.raises(EvidenceError, match="no such variable"):
        circuit.expectation(x, None, [2])
