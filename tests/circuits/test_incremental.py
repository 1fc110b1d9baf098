"""Conditionals of one variable after another, against the judge and the circuit's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.circuits.incremental import Incremental
from distpc.circuits.incremental_plan import depth_first_order, plan
from distpc.errors import EvidenceError
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import Region, RegionGraph

from .graphs import SMALL, chain, hclt, hub, random_evidence, small_circuit, tree_parents


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def forced(incremental: Incremental, x: Tensor) -> dict[int, Tensor]:
    """The conditionals that are shown while the values `x` (B, V) are revealed."""
    shown: dict[int, Tensor] = {}

    def choose(variable: int, distribution: Tensor) -> Tensor:
        shown[variable] = distribution
        return x[:, variable]

    incremental.run(len(x), choose)
    return shown


def chain_rule(shown: dict[int, Tensor], x: Tensor) -> Tensor:
    """Log-likelihoods (B,) from conditionals."""
    logs = [p.gather(1, x[:, v : v + 1]).squeeze(1).log() for v, p in shown.items()]
    return torch.stack(logs).sum(0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_conditionals_are_ratios_of_likelihoods(name: str, reverse: bool) -> None:
    circuit = small_circuit(name)
    x, _ = random_evidence(circuit, 7, seed=1, missing=0.0)
    order = depth_first_order(circuit.graph)
    # Backwards, subtrees are left half seen, and messages have to be computed anew.
    order = order[::-2] + order[-2::-2] if reverse else order
    incremental = Incremental(circuit, order)
    shown = forced(incremental, x)
    assert list(shown) == order
    observed = torch.zeros(circuit.num_variables, dtype=torch.bool)
    before = torch.zeros(len(x), dtype=torch.float64)
    for variable in order:
        observed[variable] = True
        size = circuit.num_categories[variable] or 0
        trials = x.repeat_interleave(size, 0)
        trials[:, variable] = torch.arange(size).repeat(len(x))
        joint = log_prob_exact(circuit, trials, observed).view(len(x), size)
        torch.testing.assert_close(
            shown[variable], (joint - before.unsqueeze(1)).exp(), atol=1e-12, rtol=1e-10
        )
        before = log_prob_exact(circuit, x, observed)
    torch.testing.assert_close(chain_rule(shown, x), before)


@pytest.mark.parametrize("name", ["hclt", "grouped-patches", "two-splits", "monarch"])
def test_conditionals_are_those_of_the_circuit(name: str) -> None:
    circuit = small_circuit(name, seed=3)
    x, _ = random_evidence(circuit, 5, seed=2, missing=0.0)
    incremental = Incremental(circuit)
    observed = torch.zeros(circuit.num_variables, dtype=torch.bool)
    for variable, found in forced(incremental, x).items():
        expected = circuit.conditional(x, observed, [variable])[:, 0]
        torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-5)
        observed[variable] = True


def test_missing_values_are_summed_out() -> None:
    circuit = small_circuit("hclt")
    x, _ = random_evidence(circuit, 20, seed=4, missing=0.4)
    incremental = Incremental(circuit)
    shown = forced(incremental, x)
    last = incremental.order[-1]
    observed = x >= 0
    observed[:, last] = False
    expected = circuit.conditional(x, observed, [last])[:, 0]
    torch.testing.assert_close(shown[last].float(), expected, atol=1e-6, rtol=1e-5)


def test_a_chain_needs_one_product_a_step_and_a_tree_at_most_two() -> None:
    steps = plan(chain(50), list(range(50)))
    assert max(Counter((s.kind, s.region) for s in steps).values()) == 1
    graph = hclt(tree_parents(60, 3), 2)
    steps = plan(graph, depth_first_order(graph))
    counts = Counter((step.kind, step.region) for step in steps if step.kind != "extend")
    assert max(counts.values()) == 1
    sums = [s for s in steps if s.kind == "up" and graph.regions[s.region].kind == "sum"]
    assert len(sums) < 60
    assert sum(len(s.children) for s in steps if s.kind == "extend") <= len(graph.regions)


def test_few_messages_are_kept_at_once() -> None:
    graph = hclt(tree_parents(200, 3), 2)
    kept = most = 1
    for step in plan(graph, depth_first_order(graph)):
        kept += step.kind in ("down", "up")
        most = max(most, kept)
        kept -= len(step.frees)
    assert kept == 0
    assert most < 60


@pytest.mark.parametrize("graph", [chain(300, 2, tied=True), hub(100, 3)], ids=["chain", "hub"])
def test_deep_chains_and_large_hubs(graph: RegionGraph) -> None:
    circuit = Circuit(graph, [2] * graph.num_variables, seed=1)
    x = torch.randint(0, 2, (2, graph.num_variables), generator=torch.Generator().manual_seed(0))
    found = chain_rule(forced(Incremental(circuit), x), x)
    torch.testing.assert_close(found, log_prob_exact(circuit, x))


def test_impossible_values_are_passed_over() -> None:
    circuit = small_circuit("tied-chain")
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "input":
            circuit.statistics_of(index)[:, 2] = 0.0
    x = torch.tensor([[0, 2, 1, 0, 1, 0], [0, 0, 1, 0, 1, 0]])
    shown = forced(Incremental(circuit), x)
    assert all((p[:, 2] == 0).all() and p.isfinite().all() for p in shown.values())
    torch.testing.assert_close(shown[0], shown[0].flip(0))
    last = Incremental(circuit).order[-1]
    observed = torch.ones(6, dtype=torch.bool)
    observed[[1, last]] = False
    expected = circuit.conditional(x, observed, [last])[0, 0]
    torch.testing.assert_close(shown[last][0].float(), expected, atol=1e-6, rtol=1e-5)


def test_after_underflow_distributions_are_uniform() -> None:
    builder = GraphBuilder()
    inputs = [builder.input(2, v) for v in range(20)]
    mixed = builder.sum(1, builder.product(inputs))
    last = builder.input(1, 20)
    circuit = Circuit(builder.finish(builder.product([mixed, last]), 21), [2] * 21)
    for index in inputs:
        circuit.statistics_of(index)[:] = torch.tensor([[1.0, 1.0], [1e-37, 1.0]])
    # Only the second unit counts, and it is e^1690 times less likely than the first.
    circuit.statistics_of(mixed)[:] = torch.tensor([[0.0, 1.0]])
    circuit.statistics_of(last)[:] = torch.tensor([[9.0, 1.0]])
    x = torch.zeros(1, 21, dtype=torch.int64)
    shown = forced(Incremental(circuit, range(21)), x)
    assert shown[19][0, 0] == pytest.approx(1e-37, rel=1e-5)
    assert shown[20].tolist() == [[0.5, 0.5]]


def test_equal_batches_give_equal_bits_whoever_chooses() -> None:
    circuit = small_circuit("hclt-2")
    incremental = Incremental(circuit)
    x, _ = random_evidence(circuit, 9, seed=0, missing=0.0)
    first, second = forced(incremental, x), forced(Incremental(circuit), x.clone())
    assert all(torch.equal(first[v], second[v]) for v in first)


def test_what_cannot_be_is_refused() -> None:
    real = Circuit(RegionGraph([Region("input", 1, variable=0)], 1), [None])
    with pytest.raises(EvidenceError, match="tables over categories"):
        Incremental(real)
    with pytest.raises(EvidenceError, match="every variable once"):
        Incremental(small_circuit("hub"), [0, 1, 1, 2, 3, 4, 5])
