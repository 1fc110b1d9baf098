"""Conditionals, posteriors and samples against enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.errors import EvidenceError

from .graphs import SMALL, chain, hclt, patches, random_evidence, small_circuit

NAMES = sorted(set(SMALL) - {"one-input"})


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def enumerated_conditional(circuit: Circuit, x: Tensor, observed: Tensor) -> list[Tensor]:
    """P(variable = c | evidence) of every variable, for one sample, by enumeration."""
    worlds = enumerate_worlds(circuit.num_categories)
    agree = ((worlds == x) | ~observed).all(1)
    weights = torch.where(agree, log_prob_exact(circuit, worlds).exp(), 0.0)
    weights /= weights.sum()
    return [
        torch.stack([weights[worlds[:, v] == c].sum() for c in range(size or 0)])
        for v, size in enumerate(circuit.num_categories)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_logs", [False, True])
def test_conditionals_match_enumeration(name: str, in_logs: bool, monkeypatch) -> None:
    if in_logs:
        monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
        monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)
    circuit = small_circuit(name, seed=1, noise=3.0)
    x, _ = random_evidence(circuit, 6, 1, missing=0.0)
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    variables = list(range(circuit.num_variables))[::-1]
    found = circuit.conditional(x, observed, variables)
    assert found.shape == (6, len(variables), max(circuit.num_categories))
    for sample in range(len(x)):
        expected = enumerated_conditional(circuit, x[sample], observed[sample])
        for position, variable in enumerate(variables):
            size = circuit.num_categories[variable]
            row = found[sample, position]
            torch.testing.assert_close(
                row[:size].double(), expected[variable], rtol=1e-4, atol=1e-6
            )
            assert (row[size:] == 0).all()


@pytest.mark.parametrize("name", ["hclt", "tied-patches", "grouped-patches", "shared-child"])
def test_posteriors_match_the_judge(name: str) -> None:
    circuit = small_circuit(name, seed=2, noise=3.0)
    x, _ = random_evidence(circuit, 5, 3)
    found = circuit.posterior(x)
    total = log_prob_exact(circuit, x)
    for z, size in enumerate(circuit.latent_sizes):
        for value in range(size):
            latents = torch.full((len(x), circuit.num_latents), -1)
            latents[:, z] = value
            joint = log_prob_exact(circuit, x, latents=latents)
            expected = (joint - total).exp()
            torch.testing.assert_close(found[:, z, value].double(), expected, rtol=1e-4, atol=1e-5)


def chi_square_p(samples: Tensor, circuit: Circuit, log_prob: Tensor, worlds: Tensor) -> float:
    """p-value of samples against exact probabilities; worlds expected below 5 times are pooled."""
    sizes = np.array([int(size or 0) for size in circuit.num_categories])
    counts = np.bincount(
        np.ravel_multi_index(samples.numpy().T, sizes), minlength=int(sizes.prod())
    )
    codes = np.ravel_multi_index(worlds.numpy().T, sizes)
    expected = log_prob.exp().numpy() * len(samples)
    counts = counts[codes]
    assert counts.sum() == len(samples)
    assert (counts[expected == 0] == 0).all()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep] * len(samples) / wanted.sum()).pvalue)


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_distribution(name: str) -> None:
    circuit = small_circuit(name, seed=3, noise=2.0)
    worlds = enumerate_worlds(circuit.num_categories)
    samples = circuit.sample(20_000, seed=5)
    assert samples.shape == (20_000, circuit.num_variables)
    assert samples.dtype == torch.int64
    assert chi_square_p(samples, circuit, log_prob_exact(circuit, worlds), worlds) > 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_logs", [False, True])
def test_conditional_samples_follow_the_conditional(name: str, in_logs: bool, monkeypatch) -> None:
    if in_logs:
        monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
        monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)
    circuit = small_circuit(name, seed=4, noise=3.0)
    x, _ = random_evidence(circuit, 2, 7, missing=0.0)
    observed = torch.zeros(circuit.num_variables, dtype=torch.bool)
    observed[[0, 2]] = True
    samples = circuit.sample(8_000, seed=1, x=x, observed=observed)
    assert samples.shape == (2, 8_000, circuit.num_variables)
    worlds = enumerate_worlds(circuit.num_categories)
    log_prob = log_prob_exact(circuit, worlds)
    for row in range(2):
        assert (samples[row][:, observed] == x[row, observed]).all()
        agree = ((worlds == x[row]) | ~observed).all(1)
        given = torch.where(agree, log_prob, -torch.inf)
        given = given - given.logsumexp(0)
        assert chi_square_p(samples[row], circuit, given, worlds) > 1e-4


def test_samples_depend_on_the_seed_alone() -> None:
    circuit = Circuit(patches(6, 4, 8), [16] * 24, seed=0)
    assert torch.equal(circuit.sample(20, seed=3), circuit.sample(20, seed=3))
    assert not torch.equal(circuit.sample(20, seed=3), circuit.sample(20, seed=4))


def test_queries_on_samples_that_scaled_values_cannot_represent() -> None:
    """Two peaked neighbours disagree by 1e-60: conditionals stay finite and right."""
    circuit = Circuit(hclt([-1, 0, 0], 2), [2] * 3)
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "input":
            table = torch.tensor([[1.0, 1e-30], [1e-30, 1.0]])
            circuit.statistics_of(index)[:] = table
        elif region.num_units == 2 and region.kind == "sum":
            circuit.statistics_of(index)[:] = torch.tensor([[1.0, 1e-20], [1e-20, 1.0]])
    x = torch.tensor([[-1, 0, 1], [0, 0, 0]])
    found = circuit.conditional(x, x >= 0, [0])
    expected = enumerated_conditional(circuit, x[0], x[0] >= 0)[0]
    torch.testing.assert_close(found[0, 0].double(), expected, rtol=1e-4, atol=1e-6)
    samples = circuit.sample(500, x=x, observed=x >= 0)
    share = (samples[0, :, 0] == 0).double().mean().item()
    assert share == pytest.approx(expected[0].item(), abs=0.1)
    assert circuit.posterior(x).isfinite().all()


def test_impossible_evidence_is_refused_by_name() -> None:
    circuit = Circuit(chain(3, 2), [2] * 3)
    leaf = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 1)
    circuit.statistics_of(leaf)[:, 1] = 0.0
    x = torch.tensor([[0, 0, -1], [0, 1, -1]])
    for query in (
        lambda: circuit.conditional(x, x >= 0, [2]),
        lambda: circuit.sample(1, x=x),
        lambda: circuit.posterior(x),
    ):
        with pytest.raises(EvidenceError, match="probability 0") as caught:
            query()
        assert "[1]" in str(caught.value)
    with pytest.raises(EvidenceError, match="no such variable"):
        circuit.conditional(x[:1], None, [7])


def test_queries_leave_no_gradients() -> None:
    circuit = small_circuit("tied-patches")
    x, _ = random_evidence(circuit, 3, 0)
    circuit.conditional(x, x >= 0, [0, 1])
    circuit.posterior(x)
    circuit.sample(2, x=x)
    circuit.log_prob(x)
    assert all(parameter.grad is None for parameter in circuit.parameters())


@pytest.mark.parametrize("n", [0, -1, 2.5, True, None])
def test_no_number_of_samples_is_refused(n: object) -> None:
    with pytest.raises(EvidenceError, match="number of samples"):
        small_circuit("tied-patches").sample(n)


def test_no_rows_of_evidence_give_no_samples() -> None:
    assert small_circuit("tied-patches").sample(2, x=np.zeros((0, 6))).shape == (0, 2, 6)
