"""Flows spread over neighbouring values: the kernel, the backward pass, and what it is good for."""

import numpy as np
import pytest
import torch

import distpc
from distpc.circuits import Circuit
from distpc.circuits.neighbours import neighbour_kernel
from distpc.errors import ConfigError
from distpc.structures import hclt_graph
from distpc.structures.tree import Tree
from distpc.training.start import smooth_over_neighbours


def test_kernel_is_a_gaussian_where_values_are_equally_frequent() -> None:
    kernel = neighbour_kernel(torch.full((64,), 100.0), 2.0).double()
    assert torch.equal(kernel, kernel.T) and bool((kernel >= 0).all())
    assert torch.allclose(kernel.sum(1), torch.ones(64, dtype=torch.float64), atol=1e-6)
    distance = torch.arange(64.0).double() - 30
    assert float((kernel[30] * distance.square()).sum()) == pytest.approx(4.0, rel=1e-3)


def test_kernel_leaves_values_of_a_mass_of_their_own_alone() -> None:
    counts = torch.full((64,), 100.0)
    counts[0] = 1e6
    kernel = neighbour_kernel(counts, 2.0)
    assert float(kernel[0, 0]) > 0.999
    assert float(kernel[1:, 0].max()) < 1e-6


def small_circuit(num_categories: int, num_states: int = 3) -> Circuit:
    return Circuit(hclt_graph(Tree.balanced(4), num_states), [num_categories] * 4, seed=1)


def is_input(name: str) -> bool:
    return not name.removeprefix("banks.").startswith("sum")


def flows(circuit: Circuit, x: torch.Tensor) -> dict[str, torch.Tensor]:
    circuit.zero_grad()
    (-circuit(x).sum() / len(x)).backward()
    return {name: p.grad.clone() for name, p in circuit.named_parameters() if p.grad is not None}


def test_backward_spreads_input_flows_and_nothing_else() -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(-1, 32, (50, 4)))
    circuit = small_circuit(32)
    before = flows(circuit, x)
    smooth_over_neighbours(circuit, [x], 1.5)
    after = flows(circuit, x)
    counts = torch.bincount(x[x >= 0], minlength=32)
    kernel = neighbour_kernel(counts, 1.5)
    for name, flow in before.items():
        if is_input(name):
            tables = flow.view(-1, 32, flow.shape[1])
            assert torch.allclose(after[name].view_as(tables), kernel @ tables, atol=1e-6)
            assert not torch.allclose(after[name], flow, atol=1e-4)
        else:
            assert torch.equal(after[name], flow)
    smooth_over_neighbours(circuit, [x], 0.0)
    assert all(torch.equal(flow, before[name]) for name, flow in flows(circuit, x).items())


def test_tables_of_other_sizes_keep_their_flows() -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (50, 4)))
    circuit = Circuit(hclt_graph(Tree.balanced(4), 3), [32, 32, 32, 5], seed=1)
    before = {v: circuit_flow(circuit, x, v) for v in range(4)}
    smooth_over_neighbours(circuit, [x], 1.5)
    assert torch.equal(circuit_flow(circuit, x, 3), before[3])
    assert not torch.allclose(circuit_flow(circuit, x, 0), before[0], atol=1e-4)


def circuit_flow(circuit: Circuit, x: torch.Tensor, variable: int) -> torch.Tensor:
    flows(circuit, x)
    (region,) = [i for i, r in enumerate(circuit.graph.regions) if r.variable == variable]
    bank, table = circuit.bank_of(region)
    return bank.statistics.grad[bank.table(table)].clone()


def test_few_samples_of_a_smooth_density_generalise_better() -> None:
    rng = np.random.default_rng(0)

    def draw(size: int) -> np.ndarray:
        level = rng.choice([15, 45], (size, 1))
        return np.clip(np.rint(level + rng.normal(0, 4, (size, 4))), 0, 63).astype(np.int64)

    train, test = draw(300), torch.from_numpy(draw(2000))
    nats = {}
    for width in (0.0, 2.0):
        circuit = small_circuit(64, num_states=2)
        distpc.fit(circuit, train, epochs=20, batch_size=100, leaf_width=width, progress=False)
        nats[width] = float(circuit.log_prob(test).mean())
    assert nats[2.0] > nats[0.0] + 0.1


@pytest.mark.parametrize("width", [-1.0, float("nan"), float("inf")])
def test_width_out_of_range_is_refused(width: float) -> None:
    with pytest.raises(ConfigError, match="leaf_width"):
        distpc.fit(small_circuit(4), np.zeros((3, 4), int), leaf_width=width)
