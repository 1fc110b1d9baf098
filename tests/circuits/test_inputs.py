"""Input units: Gaussians against scipy, moments under online EM, scattering of flows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.circuits.gaussian import VARIANCE_FLOOR
from distpc.circuits.look_up import scatter_rows
from distpc.errors import EvidenceError
from distpc.structures.region_graph import Region, RegionGraph

from .graphs import hclt, patches


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def mixture(num_units: int) -> RegionGraph:
    """A mixture over one variable."""
    return RegionGraph([Region("input", num_units, variable=0), Region("sum", 1, (0,))], 1)


def test_a_gaussian_mixture_matches_scipy() -> None:
    circuit = Circuit(mixture(3), [None], seed=2)
    circuit.standardise(torch.tensor([200.0]), torch.tensor([5.0]))
    x = torch.tensor([[190.0], [203.5], [math.nan], [260.0]], dtype=torch.float64)
    mean, variance = circuit.weights_of(0, torch.float64).unbind(-1)
    weights = circuit.weights_of(1, torch.float64)[0]
    density = sum(
        w * stats.norm.pdf(x[:, 0].numpy(), m, math.sqrt(v))
        for w, m, v in zip(weights.tolist(), mean.tolist(), variance.tolist(), strict=True)
    )
    expected = np.where(np.isnan(density), 1.0, density)
    np.testing.assert_allclose(circuit(x).detach().numpy(), np.log(expected), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(
        circuit(x).double(), log_prob_exact(circuit, x), rtol=2e-5, atol=2e-6
    )


def test_online_em_finds_mean_and_variance_far_from_zero() -> None:
    values = 200.0 + 0.1 * torch.randn(
        4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    circuit = Circuit(mixture(1), [None])
    circuit.standardise(values.mean(0), values.std(0))
    for _ in range(3):
        circuit.zero_grad()
        (-circuit(values).sum() / len(values)).backward()
        with torch.no_grad():
            for parameter in circuit.parameters():
                parameter.mul_(0.0).sub_(parameter.grad)
    mean, variance = circuit.weights_of(0, torch.float64)[0]
    assert mean.item() == pytest.approx(values.mean().item(), abs=1e-5)
    assert variance.item() == pytest.approx(values.var(correction=0).item(), rel=1e-3)


def test_variance_has_a_floor() -> None:
    circuit = Circuit(mixture(1), [None])
    values = torch.full((10, 1), 0.5)
    for _ in range(2):
        circuit.zero_grad()
        (-circuit(values).sum() / 10).backward()
        with torch.no_grad():
            for parameter in circuit.parameters():
                parameter.mul_(0.0).sub_(parameter.grad)
    assert circuit.weights_of(0)[0, 1].item() == pytest.approx(VARIANCE_FLOOR)
    assert circuit(values).isfinite().all()


def test_em_on_a_mixture_of_real_and_categorical_variables() -> None:
    generator = torch.Generator().manual_seed(1)
    side = torch.rand(500, generator=generator) < 0.5
    real = torch.where(side, 3.0, -3.0) + torch.randn(500, generator=generator)
    x = torch.stack([real, side.float(), (~side).float()], 1)
    x[::7, 0] = torch.nan
    x[::5, 1] = torch.nan
    circuit = Circuit(hclt([-1, 0, 0], 2), [None, 2, 2], seed=0)
    circuit.standardise(torch.zeros(3), torch.full((3,), 3.0))
    last = -math.inf
    for _ in range(25):
        circuit.zero_grad()
        log_prob = circuit(x).mean()
        assert log_prob.item() >= last - 1e-5
        last = log_prob.item()
        (-log_prob).backward()
        with torch.no_grad():
            for parameter in circuit.parameters():
                parameter.mul_(0.0).sub_(parameter.grad)
    torch.testing.assert_close(
        circuit(x).double(), log_prob_exact(circuit, x), rtol=1e-5, atol=1e-5
    )
    means = circuit.weights_of(
        next(
            i for i, r in enumerate(circuit.graph.regions) if r.variable == 0 and r.kind == "input"
        )
    )[:, 0]
    assert sorted(means.round().tolist()) == [-3.0, 3.0]
    side_given = circuit.conditional(torch.tensor([[4.0, math.nan, math.nan]]), None, [1])
    assert side_given[0, 0, 1] > 0.95
    samples = circuit.sample(2000, seed=1)
    assert samples.dtype == torch.float32
    assert set(samples[:, 1].unique().tolist()) == {0.0, 1.0}
    assert samples[samples[:, 1] == 1, 0].mean().item() == pytest.approx(3.0, abs=0.3)
    given = circuit.sample(5, x=torch.tensor([[4.0, math.nan, 0.0]]))
    assert (given[0, :, 0] == 4.0).all()
    with pytest.raises(EvidenceError, match="real variable"):
        circuit.conditional(x[:1], None, [0])
    with pytest.raises(EvidenceError, match="finite"):
        circuit(torch.tensor([[math.inf, 0.0, 0.0]]))


def test_gaussian_outliers_are_finite() -> None:
    """Units that differ by thousands of nats."""
    circuit = Circuit(hclt([-1, 0, 0, 1, 1, 1, 1, 1], 3), [None] * 8, seed=1)
    x = 60.0 * torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    log_prob = circuit(x)
    torch.testing.assert_close(log_prob.double(), log_prob_exact(circuit, x), rtol=1e-4, atol=1e-3)
    log_prob.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_bags_with_tables_of_several_sizes() -> None:
    """Colour patches: the variables of a patch have 2, 3 and 5 categories."""
    circuit = Circuit(patches(3, 3, 4), [2, 3, 5] * 3, seed=0, init_noise=3.0)
    (bank,) = [b for name, b in circuit.banks.items() if name.startswith("categorical")]
    assert bank.statistics.shape == (10, 4)
    x = torch.tensor([[1, 2, 4, 0, 1, 3, 1, 0, -1], [-1] * 9])
    torch.testing.assert_close(circuit(x).double(), log_prob_exact(circuit, x), atol=1e-5, rtol=0)
    weights = circuit.weights_of(0)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert weights.shape == (4, 2)


def test_statistics_are_views_of_the_parameter() -> None:
    circuit = Circuit(patches(2, 2, 3), [4] * 4)
    before = circuit(torch.zeros(1, 4, dtype=torch.int64)).item()
    circuit.statistics_of(0)[:, 0] = 100.0
    assert circuit(torch.zeros(1, 4, dtype=torch.int64)).item() > before
    with pytest.raises(ValueError, match="product"):
        circuit.statistics_of(2)


def test_scattered_rows_are_sums() -> None:
    values = torch.randn(50, 3, dtype=torch.float64)
    index = torch.randint(0, 8, (50, 4))
    expected = torch.zeros(8, 3, dtype=torch.float64)
    expected.index_add_(0, index.reshape(-1), values.repeat_interleave(4, 0))
    torch.testing.assert_close(scatter_rows(values, index, 7), expected[:7])
    nothing = torch.full((50, 4), 7)
    assert (scatter_rows(values, nothing, 7) == 0).all()
    assert scatter_rows(values[:0], index[:0], 7).shape == (7, 3)
