"""Every family of inputs: against scipy, the judge and autograd; trained, sampled and saved."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from distpc import fit
from distpc.circuits import load_model, save_model
from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, exact_weights, log_prob_exact
from distpc.circuits.families import FAMILIES
from distpc.errors import StructureError
from distpc.structures import with_family
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import Region, RegionGraph
from distpc.training.start import start_near_data_

from .graphs import hclt, random_evidence

CODED = sorted(name for name, family in FAMILIES.items() if not family.is_real)
MIXED = (["binomial", "logistic", None, "indicator", "bernoulli"], [4, 5, 3, 3, 2])
pytestmark = pytest.mark.filterwarnings("error")


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


def mixed(seed: int = 0) -> Circuit:
    """A chain of all families over categories."""
    circuit = Circuit(tree(MIXED[0], 3), MIXED[1], seed=seed, init_noise=2.0)
    circuit.set_smoothing(0.3, 2.0, 50)
    return circuit


def input_of(circuit: Circuit, variable: int) -> int:
    regions = circuit.graph.regions
    return next(i for i, r in enumerate(regions) if r.kind == "input" and r.variable == variable)


def log_domain(monkeypatch) -> None:
    """Every product counts as weak, so that all samples take the log domain."""
    monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
    monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)


def log_logistic(parameters: Tensor, size: int) -> Tensor:
    """(K, C) probabilities from mean and log-scale (K, 2), by differences of sigmoids."""
    mean = (parameters[:, :1] + 1.0) / 2.0 * (size - 1)
    scale = parameters[:, 1:].exp() / 2.0 * (size - 1)
    edges = torch.arange(size - 1, dtype=parameters.dtype) + 0.5
    ends = torch.sigmoid((edges - mean) / scale)
    zeros = torch.zeros_like(mean)
    return torch.diff(torch.cat([zeros, ends, zeros + 1.0], 1), dim=1)


@pytest.mark.parametrize("size", [1, 2, 7, 256])
@pytest.mark.parametrize("name", ["categorical", "binomial", "logistic"])
def test_tables_match_scipy(name: str, size: int) -> None:
    # Tables of two sizes in one bank.
    circuit = Circuit(tree([name] * 3, 4), [size, 3, size], seed=3, init_noise=2.0)
    circuit.set_smoothing(0.0, 1.5, 20)
    for variable, of_variable in enumerate(circuit.num_categories):
        region = input_of(circuit, variable)
        s = circuit.statistics_of(region).double().numpy()
        x = np.arange(of_variable)
        if name == "categorical":
            eps = 1.5 / 20 / of_variable
            expected = (s + eps) / (s + eps).sum(1, keepdims=True)
        elif name == "binomial":
            chance = (s[:, 1:] + 1.5 / 40) / (s.sum(1, keepdims=True) + 1.5 / 20)
            expected = stats.binom.pmf(x, of_variable - 1, chance)
        else:
            mean = (s[:, :1] + 1) / 2 * (of_variable - 1)
            # With one category there are no edges, and no scale.
            scale = np.exp(s[:, 1:]) / 2 * max(of_variable - 1, 1)
            upper = stats.logistic.cdf(x + 0.5, mean, scale)
            lower = stats.logistic.cdf(x - 0.5, mean, scale)
            upper[:, -1], lower[:, 0] = 1.0, 0.0
            expected = upper - lower
        found = circuit.weights_of(region, torch.float64)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(found.sum(1).numpy(), 1.0, rtol=1e-12)
        bank, table = circuit.bank_of(region)
        torch.testing.assert_close(bank.weights(torch.float64)[bank.table(table)].T, found)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("tied", [False, True])
def test_all_worlds_of_every_family_sum_to_one(name: str, tied: bool) -> None:
    size = FAMILIES[name].num_categories or 3
    circuit = Circuit(tree([name] * 4, size, tied), [size] * 4, seed=1, init_noise=2.0)
    circuit.set_smoothing(0.1, 0.7, 10)
    worlds = enumerate_worlds(circuit.num_categories)
    log_prob = circuit(worlds)
    assert log_prob.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    exact = log_prob_exact(circuit, worlds)
    assert exact.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("in_logs", [False, True])
def test_mixed_families_match_the_judge(in_logs: bool, monkeypatch) -> None:
    if in_logs:
        log_domain(monkeypatch)
    circuit = mixed()
    x, latents = random_evidence(circuit, 60, 1)
    for evidence in (None, latents):
        found = circuit(x, evidence).double()
        expected = log_prob_exact(circuit, x, latents=evidence)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-5)
    as_floats = torch.where(x < 0, torch.nan, x.double())
    assert torch.equal(circuit(as_floats), circuit(x))


@pytest.mark.parametrize("in_logs", [False, True])
def test_flows_and_gradients_match_autograd_through_the_judge(in_logs: bool, monkeypatch) -> None:
    if in_logs:
        log_domain(monkeypatch)
    circuit = mixed(seed=3)
    x, _ = random_evidence(circuit, 40, 3, missing=0.2)
    sample_weights = torch.linspace(-1.0, 2.0, len(x))

    def loss_of(log_prob: Tensor) -> Tensor:
        return (log_prob * sample_weights).sum()

    loss_of(circuit(x)).backward()
    binomial, logistic = input_of(circuit, 0), input_of(circuit, 1)
    indicator = input_of(circuit, 3)
    bank, table = circuit.bank_of(logistic)
    parameters = circuit.statistics_of(logistic).double().requires_grad_()
    weights = {
        region: tensor if region == indicator else tensor.requires_grad_()
        for region, tensor in exact_weights(circuit).items()
    }
    weights[logistic] = log_logistic(parameters, 5)
    loss_of(log_prob_exact(circuit, x, weights=weights)).backward()
    assert circuit.parameter_groups()["gradient"] == [bank.statistics]
    torch.testing.assert_close(
        bank.statistics.grad[table].T.double(), parameters.grad, rtol=1e-4, atol=1e-5
    )
    flow = weights[binomial].detach() * weights[binomial].grad
    successes = torch.arange(4) / 3.0
    expected = flow @ torch.stack([1.0 - successes, successes]).T.double()
    found = circuit.bank_of(binomial)[0].statistics.grad[circuit.bank_of(binomial)[1]].T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    for variable in (2, 4):
        region = input_of(circuit, variable)
        bank, table = circuit.bank_of(region)
        flow = weights[region].detach() * weights[region].grad
        found = bank.statistics.grad[bank.table(table)].T.double()
        torch.testing.assert_close(found, flow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("log_scale", [-1e4, -30.0, -8.0, 0.0, 8.0, 30.0, 1e4])
def test_logistic_units_of_any_scale_are_finite(log_scale: float) -> None:
    circuit = Circuit(with_family(hclt([-1, 0], 3), "logistic"), [256, 9])
    for variable in (0, 1):
        parameters = circuit.statistics_of(input_of(circuit, variable))
        parameters[:, 0] = torch.tensor([-3.0, 0.1, 30.0])
        parameters[:, 1] = log_scale
        weights = circuit.weights_of(input_of(circuit, variable), torch.float64)
        torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
    x = torch.stack([torch.arange(256), torch.arange(256) % 9], 1)
    log_prob = circuit(x)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert all(p.grad.isfinite().all() for p in circuit.parameters())


def test_what_was_never_seen_is_impossible_without_a_pseudocount() -> None:
    for name, last in (("categorical", 3), ("binomial", 3)):
        circuit = Circuit(RegionGraph([Region("input", 1, variable=0, family=name)], 1), [4])
        circuit.statistics_of(0)[:] = 0.0
        circuit.statistics_of(0)[0, 0] = 0.5
        x = torch.tensor([[0], [last], [-1]])
        log_prob = circuit(x)
        assert log_prob.tolist() == pytest.approx([0.0, -math.inf, 0.0], abs=1e-7)
        log_prob.sum().backward()
        assert all(p.grad.isfinite().all() for p in circuit.parameters())
        circuit.set_smoothing(0.0, 1.0, 10)
        log_prob = circuit(x)
        assert log_prob.isfinite().all()
        torch.testing.assert_close(log_prob.double(), log_prob_exact(circuit, x))


def test_units_never_used_are_as_broad_as_can_be() -> None:
    circuit = Circuit(tree(["categorical", "binomial", None], 2), [4, 4, None])
    for variable in range(3):
        circuit.statistics_of(input_of(circuit, variable))[:] = 0.0
    weights = [circuit.weights_of(input_of(circuit, v)) for v in range(3)]
    assert torch.equal(weights[0], torch.full((2, 4), 0.25))
    torch.testing.assert_close(weights[1][0], torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8)
    assert torch.equal(weights[2], torch.tensor([[0.0, 1.0]] * 2))
    x = torch.tensor([[0.0, 3.0, 0.5], [1.0, 2.0, math.nan]])
    circuit(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in circuit.parameters())
    circuit.rescale_to_uses_()
    torch.testing.assert_close(circuit(x).double(), log_prob_exact(circuit, x))


def test_samples_conditionals_and_posteriors_match_enumeration() -> None:
    circuit = mixed(seed=5)
    worlds = enumerate_worlds(circuit.num_categories)
    probabilities = log_prob_exact(circuit, worlds).exp()
    n = 20_000
    drawn = circuit.sample(n, seed=7)
    sizes = torch.tensor(circuit.num_categories)
    strides = torch.tensor([int(sizes[v + 1 :].prod()) for v in range(len(sizes))])
    counts = torch.bincount((drawn * strides).sum(1), minlength=len(worlds)).double()
    is_common = probabilities * n >= 5
    expected = torch.cat([probabilities[is_common], probabilities[~is_common].sum().view(1)]) * n
    found = torch.cat([counts[is_common], counts[~is_common].sum().view(1)])
    statistic = ((found - expected) ** 2 / expected).sum().item()
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-3

    x = torch.tensor([[1, -1, 2, -1, 0], [-1, 4, -1, 0, -1]])
    conditional = circuit.conditional(x, None, [0, 1, 3])
    posterior = circuit.posterior(x)
    for row, values in enumerate(x):
        fits = ((values < 0) | (worlds == values)).all(1)
        for position, variable in enumerate((0, 1, 3)):
            for value in range(circuit.num_categories[variable]):
                of_value = probabilities[fits & (worlds[:, variable] == value)].sum()
                expected = (of_value / probabilities[fits].sum()).item()
                found = conditional[row, position, value].item()
                assert found == pytest.approx(expected, abs=1e-5)
    total = log_prob_exact(circuit, x).exp()
    for z in range(circuit.num_latents):
        for value in range(3):
            latents = torch.full((2, circuit.num_latents), -1)
            latents[:, z] = value
            expected = log_prob_exact(circuit, x, latents=latents).exp() / total
            torch.testing.assert_close(
                posterior[:, z, value].double(), expected, atol=1e-5, rtol=0.0
            )
    given = circuit.sample(50, seed=1, x=x)
    assert ((x.unsqueeze(1) < 0) | (given == x.unsqueeze(1))).all()


def test_mixed_families_survive_saving(tmp_path: Path) -> None:
    circuit = mixed(seed=6)
    save_model(circuit, tmp_path, dataset={}, training={})
    again = load_model(tmp_path)
    x, latents = random_evidence(circuit, 30, 0)
    assert torch.equal(again(x, latents), circuit(x, latents))
    assert again.num_parameters == circuit.num_parameters
    assert [r.family for r in again.graph.regions] == [r.family for r in circuit.graph.regions]


def test_statistics_of_binomials_are_uses() -> None:
    circuit = Circuit(tree(["binomial"] * 3, 3), [5, 1, 9], seed=2, init_noise=2.0)
    uses = circuit.uses()
    (bank,) = {circuit.bank_of(input_of(circuit, v))[0] for v in range(3)}
    for variable in range(3):
        region = input_of(circuit, variable)
        total = bank.totals(bank.statistics)[circuit.bank_of(region)[1], 0]
        torch.testing.assert_close(total.detach(), uses[region])
    x = circuit.sample(100, seed=0)
    circuit(x).sum().backward()
    flows = bank.totals(bank.statistics.grad)
    torch.testing.assert_close(flows.sum(-1).flatten(), torch.full((3,), 100.0))


def test_em_recovers_a_mixture_of_binomials() -> None:
    generator = np.random.default_rng(0)
    chances = np.array([[0.15, 0.7, 0.4], [0.6, 0.2, 0.9]])
    side = generator.random(4000) < 0.3
    x = generator.binomial(20, chances[side.astype(int)])
    circuit = Circuit(
        RegionGraph(
            [
                *(Region("input", 2, variable=v, family="binomial") for v in range(3)),
                Region("product", 2, (0, 1, 2)),
                Region("sum", 1, (3,)),
            ],
            3,
        ),
        [21] * 3,
        seed=4,
    )
    fit(circuit, x, epochs=12, batch_size=1000, progress=False)
    weights = circuit.weights_of(4)[0]
    order = weights.argsort(descending=True)
    assert weights[order].tolist() == pytest.approx([0.7, 0.3], abs=0.02)
    for variable in range(3):
        shares = circuit.statistics_of(variable)[order]
        found = shares[:, 1] / shares.sum(1)
        assert found.tolist() == pytest.approx(chances[:, variable].tolist(), abs=0.015)


def test_units_of_every_family_start_near_the_data() -> None:
    families = ["categorical", "binomial", "logistic", "indicator"]
    circuit = Circuit(tree(families, 8), [64, 64, 64, 8], init_noise=1.0)
    generator = np.random.default_rng(2)
    x = np.stack([generator.binomial(63, 0.1, 4000) for _ in range(3)] + [np.arange(4000) % 8], 1)
    before = circuit.log_prob(x).mean()
    start_near_data_(circuit, [x])
    assert circuit.log_prob(x).mean() > before + 1.0
    for variable in range(3):
        weights = circuit.weights_of(input_of(circuit, variable))
        mean = (weights @ torch.arange(64.0)).mean().item()
        assert mean == pytest.approx(6.3, abs=4.0)
    means = circuit.statistics_of(input_of(circuit, 2))[:, 0]
    assert len(means.unique()) >= 5


def test_adam_fits_logistic_units() -> None:
    generator = np.random.default_rng(1)
    values = generator.logistic(np.where(generator.random(3000) < 0.5, 60.0, 180.0), 9.0)
    x = torch.from_numpy(np.clip(np.round(values), 0, 255)).long().unsqueeze(1)
    circuit = Circuit(
        RegionGraph([Region("input", 2, variable=0, family="logistic"), Region("sum", 1, (0,))], 1),
        [256],
    )
    (parameter,) = circuit.parameter_groups()["gradient"]
    adam = torch.optim.Adam([parameter], lr=0.05)
    for _ in range(150):
        circuit.zero_grad()
        (-circuit(x).mean()).backward()
        adam.step()
    mean, log_scale = circuit.statistics_of(0).T
    assert ((mean + 1) / 2 * 255).sort().values.tolist() == pytest.approx([60.0, 180.0], abs=3.0)
    assert (log_scale.exp() / 2 * 255).tolist() == pytest.approx([9.0, 9.0], rel=0.1)


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
    leaf = input_of(circuit, 0)
    assert torch.equal(circuit.weights_of(leaf), torch.eye(3))
    assert circuit.statistics_of(leaf).numel() == 0


def test_impossible_by_indicators_is_minus_infinity() -> None:
    circuit = Circuit(tree(["indicator"] * 2, 2), [2, 2])
    middle = next(i for i, r in enumerate(circuit.graph.regions) if r.kind == "sum")
    circuit.statistics_of(middle)[:] = torch.eye(2)
    x = torch.tensor([[0, 1], [0, 0], [-1, 1]])
    log_prob = circuit(x)
    assert log_prob[0] == -torch.inf and log_prob[1:].isfinite().all()
    log_prob[1:].sum().backward()
    assert all(p.grad.isfinite().all() for p in circuit.parameters())


def test_an_indicator_has_a_unit_a_category() -> None:
    with pytest.raises(StructureError, match="indicator") as caught:
        Circuit(tree(["indicator"], 3), [4])
    assert "one a category" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "size", "expected"),
    [
        ("bernoulli", 3, "2 categories"),
        ("binomial", None, "with categories"),
        ("logistic", None, "with categories"),
        ("gaussian", 4, "real variable"),
        ("poisson", 4, "binomial"),
    ],
)
def test_families_that_do_not_fit_are_refused(family, size, expected) -> None:
    with pytest.raises(StructureError) as caught:
        Circuit(tree([family], 2), [size])
    assert expected in str(caught.value.expected)


def test_any_structure_takes_any_family() -> None:
    graph = hclt([-1, 0, 0], 2)
    circuit = Circuit(with_family(graph, ["binomial", None, "logistic"]), [5, 3, 4])
    worlds = enumerate_worlds(circuit.num_categories)
    assert circuit(worlds).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert with_family(with_family(graph, "binomial"), None).regions == graph.regions
    with pytest.raises(StructureError, match="differ in number"):
        with_family(graph, ["binomial"])
    tied = tree([None, None], 2, tied=True)
    with pytest.raises(StructureError, match="tied"):
        Circuit(with_family(tied, ["binomial", "logistic"]), [3, 3])
