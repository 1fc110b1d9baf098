"""The circuit against the float64 judge, on every shape of graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.errors import EvidenceError

from .graphs import (
    SMALL,
    chain,
    exact_flows,
    flows_of,
    hclt,
    hub,
    patches,
    random_evidence,
    small_circuit,
)

NAMES = sorted(SMALL)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_of_all_worlds_sum_to_one(name: str) -> None:
    circuit = small_circuit(name)
    worlds = enumerate_worlds(circuit.num_categories)
    log_prob = circuit(worlds)
    assert log_prob.dtype == torch.float32
    assert log_prob.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(
        log_prob.double(), log_prob_exact(circuit, worlds), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_missing_values_masks_and_latents_match_the_judge(name: str, seed: int) -> None:
    circuit = small_circuit(name, seed, noise=4.0)
    x, latents = random_evidence(circuit, 40, seed)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    for observed in (None, mask, mask[0]):
        for evidence in (None, latents):
            found = circuit(x, evidence, observed).double()
            expected = log_prob_exact(circuit, x, observed, evidence)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_logs", [False, True])
def test_flows_are_weights_times_the_gradient(name: str, in_logs: bool, monkeypatch) -> None:
    if in_logs:
        # Every product counts as weak, so that all samples take the log domain.
        monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
        monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)
    circuit = small_circuit(name, seed=3)
    circuit.set_smoothing(0.5, 0.3, 100)
    x, latents = random_evidence(circuit, 30, 3, missing=0.2)
    latents[:20] = -1
    sample_weights = torch.linspace(-1.0, 2.0, len(x))
    (circuit(x, latents) * sample_weights).sum().backward()
    expected = exact_flows(
        circuit, lambda log_prob: (log_prob * sample_weights).sum(), x, latents=latents
    )
    assert expected
    for region, flow in expected.items():
        torch.testing.assert_close(flows_of(circuit, region).double(), flow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_both_domains_give_the_same(name: str, monkeypatch) -> None:
    circuit = small_circuit(name, seed=4)
    x, latents = random_evidence(circuit, 16, 4)
    scaled = circuit(x, latents).detach()
    monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
    monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)
    torch.testing.assert_close(circuit(x, latents).detach(), scaled, rtol=1e-6, atol=1e-5)


def test_many_children_lose_no_mass() -> None:
    """30 children whose likely values differ, with weights down to 1e-8."""
    circuit = Circuit(hub(30, num_units=4), [3] * 31, seed=0, init_noise=9.0)
    x, _ = random_evidence(circuit, 60, 5, missing=0.1)
    log_prob = circuit(x)
    torch.testing.assert_close(log_prob.double(), log_prob_exact(circuit, x), rtol=1e-6, atol=1e-4)
    log_prob.sum().backward()
    expected = exact_flows(circuit, torch.sum, x)
    for region, flow in expected.items():
        torch.testing.assert_close(flows_of(circuit, region).double(), flow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_children", [2, 4, 5, 12, 30])
def test_hubs_with_opposed_children(num_children: int) -> None:
    """Half of the children all but exclude unit 0, the others unit 1."""
    circuit = Circuit(hub(num_children), [2] * (num_children + 1))
    for index, region in enumerate(circuit.graph.regions):
        statistics = circuit.statistics_of(index) if region.kind in ("input", "sum") else None
        if region.kind == "sum" and region.num_units == 2:
            statistics[:] = torch.eye(2)
        elif region.kind == "input":
            low = torch.tensor([1.0, 1e-35]) if (region.variable or 0) % 2 else torch.ones(2)
            high = torch.ones(2) if (region.variable or 0) % 2 else torch.tensor([1e-33, 1.0])
            statistics[0], statistics[1] = low, high
    x = torch.ones(1, num_children + 1, dtype=torch.int64)
    log_prob = circuit(x)
    expected = log_prob_exact(circuit, x)
    assert expected.isfinite()
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-6, atol=1e-5)
    log_prob.sum().backward()
    for parameter in circuit.parameters():
        assert parameter.grad.isfinite().all()
    root = flows_of(circuit, circuit.graph.root)
    assert root.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_a_long_chain() -> None:
    circuit = Circuit(chain(400, 3), [4] * 400, seed=1, init_noise=3.0)
    x, _ = random_evidence(circuit, 5, 2, missing=0.1)
    log_prob = circuit(x)
    torch.testing.assert_close(log_prob.double(), log_prob_exact(circuit, x), rtol=2e-6, atol=0)
    log_prob.sum().backward()
    assert flows_of(circuit, circuit.graph.root).sum().item() == pytest.approx(5.0, rel=1e-4)


@pytest.mark.parametrize(
    ("low", "x"), [(1e-25, [1, 1, 1, 0, 0]), (1e-20, [1] * 4 + [0] * 3), (1e-15, [1] * 5 + [0] * 4)]
)
def test_a_unit_that_underflows_may_dominate_higher_up(low: float, x: list[int]) -> None:
    circuit = Circuit(chain(len(x)), [2] * len(x))
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "sum" and region.num_units == 2:
            circuit.statistics_of(index)[:] = torch.eye(2)
        elif region.kind == "input":
            circuit.statistics_of(index)[:] = torch.tensor([[1.0, low], [low, 1.0]])
    batch = torch.tensor([x, [0] * len(x)])
    evaluation = circuit.evaluate(circuit.reader.read(batch))
    assert evaluation.again.tolist() == [0]
    exact = log_prob_exact(circuit, batch)
    torch.testing.assert_close(evaluation.log_prob.double(), exact, rtol=1e-6, atol=1e-5)
    circuit.set_smoothing(0.1, 0.0, 1000)
    smoothed = circuit.evaluate(circuit.reader.read(batch))
    exact = log_prob_exact(circuit, batch)
    torch.testing.assert_close(smoothed.log_prob.double(), exact, rtol=1e-6, atol=1e-5)
    assert not len(smoothed.again)


def test_nothing_and_everything_observed_and_batch_of_one() -> None:
    circuit = small_circuit("tied-patches")
    x, _ = random_evidence(circuit, 1, 0, missing=0.0)
    nothing = torch.zeros(circuit.num_variables, dtype=torch.bool)
    assert circuit(x, observed=nothing).item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(circuit(x, observed=~nothing), circuit(x))
    assert circuit(x).shape == (1,)
    assert circuit.log_prob(x.repeat(7, 1).numpy(), batch_size=3).shape == (7,)


def test_impossible_evidence_is_minus_infinity_and_has_no_flow() -> None:
    circuit = Circuit(hclt([-1, 0, 0, 1, 0, 0, 0], 2), [2] * 7)
    leaf = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 3)
    circuit.statistics_of(leaf)[:, 1] = 0.0
    x = torch.zeros(3, 7, dtype=torch.int64)
    x[1, 3] = 1
    log_prob = circuit(x)
    assert log_prob[1] == -torch.inf and log_prob[0].isfinite()
    assert circuit.last_impossible == 1
    log_prob.sum().backward()
    lone = {name: p.grad.clone() for name, p in circuit.named_parameters()}
    circuit.zero_grad()
    circuit(x[[0, 2]]).sum().backward()
    for name, parameter in circuit.named_parameters():
        torch.testing.assert_close(lone[name], parameter.grad)
    circuit.set_smoothing(1.0, 1.0, 10)
    assert circuit(x).isfinite().all()


def test_zero_weights_route_exactly() -> None:
    """With weights 0 and 1 only, one unit survives at every level: a deterministic circuit."""
    circuit = Circuit(hclt([-1, 0, 1, 2], 2), [2] * 4)
    for index, region in enumerate(circuit.graph.regions):
        if region.kind in ("input", "sum") and region.num_units == 2:
            circuit.statistics_of(index)[:] = torch.eye(2)
    worlds = enumerate_worlds(circuit.num_categories)
    log_prob = circuit(worlds)
    possible = (worlds == worlds[:, :1]).all(1)
    assert (log_prob.isneginf() == ~possible).all()
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    log_prob.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_latents_far_from_likely_are_finite() -> None:
    """An observed latent whose emission is 1e-60 of the likeliest one's."""
    circuit = Circuit(patches(2, 2, 2, tied=False), [2] * 4)
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "input":
            circuit.statistics_of(index)[0] = torch.tensor([1e-30, 1.0])
            circuit.statistics_of(index)[1] = torch.tensor([1.0, 1e-30])
    x = torch.zeros(1, 4, dtype=torch.int64)
    for latents in ([[0, 0]], [[0, 1]], [[0, -1]]):
        found = circuit(x, torch.tensor(latents))
        expected = log_prob_exact(circuit, x, latents=torch.tensor(latents))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_uses_are_row_sums_after_online_em() -> None:
    """A row's statistics sum to its expected uses, whatever the number of steps."""
    for name in ("tied-patches", "grouped-patches", "tied-chain"):
        circuit = small_circuit(name, seed=2)
        x, _ = random_evidence(circuit, 64, 1, missing=0.0)
        before = circuit(x).mean().item()
        for _ in range(60):
            circuit.zero_grad()
            (-circuit(x).sum() / len(x)).backward()
            with torch.no_grad():
                for parameter in circuit.parameter_groups()["em"]:
                    parameter.mul_(0.5).sub_(parameter.grad, alpha=0.5)
        assert circuit(x).mean().item() > before
        # At the fixed point the model's own expected uses agree with the data's.
        uses = circuit.uses()
        root = circuit.statistics_of(circuit.graph.root)
        assert root.sum().item() == pytest.approx(1.0, abs=1e-5)
        for index, region in enumerate(circuit.graph.regions):
            if region.kind in ("sum", "input"):
                bank, table = circuit.bank_of(index)
                owners = circuit.schedule.banks[circuit.bank_list.index(bank)].owners[table]
                total = circuit.statistics_of(index).sum().item()
                used = sum(uses[owner].sum().item() for owner in owners)
                assert total == pytest.approx(used, rel=2e-3)


