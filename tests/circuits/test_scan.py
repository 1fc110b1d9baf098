"""The scan of tied hidden Markov models against the compiled circuit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.structures.hclt import hclt_graph
from distpc.structures.hmm import hmm
from distpc.structures.tree import Tree
from distpc.training.fit import fit


def circuit(layer: str = "cp", states: int = 12, length: int = 7, seed: int = 1) -> Circuit:
    made = Circuit(hmm(length, states, layer=layer), [11] * length, seed=seed)
    made.set_smoothing(0.1, 0.1, 1000)
    return made


def texts(length: int = 7) -> Tensor:
    x = torch.randint(0, 11, (9, length), generator=torch.Generator().manual_seed(0))
    x[0, 3:], x[1, 2], x[2] = -1, -1, -1
    return x


def passed(model: Circuit, x: Tensor, scanned: bool) -> tuple[Tensor, list[Tensor]]:
    scan, weight = model.scan, torch.linspace(0.2, 1.7, len(x))
    assert scan is not None
    try:
        model.scan = scan if scanned else None
        model.zero_grad()
        found = model(x)
        (found * weight).sum().backward()
        return found.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    finally:
        model.scan = scan


@pytest.mark.parametrize(("layer", "states"), [("cp", 12), ("monarch", 16), ("monarch", 12)])
def test_likelihoods_and_flows_are_those_of_the_compiled_circuit(layer: str, states: int) -> None:
    model = circuit(layer, states)
    assert model.scan is not None and model.scan.is_exact()
    found, flows = passed(model, texts(), scanned=True)
    expected, expected_flows = passed(model, texts(), scanned=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)
    assert len(flows) == len(expected_flows) == len(list(model.parameters()))
    for flow, other in zip(flows, expected_flows, strict=True):
        torch.testing.assert_close(flow, other, rtol=1e-4, atol=1e-6)


def test_long_chunks_do_not_underflow() -> None:
    model = circuit(length=400)
    found, flows = passed(model, texts(400), scanned=True)
    expected, expected_flows = passed(model, texts(400), scanned=False)
    assert found.min() < -800
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for flow, other in zip(flows, expected_flows, strict=True):
        torch.testing.assert_close(flow, other, rtol=1e-3, atol=1e-4)


def test_impossible_texts_have_no_flow() -> None:
    model = circuit()
    model.set_smoothing(0.1, 0.0, 1000)
    model.statistics_of(0)[:, 4] = 0.0
    x = texts()
    x[:, 0] = 1
    x[4:, 2] = 4
    x[:4][x[:4] == 4] = 5
    found, flows = passed(model, x, scanned=True)
    assert found[4:].isneginf().all() and found[:4].isfinite().all()
    kept = torch.linspace(0.2, 1.7, len(x))[:4]
    model.zero_grad()
    (model(x[:4]) * kept).sum().backward()
    for flow, parameter in zip(flows, model.parameters(), strict=True):
        torch.testing.assert_close(flow, parameter.grad, rtol=1e-4, atol=1e-6)


def test_where_zeros_may_be_the_compiled_circuit_works() -> None:
    model = circuit()
    assert model.scan is not None
    model.set_smoothing(0.0, 0.0, 1)
    assert not model.scan.is_exact()
    model.set_smoothing(0.1, 0.1, 1000)
    model.matmul_dtype = torch.bfloat16
    assert not model.scan.is_exact()
    assert Circuit(hmm(5, 4, tied=False), [3] * 5).scan is None
    assert Circuit(hclt_graph(Tree((-1, 0, 0)), 4, tied=True), [3] * 3).scan is None


def test_training_gives_the_same_circuit() -> None:
    x = texts().clamp_min(0).repeat(4, 1)
    made = [circuit(), circuit()]
    made[1].scan = None
    for model in made:
        fit(model, x.numpy(), epochs=1, batch_size=12)
    for one, other in zip(*(model.parameters() for model in made), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_monarch_matrix_is_its_dense_twin() -> None:
    """At H = 64: likelihoods of the dense circuit whose matrix is the product of the two."""
    model = circuit("monarch", states=64)
    dense = circuit("cp", states=64)
    for bank in (*model.bank_list, *dense.bank_list):
        bank.set_smoothing(1e-6, 1)
    graph, twin = model.graph, dense.graph
    within, across = [i for i, r in enumerate(graph.regions) if r.kind == "sum" and r.blocks > 1][
        :2
    ]
    first, second = torch.zeros(64, 64), torch.zeros(64, 64)
    for matrix, region in ((first, within), (second, across)):
        rows = torch.arange(64)[:, None]
        matrix[rows, torch.from_numpy(graph.mixed_units(region))] = model.weights_of(region)
    product = second @ first
    sums = [i for i, r in enumerate(twin.regions) if r.kind == "sum"]
    dense.statistics_of(sums[0]).copy_(product)
    dense.statistics_of(sums[-1]).copy_(model.statistics_of(graph.root))
    dense.statistics_of(0).copy_(model.statistics_of(0))
    with torch.no_grad():
        torch.testing.assert_close(model(texts()), dense(texts()), rtol=0, atol=2e-4)
