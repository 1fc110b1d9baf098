"""Every registered structure with every family of inputs, against an enumeration of all worlds.

A new structure or family joins by being registered: small instances come from
`STRUCTURES[name].small`, families from `FAMILIES`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.circuits.families import FAMILIES
from distpc.structures.registry import STRUCTURES

from .graphs import exact_flows, flows_of, indicator_circuit, with_family


def circuits(is_real: bool) -> list[str]:
    """Names structure/instance/family; a structure that names its families has no choice."""
    names = []
    for structure, registered in STRUCTURES.items():
        for instance, arguments in registered.small.items():
            graph = registered.build(**arguments)
            if any(region.family is not None for region in graph.regions):
                names += [] if is_real else [f"{structure}/{instance}/own"]
                continue
            names += [
                f"{structure}/{instance}/{name}"
                for name, family in FAMILIES.items()
                if family.is_real == is_real
            ]
    return names


TABLES, REALS = circuits(is_real=False), circuits(is_real=True)


@cache
def build(name: str) -> Circuit:
    structure, instance, family = name.split("/")
    graph = STRUCTURES[structure].build(**STRUCTURES[structure].small[instance])
    if family == "own":
        return indicator_circuit(graph)
    return Circuit(*with_family(graph, family), init_noise=2.0)


@cache
def judged(name: str) -> tuple[Circuit, Tensor, Tensor]:
    """A circuit, all of its worlds, and their exact log-probabilities."""
    circuit = build(name)
    worlds = enumerate_worlds(circuit.num_categories)
    return circuit, worlds, log_prob_exact(circuit, worlds)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def possible_worlds(name: str, count: int) -> Tensor:
    """Worlds of positive probability."""
    _, worlds, exact = judged(name)
    possible = worlds[exact.isfinite()]
    chosen = torch.randint(len(possible), (count,), generator=torch.Generator().manual_seed(1))
    return possible[chosen]


def random_mask(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5


@pytest.mark.parametrize("name", TABLES)
def test_probabilities_equal_the_judges_and_sum_to_one(name: str) -> None:
    circuit, worlds, exact = judged(name)
    assert exact.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(circuit.log_prob(worlds).double(), exact, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", TABLES)
def test_marginals_and_conditionals_equal_enumeration(name: str) -> None:
    circuit, worlds, exact = judged(name)
    x = possible_worlds(name, 12)
    observed = random_mask(x.shape)
    agree = ((worlds == x.unsqueeze(1)) | ~observed.unsqueeze(1)).all(-1)
    joint = torch.where(agree, exact.exp(), 0.0)
    torch.testing.assert_close(
        circuit.log_prob(x, observed).double(), joint.sum(1).log(), rtol=1e-6, atol=2e-5
    )
    posterior = joint / joint.sum(1, keepdim=True)
    found = circuit.conditional(x, observed, list(range(circuit.num_variables)))
    for variable, size in enumerate(circuit.num_categories):
        members = torch.nn.functional.one_hot(worlds[:, variable], size).double()
        torch.testing.assert_close(
            found[:, variable, :size].double(), posterior @ members, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", [*TABLES, *REALS])
def test_flows_equal_autograd_of_the_judge(name: str) -> None:
    circuit = build(name)
    circuit.zero_grad()
    generator = torch.Generator().manual_seed(4)
    if name in TABLES:
        x = possible_worlds(name, 20)
        x = torch.where(random_mask(x.shape), x, -1)
    else:
        x = torch.randn(20, circuit.num_variables, generator=generator)
        x = torch.where(random_mask(x.shape), x, torch.nan)
    scale = torch.linspace(0.5, 2.0, len(x))
    log_prob = circuit(x)
    if not log_prob.requires_grad:
        return  # point masses alone, nothing to learn
    (log_prob * scale).sum().backward()
    expected = exact_flows(circuit, lambda log_prob: (log_prob * scale).sum(), x)
    uses = {i: flow.sum(-1) for i, flow in expected.items() if flow.shape[-1] > 0}
    for index, region in enumerate(circuit.graph.regions):
        if index in expected and (region.kind == "sum" or region.family in (None, "categorical")):
            torch.testing.assert_close(
                flows_of(circuit, index).double(), expected[index], rtol=1e-4, atol=1e-5
            )
    if name in TABLES:
        check_uses(circuit, uses)


def check_uses(circuit: Circuit, expected: dict[int, Tensor]) -> None:
    """The rows of an input's flow add up to how often each unit was used, whatever is stored."""
    for index, region in enumerate(circuit.graph.regions):
        if region.kind != "input" or index not in expected:
            continue
        bank, _ = circuit.bank_of(index)
        grad = bank.statistics.grad
        if bank.learns_by != "em" or grad is None or not grad.numel():
            continue
        kept = bank.statistics.data
        bank.statistics.data = bank.totals(grad).expand_as(grad).contiguous()
        found = circuit.statistics_of(index)[:, 0].double()
        bank.statistics.data = kept
        torch.testing.assert_close(found, expected[index], rtol=1e-4, atol=1e-5)


def one_instance_each() -> list[str]:
    """For every structure and family one instance, another one for each family: the descent
    through layers and the draw from inputs know nothing of each other. All instances for the
    first family."""
    chosen = []
    for structure, registered in STRUCTURES.items():
        for number, family in enumerate(["own", *FAMILIES]):
            names = [name for name in TABLES if name.startswith(f"{structure}/")]
            names = [name for name in names if name.endswith(f"/{family}")]
            every = family in ("own", next(iter(FAMILIES)))
            chosen += names if every else names[number % len(registered.small) :][:1]
    return chosen


@pytest.mark.parametrize("name", one_instance_each())
def test_samples_pass_a_chi_square_test(name: str) -> None:
    circuit, worlds, exact = judged(name)
    sizes = np.array(circuit.num_categories)
    samples = circuit.sample(3000, seed=5).numpy()
    found = np.bincount(np.ravel_multi_index(samples.T, sizes), minlength=len(worlds))
    expected = 3000 * exact.exp().numpy()
    assert found[expected == 0].sum() == 0
    rare = expected < 5
    counts = np.append(found[~rare], found[rare].sum())
    means = np.append(expected[~rare], expected[rare].sum())
    counts, means = counts[means > 0], means[means > 0]
    if len(means) > 1:
        assert stats.chisquare(counts, means * (counts.sum() / means.sum())).pvalue > 1e-5


@pytest.mark.parametrize("name", REALS)
def test_densities_equal_the_judges_and_integrate_to_marginals(name: str) -> None:
    circuit = build(name)
    x = 3 * torch.randn(20, circuit.num_variables, generator=torch.Generator().manual_seed(6))
    observed = random_mask(x.shape)
    torch.testing.assert_close(
        circuit.log_prob(x, observed).double(),
        log_prob_exact(circuit, x, observed),
        rtol=1e-6,
        atol=5e-5,
    )
    # Over the first variable, the others as they are: the trapezoid rule is exact to float64
    # for densities that smooth and that near zero at the ends.
    grid = torch.linspace(-40, 40, 401, dtype=torch.float64)
    worlds = x[:1].double().expand(len(grid), -1).clone()
    worlds[:, 0] = grid
    total = torch.trapezoid(log_prob_exact(circuit, worlds).exp(), grid)
    others = torch.arange(circuit.num_variables) > 0
    marginal = log_prob_exact(circuit, x[:1].double(), others)
    assert total.log().item() == pytest.approx(marginal.item(), abs=1e-9)