def test_rescaled_statistics_are_the_expected_flows() -> None:
    circuit = small_circuit("grouped-patches", seed=5)
    circuit.rescale_to_uses_()
    x = torch.full((1, circuit.num_variables), -1)
    circuit(x).sum().backward()
    for name, parameter in circuit.named_parameters():
        if name.startswith("banks.sum"):
            torch.testing.assert_close(parameter.grad, parameter.detach(), rtol=1e-4, atol=1e-6)


def test_em_raises_the_likelihood() -> None:
    circuit = small_circuit("hclt", seed=6)
    x, _ = random_evidence(circuit, 100, 6, missing=0.2)
    last = -float("inf")
    for _ in range(4):
        circuit.zero_grad()
        log_prob = circuit(x).mean()
        assert log_prob.item() > last
        last = log_prob.item()
        (-log_prob).backward()
        with torch.no_grad():
            for parameter in circuit.parameters():
                # A step of 1 is one step of full-batch EM.
                parameter.mul_(0.0).sub_(parameter.grad)


def test_same_seed_same_parameters() -> None:
    first, second = small_circuit("hclt", 7), small_circuit("hclt", 7)
    other = small_circuit("hclt", 8)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_every_process_takes_part_in_the_log_pass() -> None:
    """With `any_rank` true, a batch without weak samples runs an empty log pass as well."""
    circuit = small_circuit("grouped-patches")
    x, _ = random_evidence(circuit, 8, 0)
    plain = circuit(x)
    plain.sum().backward()
    grads = [parameter.grad.clone() for parameter in circuit.parameters()]
    circuit.zero_grad()
    asked = []
    circuit.any_rank = lambda here: not asked.append(here)
    again = circuit(x)
    again.sum().backward()
    assert asked == [False]
    assert torch.equal(plain, again)
    for grad, parameter in zip(grads, circuit.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_monitoring() -> None:
    circuit = small_circuit("tied-patches")
    entropies = circuit.entropy_of_weights()
    assert entropies and all(0 < value <= 1.585 for value in entropies.values())
    assert circuit.num_parameters == sum(p.numel() for p in circuit.parameters())
    assert circuit.num_latents == 3


@pytest.mark.parametrize(
    ("x", "more", "says"),
    [
        ([[0, 9, 0, 0, 0, 0]], {}, ("variable 1", "9", "0 .. 1")),
        ([[-2, 0, 0, 0, 0, 0]], {}, ("variable 0", "-2")),
        ([[0.5, 0, 0, 0, 0, 0]], {}, ("variable 0", "0.5", "whole")),
        ([[0, 0, 0]], {}, ("(1, 3)", "6")),
        ([[0] * 6], {"observed": [True, False]}, ("mask", "(6,)")),
        ([[0] * 6], {"latents": [[0, 3, 0]]}, ("latent 1", "3", "0 .. 2")),
        ([[0] * 6], {"latents": [[0]]}, ("latents",)),
    ],
)
def test_evidence_that_does_not_fit_is_refused(x, more, says) -> None:
    circuit = small_circuit("tied-patches")
    more = {key: torch.tensor(value) for key, value in more.items()}
    with pytest.raises(EvidenceError) as caught:
        circuit(torch.tensor(x), **more)
    assert all(text in str(caught.value) for text in says), str(caught.value)


def test_batches_are_refused_by_their_row_and_as_a_whole() -> None:
    circuit = small_circuit("tied-patches")
    x = np.zeros((5, 6))
    x[3, 1] = 0.5
    with pytest.raises(EvidenceError, match=r"variable 1, row 3 of x"):
        circuit.log_prob(x, batch_size=2)
    x = np.zeros((5, 6), int)[::-1]
    assert circuit.log_prob(x).shape == (5,) and circuit.log_prob(x[:0]).shape == (0,)
    for more in ({"latents": np.zeros((9, 3), int)}, {"observed": np.ones((4, 6), bool)}):
        with pytest.raises(EvidenceError, match="5, "):
            circuit.log_prob(x, batch_size=2, **more)
    for wrong in (3, "abc", x.astype(complex), x[0], [[1], [1, 2]], None):
        with pytest.raises(EvidenceError):
            circuit.log_prob(wrong)
