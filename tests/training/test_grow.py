"""The loop that prunes, grows and fits, on small digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.errors import ConfigError
from distpc.structures.hclt import hclt
from distpc.training.fit import fit
from distpc.training.grow import grow_and_prune

SETTINGS = {"epochs": 6, "batch_size": 128, "final_step_size": 0.05}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Every other pixel of scikit-learn's digits in five grey values: (1000, 16), (797, 16)."""
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.int64)[:, 1::2, ::2].reshape(-1, 16) // 4
    images = images[np.random.default_rng(0).permutation(len(images))]
    return images[:1000], images[1000:]


def test_a_loop_improves_the_validation_likelihood() -> None:
    torch.set_num_threads(1)
    train, valid = digits()
    circuit = Circuit(hclt(train, 3, num_categories=[5] * 16), [5] * 16, seed=0)
    fit(circuit, train, valid=valid, progress=False, **SETTINGS)
    before = {name: value.clone() for name, value in circuit.state_dict().items()}
    grown = grow_and_prune(circuit, train, loops=2, fraction=0.3, valid=valid, **SETTINGS)
    start, first, second = grown.history
    assert min(first["bits"], second["bits"]) < start["bits"] - 0.01
    assert all(torch.equal(before[name], value) for name, value in circuit.state_dict().items())
    best = min(row["bits"] for row in grown.history)
    found = grown.circuit.log_prob(valid).double().mean().item() / 16 / -np.log(2)
    assert found == pytest.approx(best, abs=1e-5)
    assert start["edges"] < first["edges"] and start["parameters"] < first["parameters"]
    assert 0 < first["pruning_estimate"] <= first["pruning_bound"]


def test_no_loop_outgrows_its_bound() -> None:
    train, _ = digits()
    circuit = Circuit(hclt(train, 2, num_categories=[5] * 16), [5] * 16, seed=0)
    most = circuit.num_parameters
    grown = grow_and_prune(circuit, train[:200], fraction=0.0, epochs=1, max_parameters=most)
    assert grown.circuit is circuit and len(grown.history) == 1
    with pytest.raises(ConfigError, match="loops"):
        grow_and_prune(circuit, train, loops=0)
