"""What pruning may cost: bounds against the measured loss of likelihood."""

from __future__ import annotations

import math

import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import exact_weights, log_prob_exact
from distpc.circuits.transforms import (
    aggregate_flows,
    prune_edges,
    prune_states,
    pruning_bound,
)

from .graphs import SMALL, chain, exact_flows, small_circuit

UNTIED = ["hclt", "hub", "own-patches", "shared-child", "tucker", "two-splits"]
"""A sample uses each of their edges once at most."""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def without(circuit: Circuit, dropped: dict[int, torch.Tensor], x: torch.Tensor, renormalise: bool):
    """The judge's log-likelihoods with edges set to zero."""
    weights = {region: tensor.clone() for region, tensor in exact_weights(circuit).items()}
    for region, drop in dropped.items():
        weights[region][drop] = 0.0
        if renormalise:
            weights[region] /= weights[region].sum(-1, keepdim=True)
    return log_prob_exact(circuit, x, weights=weights)


@pytest.mark.parametrize("name", UNTIED)
def test_a_single_edge_costs_what_its_flow_says(name: str) -> None:
    """Without renormalising exactly -log(1 - F(x)) a sample; with it never more."""
    circuit = small_circuit(name, seed=1)
    x = circuit.sample(30, 2)
    full = log_prob_exact(circuit, x)
    flows = exact_flows(circuit, torch.sum, x)
    sums = [i for i, region in enumerate(circuit.graph.regions) if region.kind == "sum"]
    for number, region in enumerate(sums):
        drop = torch.zeros(circuit.weights_of(region).shape, dtype=torch.bool)
        drop.view(-1)[(7 * number + 1) % drop.numel()] = True
        if not (~drop).any(-1).all():
            continue
        found = pruning_bound(circuit, {region: drop}, x, batch_size=16)
        exact = (full - without(circuit, {region: drop}, x, False)).mean().item()
        assert found.bound == pytest.approx(exact, rel=1e-4, abs=1e-6)
        assert found.estimate == pytest.approx(flows[region][drop].sum().item() / 30, rel=1e-4)
        assert found.estimate <= found.bound
        loss = (full - without(circuit, {region: drop}, x, True)).mean().item()
        assert loss <= found.bound + 1e-6


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize(("seed", "smoothing"), [(0, 0.0), (1, 0.0), (2, 2.0)])
def test_many_edges_cost_at_most_the_bound(name: str, seed: int, smoothing: float) -> None:
    circuit = small_circuit(name, seed, noise=3.0)
    circuit.set_smoothing(smoothing, smoothing, 100)
    x = circuit.sample(60, seed)
    flows = aggregate_flows(circuit, x)
    for rule in ({"fraction": 0.15}, {"threshold": 0.01}):
        pruned = prune_edges(circuit, flows, **rule)
        bound = pruning_bound(circuit, pruned.dropped, x)
        full = log_prob_exact(circuit, x)
        loss = (full - log_prob_exact(pruned.circuit, x)).mean().item()
        assert loss <= bound.bound + 1e-6
        assert pruned.estimate == pytest.approx(bound.estimate, rel=1e-4, abs=1e-7)
        assert bound.estimate <= bound.bound + 1e-9
        if not smoothing:
            again = (full - without(circuit, pruned.dropped, x, True)).mean().item()
            assert loss == pytest.approx(again, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["hclt-2", "tied-patches", "two-splits", "tied-tucker"])
def test_states_cost_at_most_the_bound(name: str) -> None:
    circuit = small_circuit(name, 3, noise=4.0)
    x = circuit.sample(60, 3)
    pruned = prune_states(circuit, aggregate_flows(circuit, x), fraction=0.35)
    bound = pruning_bound(circuit, pruned.dropped, x)
    loss = (log_prob_exact(circuit, x) - log_prob_exact(pruned.circuit, x)).mean().item()
    assert 0 < bound.estimate <= bound.bound
    assert loss <= bound.bound + 1e-6
    assert pruned.estimate == pytest.approx(bound.estimate, rel=1e-4)


def test_an_edge_that_every_sample_needs_has_no_finite_bound() -> None:
    circuit = Circuit(chain(2), [2, 2])
    root = circuit.graph.root
    drop = torch.tensor([[True, False]])
    circuit.statistics_of(root)[:] = torch.tensor([[1.0, 0.0]])
    x = circuit.sample(10, 0)
    assert pruning_bound(circuit, {root: drop}, x).bound == math.inf


def test_samples_of_the_log_domain_count_alike(monkeypatch) -> None:
    circuit = small_circuit("two-splits", 5)
    x = circuit.sample(20, 1)
    dropped = prune_edges(circuit, aggregate_flows(circuit, x), fraction=0.3).dropped
    expected = pruning_bound(circuit, dropped, x)
    monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
    monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)
    found = pruning_bound(circuit, dropped, x)
    assert found.bound == pytest.approx(expected.bound, rel=1e-5)
    assert aggregate_flows(circuit, x).nodes[-1].item() == pytest.approx(20, rel=1e-5)
