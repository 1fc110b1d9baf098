"""Every family of inputs: against scipy, the judge and autograd; trained, sampled and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distpc import fit
from distpc.circuits import load_model, save_model
from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import RegionGraph

from .graphs import random_evidence


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tree(families: list[str | None], num_units: int, tied: bool = False) -> RegionGraph:
    """A hidden chain, one input of each family at every node; latents 0, 1, ..."""
    builder = GraphBuilder()
    below: list[int] = []
    for v, family in reversed(list(enumerate(families))):
        leaf = builder.input(num_units, v, tie=f"{family}" if tied else None, family=family)
        state = builder.product([leaf, *below], latent=v)
        below = [builder.sum(num_units, state)]
    return builder.finish(below[0], len(families))


def test_indicators_have_no_parameters_and_all_else_works(tmp_path: Path) -> None:
    circuit = Circuit(tree(["indicator", None, "indicator"], 3), [3, 2, 3], seed=1)
    worlds = enumerate_worlds(circuit.num_categories)
    assert circuit(worlds).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    x, latents = random_evidence(circuit, 40, 2)
    torch.testing.assert_close(
        circuit(x, latents).double(), log_prob_exact(circuit, x, latents=latents)
    )
    # A latent next to an indicator is what is observed.
    known = circuit.posterior(worlds)
    assert torch.equal(known[:, 0].argmax(-1), worlds[:, 0])
    groups = circuit.parameter_groups()
    assert groups["gradient"] == []
    assert sum(p.numel() for p in groups["em"]) == circuit.num_parameters
    assert circuit.num_parameters == 3 * 2 + 3 * 9 + 3
    before = circuit(x).detach()
    circuit.rescale_to_uses_()
    torch.testing.assert_close(circuit(x).detach(), before)
    history = fit(circuit, circuit.sample(200, seed=3), epochs=3, progress=False)
    assert history[-1]["train_bits"] < history[0]["train_bits"] + 0.01
    save_model(circuit, tmp_path, dataset={}, training={})
    assert torch.equal(load_model(tmp_path)(x), circuit(x))
    leaf = next(i for i, r in enumerate(circuit.graph.regions) if r.family == "indicator")
    assert torch.equal(circuit.weights_of(leaf), torch.eye(3))
    assert circuit.statistics_of(leaf).numel() == 0


def test_impossible_by_indicators_is_minus_infinity(monkeypatch) -> None:
    circuit = Circuit(tree(["indicator"] * 2, 2), [2, 2])
    top = circuit.graph.regions[circuit.graph.root].children[0]
    middle = next(i for i, r in enumerate(circuit.graph.regions) if r.kind == "sum")
    circuit.statistics_of(middle)[:] = torch.eye(2)
    assert top != middle
    x = torch.tensor([[0, 1], [0, 0], [-1, 1]])
    log_prob = circuit(x)
    assert log_prob[0] == -torch.inf and log_prob[1:].isfinite().all()
    log_prob[1:].sum().backward()
    assert all(p.grad.isfinite().all() for p in circuit.parameters())


def test_an_indicator_has_a_unit_a_category() -> None:
    with pytest.raises(StructureError, match="indicator") as caught:
        Circuit(tree(["indicator"], 3), [4])
    assert "one a category" in str(caught.value)
