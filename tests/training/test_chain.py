"""Distillation of hidden Markov models: counts are the flows of the circuit given its states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.config.distillation import DistillConfig
from distpc.errors import ConfigError, StructureError
from distpc.structures.chain_layout import ChainLayout
from distpc.structures.hclt import hclt_graph
from distpc.structures.hmm import hmm
from distpc.structures.tree import Tree
from distpc.training.chain import assemble_chain_, count_chain

STEPS, STATES, TOKENS = 7, 5, 9
EXACT = DistillConfig(emission_noise=0.0, transition_noise=0.0, pseudocount=0.0)


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.integers(0, STATES, (300, STEPS))
    x = (z + rng.integers(0, TOKENS, z.shape)) % TOKENS
    x[:40, 4:], x[7, 2], x[8, 0] = -1, -1, -1
    return x, np.where(x < 0, -1, z)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_the_flows_of_the_circuit_under_its_states(tied: bool) -> None:
    x, z = data()
    x, z = x[40:], z[40:]  # whole chunks: an unseen step would have a posterior, not a count
    circuit = Circuit(hmm(STEPS, STATES, tied=tied), [TOKENS] * STEPS, seed=3)
    counts = count_chain(x, z, STATES, TOKENS, tied)
    assemble_chain_(circuit, counts, EXACT, seed=0)
    before = [p.detach().clone() for p in circuit.parameters()]
    (-circuit(torch.from_numpy(x), latents=torch.from_numpy(z)).sum() / len(x)).backward()
    for statistics, parameter in zip(before, circuit.parameters(), strict=True):
        torch.testing.assert_close(-parameter.grad, statistics, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_counting_is_counting(tied: bool) -> None:
    x, z = data()
    counts = count_chain(x, z, STATES, TOKENS, tied)
    start = np.zeros(STATES)
    pairs = np.zeros((1 if tied else STEPS - 1, STATES, STATES))
    tokens = np.zeros((1 if tied else STEPS, STATES, TOKENS))
    for row, states in zip(x, z, strict=True):
        for t in range(STEPS):
            if row[t] < 0:
                continue
            step = 0 if tied else t
            tokens[step, states[t], row[t]] += 1
            start[states[t]] += t == 0
            if t + 1 < STEPS and row[t + 1] >= 0:
                pairs[step, states[t], states[t + 1]] += 1
    assert np.array_equal(counts["start"], start)
    assert np.array_equal(counts["transitions"], pairs)
    assert np.array_equal(counts["emission"], tokens)
    assert int(counts["num_samples"]) == 300


def test_unused_states_get_random_rows_and_small_weight() -> None:
    x, z = data()
    circuit = Circuit(hmm(STEPS, STATES + 2), [TOKENS] * STEPS, seed=3)
    counts = count_chain(x, z, STATES + 2, TOKENS, True)
    assemble_chain_(circuit, counts, DistillConfig(), seed=0)
    layout = ChainLayout.of(circuit.graph)
    rows = circuit.statistics_of(layout.emissions[0])
    uses = counts["emission"][0].sum(1) / 300
    torch.testing.assert_close(rows.sum(1)[:STATES], uses[:STATES].float())
    assert (rows[STATES:].sum(1) > 0).all() and (rows[STATES:].sum(1) < 0.2).all()
    assert circuit.log_prob(x).isfinite().all()


def test_block_diagonal_transitions_stay_random() -> None:
    x, z = data()
    graph = hmm(STEPS, 16, layer="monarch")
    circuit, other = (Circuit(graph, [TOKENS] * STEPS, seed=3) for _ in range(2))
    assemble_chain_(circuit, count_chain(x, z, 16, TOKENS, True), DistillConfig(), seed=0)
    layout = ChainLayout.of(graph)
    for region in layout.transitions[0]:
        assert torch.equal(circuit.statistics_of(region), other.statistics_of(region))
    assert not torch.equal(circuit.statistics_of(0), other.statistics_of(0))


@pytest.mark.parametrize("layer", ["cp", "monarch"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_layout_is_read_back(tied: bool, layer: str) -> None:
    graph = hmm(5, 16, tied=tied, layer=layer)
    layout = ChainLayout.of(graph)
    assert (layout.num_states, layout.length, layout.is_tied) == (16, 5, tied)
    assert {len(between) for between in layout.transitions} == {1 if layer == "cp" else 2}
    assert [graph.regions[i].variable for i in layout.emissions] == list(range(5))


def test_other_graphs_are_no_chains() -> None:
    with pytest.raises(StructureError, match="no hidden Markov model"):
        ChainLayout.of(hclt_graph(Tree((-1, 0, 0)), 4))
    assert ChainLayout.find(hmm(1, 3)) is not None


def test_states_and_clusters_have_to_agree() -> None:
    from distpc.config import parse_config
    from distpc.data.spec import DatasetSpec
    from distpc.training.structure import check_fit

    values = {
        "name": "t",
        "data": {"source": {"kind": "text", "path": "x"}},
        "teacher": {"kind": "onehot"},
        "latents": {"num_clusters": 8},
        "structure": {"kind": "hmm", "num_states": 9, "tied": True},
    }
    config = parse_config(values, where="test")
    spec = DatasetSpec("t", "text", 4, (10,) * 4, tokens="tokens", end_token=9)
    check_fit(config, spec)
    with pytest.raises(ConfigError, match="a state a cluster"):
        check_fit(config, DatasetSpec("t", "text", 4, (10,) * 4, tokens="tokens"))
    with pytest.raises(ConfigError, match="teachers of text"):
        check_fit(config, DatasetSpec("t", "array", 4, (10,) * 4))
    for wrong in ({"teacher": {"kind": "none"}}, {"finetune": {"initialization": "random"}}):
        with pytest.raises(ConfigError, match="distilled from a teacher"):
            parse_config({**values, **wrong}, where="test")
