"""Traps of training sums by shards that no other test would notice."""

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.structures.hclt import hclt_graph
from distpc.structures.tree import Tree


def circuit_of(num_states: int = 6) -> Circuit:
    circuit = Circuit(hclt_graph(Tree.balanced(7), num_states), [3] * 7, max_fold_bytes=300)
    circuit.set_smoothing(0.1, 0.1, 100)
    return circuit


def test_sums_keep_statistics_and_no_weights_for_backward() -> None:
    """Weights kept by each sum would be the whole circuit on every rank under ZeRO 3."""
    circuit = circuit_of()
    statistics = {p.data_ptr() for name, p in circuit.named_parameters() if ".sum_" in name}
    shapes = {p.shape for name, p in circuit.named_parameters() if ".sum_" in name}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        circuit(torch.zeros(5, 7, dtype=torch.long))
    of_sums = [tensor for tensor in kept if tensor.shape in shapes]
    assert len(of_sums) == len(statistics) > 2
    assert {tensor.data_ptr() for tensor in of_sums} == statistics


def test_folds_are_bounded() -> None:
    """ZeRO 3 gathers a parameter as a whole."""
    circuit = circuit_of()
    sizes = [4 * p.numel() for name, p in circuit.named_parameters() if ".sum_" in name]
    assert max(sizes) <= 300 and len(sizes) > 2


def test_flows_are_linear_in_the_weights_of_samples() -> None:
    """Or weights of samples, and shares of uneven micro-batches, would vanish."""
    circuit = circuit_of()
    x = torch.randint(3, (6, 7), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 0.25])
    of_samples = []
    for sample in x:
        circuit.zero_grad()
        circuit(sample[None]).sum().backward()
        of_samples.append({n: p.grad.clone() for n, p in circuit.named_parameters()})
    circuit.zero_grad()
    (weights * circuit(x)).sum().backward()
    for name, parameter in circuit.named_parameters():
        expected = sum(w * flows[name] for w, flows in zip(weights, of_samples, strict=True))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)
