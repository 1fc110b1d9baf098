"""Chow-Liu trees and independent variables, as circuits, on published figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from distpc.circuits import Circuit
from distpc.errors import StructureError
from distpc.structures import ChowLiuModel, Tree, factorised
from distpc.structures.chow_liu_circuit import chow_liu_circuit, chow_liu_tables

from .binary_data import needs_binary_data, read_binary
from .graphs import indicator_circuit


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def circuit_of(model: ChowLiuModel) -> Circuit:
    graph, tables = chow_liu_tables(model)
    circuit = indicator_circuit(graph)
    for region, table in tables.items():
        circuit.statistics_of(region)[:] = torch.from_numpy(table)
    circuit.rescale_to_uses_()
    return circuit


@needs_binary_data
@pytest.mark.parametrize(
    ("name", "expected"), [("nltcs", -6.7590), ("plants", -16.5240), ("bnetflix", -60.2503)]
)
def test_published_likelihoods_through_the_engine(name: str, expected: float) -> None:
    train, test = read_binary(name, "train"), read_binary(name, "test")
    batches = [train[start : start + 5000] for start in range(0, len(train), 5000)]
    model = ChowLiuModel.fit(batches, [2] * train.shape[1], pseudocount=1.0)
    circuit = circuit_of(model)
    log_prob = circuit.log_prob(test).double().numpy()
    assert log_prob.mean() == pytest.approx(expected, abs=1e-3)
    np.testing.assert_allclose(log_prob, model.log_prob(test), rtol=1e-6, atol=1e-4)


@needs_binary_data
@pytest.mark.parametrize(("name", "expected"), [("nltcs", -9.2336), ("plants", -31.2663)])
def test_published_likelihoods_of_independent_variables(name: str, expected: float) -> None:
    train, test = read_binary(name, "train"), read_binary(name, "test")
    ones = (train.sum(axis=0) + 2) / (len(train) + 4)
    circuit = Circuit(factorised(train.shape[1]), [2] * train.shape[1])
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "input":
            share = float(ones[region.variable])
            circuit.statistics_of(index)[:] = torch.tensor([1 - share, share])
    assert circuit.log_prob(test).double().mean().item() == pytest.approx(expected, abs=1e-3)


def test_values_of_several_sizes_and_missing_ones() -> None:
    rng = np.random.default_rng(0)
    sizes = [2, 4, 3, 2]
    rows = np.stack([rng.integers(0, size, 400) for size in sizes], axis=1)
    rows[:, 2] = (rows[:, 1] + rows[:, 3]) % 3
    rows[rng.random(rows.shape) < 0.1] = -1
    model = ChowLiuModel.fit(rows, sizes)
    circuit = circuit_of(model)
    worlds = np.array(list(itertools.product(*map(range, sizes))))
    exact = model.log_prob(worlds)
    assert np.exp(exact).sum() == pytest.approx(1.0)
    np.testing.assert_allclose(circuit.log_prob(worlds).numpy(), exact, rtol=1e-5)
    graph, _ = chow_liu_tables(model)
    assert graph.is_deterministic and graph.is_structured_decomposable


def test_categories_that_do_not_fit_are_refused() -> None:
    with pytest.raises(StructureError) as caught:
        chow_liu_circuit(Tree((-1, 0)), [2])
    assert caught.value.where == "num_categories"
    with pytest.raises(StructureError) as caught:
        chow_liu_circuit(Tree((-1, 0)), [2, 0])
    assert caught.value.where == "num_categories[1]"
