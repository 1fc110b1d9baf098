"""Sums in bfloat16: what is rounded, what is not."""

from __future__ import annotations

import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.structures.hclt import hclt_graph
from distpc.structures.tree import Tree
from distpc.training.fit import fit

from .graphs import SMALL, random_evidence, small_circuit


@pytest.mark.parametrize("name", sorted(SMALL))
def test_training_rounds_and_evaluation_does_not(name: str) -> None:
    circuit = small_circuit(name)
    circuit.set_smoothing(0.1, 0.1, 100)
    x, latents = random_evidence(circuit, 30, 1)
    exact = circuit(x, latents).detach()
    circuit.matmul_dtype = torch.bfloat16
    with torch.no_grad():
        assert torch.equal(circuit(x, latents), exact)
    rounded = circuit(x, latents)
    torch.testing.assert_close(rounded.detach(), exact, rtol=0, atol=0.01 * circuit.num_variables)


@pytest.mark.parametrize("num_states", [16, 256])
def test_flows_of_rounded_sums_stay_flows(num_states: int) -> None:
    """Rows are used as often as samples say, though rounded rows do not sum to one."""
    graph = hclt_graph(Tree((-1, 0, 1, 1)), num_states)
    circuit = Circuit(graph, [3] * 4, seed=1)
    circuit.matmul_dtype = torch.bfloat16
    x = torch.randint(0, 3, (64, 4), generator=torch.Generator().manual_seed(0))
    circuit(x).sum().backward()
    for bank in circuit.bank_list:
        tables = len(getattr(bank, "sizes", bank.statistics))
        assert bank.statistics.grad.sum().item() == pytest.approx(64.0 * tables, rel=0.01)


def test_training_in_bfloat16_ends_where_float32_does() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randint(0, 2, (600, 1), generator=generator)
    x = (torch.rand(600, 6, generator=generator) < 0.2 + 0.6 * hidden).long()
    likelihoods = []
    for dtype in (torch.float32, torch.bfloat16):
        circuit = Circuit(hclt_graph(Tree((-1, 0, 0, 1, 1, 2)), 8), [2] * 6, seed=0)
        circuit.matmul_dtype = dtype
        fit(circuit, x, epochs=10, batch_size=100, progress=False)
        likelihoods.append(circuit.log_prob(x).mean().item())
    assert likelihoods[1] == pytest.approx(likelihoods[0], abs=0.01)
