"""Transforms of circuits, on every shape of graph, against the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.circuits import load_model, save_model
from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.circuits.sums import SumBank
from distpc.circuits.transforms import (
    DEAD_BELOW,
    aggregate_flows,
    count_dead,
    fold_smoothing,
    grow,
    merge_states,
    prune_edges,
    prune_states,
    reseed_states,
    similar_states,
    split_states,
)
from distpc.circuits.transforms.dead import exchangeable, find_dead
from distpc.circuits.transforms.merge import Pair
from distpc.circuits.transforms.prune import uses_of
from distpc.circuits.transforms.states import find_states
from distpc.errors import ConfigError, StructureError
from distpc.structures.builder import GraphBuilder
from distpc.training.fit import fit

from .graphs import SMALL, exact_flows, hclt, random_evidence, small_circuit

NAMES = sorted(SMALL)
FIXED = ["one-input"]
"""Graphs whose only unit is the root's."""
RIGID = ["monarch", "monarch-wide"]
"""Graphs with blocks of several units: no single one can change."""
FREE = [name for name in NAMES if name not in FIXED + RIGID]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def samples(circuit: Circuit, number: int = 60, seed: int = 0) -> torch.Tensor:
    return circuit.sample(number, seed)


def assert_same(new: Circuit, old: Circuit, atol: float = 2e-6) -> None:
    """Equal likelihoods, with missing values too, by the judge and by the engine."""
    x, _ = random_evidence(old, 50, 1)
    expected = log_prob_exact(old, x)
    torch.testing.assert_close(log_prob_exact(new, x), expected, rtol=0, atol=atol)
    torch.testing.assert_close(new(x).double(), expected, rtol=1e-6, atol=2e-5)


def assert_sound(circuit: Circuit) -> None:
    """Rows sum to one, all worlds too, and statistics are on the scale of flows."""
    worlds = enumerate_worlds(circuit.num_categories)
    assert log_prob_exact(circuit, worlds).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def assert_on_flow_scale(circuit: Circuit) -> None:
    before = [parameter.detach().clone() for parameter in circuit.parameters()]
    circuit.rescale_to_uses_()
    for old, new in zip(before, circuit.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_aggregate_flows_are_the_judges(name: str) -> None:
    circuit = small_circuit(name, seed=2)
    x, _ = random_evidence(circuit, 40, 2)
    flows = aggregate_flows(circuit, x, batch_size=16)
    assert flows.num_samples == 40 and flows.impossible == 0
    assert flows.log_prob == pytest.approx(float(log_prob_exact(circuit, x).sum()), rel=1e-6)
    for region, expected in exact_flows(circuit, torch.sum, x).items():
        bank, table = circuit.bank_of(region)
        edges = flows.edges[circuit.bank_list.index(bank)]
        found = edges[table] if isinstance(bank, SumBank) else edges[bank.table(table)].T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if circuit.graph.regions[region].kind == "sum":
            owners = circuit.schedule.banks[circuit.bank_list.index(bank)].owners[table]
            uses = torch.stack([flows.nodes[owner] for owner in owners]).sum(0)
            torch.testing.assert_close(uses, expected.sum(-1), rtol=1e-4, atol=1e-5)


def test_flows_leave_out_impossible_samples_and_leave_the_circuit_alone() -> None:
    circuit = small_circuit("hclt")
    circuit.statistics_of(circuit.graph.regions[-1].children[0] - 1)
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "input" and region.variable == 0:
            circuit.statistics_of(index)[:, 0] = 0.0
    x = torch.zeros(3, 6, dtype=torch.int64)
    x[1:, 0] = 1
    flows = aggregate_flows(circuit, [x[:2], x[2:]])
    assert (flows.num_samples, flows.impossible) == (3, 1)
    assert flows.nodes[circuit.graph.root].item() == pytest.approx(2.0)
    assert all(parameter.grad is None for parameter in circuit.parameters())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FIXED])
@pytest.mark.parametrize("cross", [1.0, 0.2])
def test_clones_without_noise_change_nothing(name: str, cross: float) -> None:
    circuit = small_circuit(name, seed=5)
    new = grow(circuit, noise=0.0, cross=cross)
    assert_same(new, circuit)
    assert_on_flow_scale(new)
    root = circuit.graph.root
    for region, of_new in zip(circuit.graph.regions[:root], new.graph.regions[:root], strict=True):
        expected = 4 if region.kind == "kronecker" else 2
        assert of_new.num_units == expected * region.num_units


def test_a_dense_sum_grows_fourfold() -> None:
    circuit = Circuit(hclt([-1, 0, 0], 4), [2] * 3)
    new = grow(circuit)
    sums = [i for i, r in enumerate(circuit.graph.regions) if r.kind == "sum" and r.num_units > 1]
    for index in sums:
        assert new.statistics_of(index).numel() == 4 * circuit.statistics_of(index).numel()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FIXED])
def test_noise_tells_clones_apart(name: str) -> None:
    circuit = small_circuit(name, seed=5)
    new = grow(circuit, noise=0.3, seed=1)
    assert_sound(new)
    x, _ = random_evidence(circuit, 50, 1, missing=0.0)
    difference = (log_prob_exact(new, x) - log_prob_exact(circuit, x)).abs()
    assert 1e-4 < difference.mean() < 1.0
    states = find_states(circuit)
    for index, region in enumerate(new.graph.regions[:-1]):
        if region.kind == "input":
            weights = new.weights_of(index)
            if not states.pinned[states.of_units[index]].any():
                assert not torch.allclose(weights[0::2], weights[1::2], atol=1e-4)
    assert torch.equal(grow(circuit, seed=1)(x), new(x))
    assert not torch.equal(grow(circuit, seed=2)(x), new(x))


@pytest.mark.parametrize("name", FREE)
def test_only_the_most_used_states_are_cloned(name: str) -> None:
    circuit = small_circuit(name, seed=6)
    x = samples(circuit)
    new = grow(circuit, noise=0.0, quantile=0.6, flows=aggregate_flows(circuit, x))
    assert circuit.num_parameters < new.num_parameters < grow(circuit).num_parameters
    assert_same(new, circuit)
    assert_on_flow_scale(new)


@pytest.mark.parametrize("name", FREE)
def test_split_and_merge_are_inverse(name: str) -> None:
    circuit = small_circuit(name, seed=7)
    unit = next(
        (index, 0)
        for index, region in enumerate(circuit.graph.regions)
        if region.kind == "input" and region.num_units > 1
    )
    split = split_states(circuit, [unit], noise=0.0)
    assert split.num_parameters > circuit.num_parameters
    assert_same(split, circuit)
    assert_on_flow_scale(split)
    best = similar_states(split, 1)[0]
    assert best.cost == pytest.approx(0.0, abs=1e-6)
    merged = merge_states(split, [best], samples(circuit))
    assert merged.loss == pytest.approx(0.0, abs=1e-6)
    for a, b in zip(merged.circuit.parameters(), circuit.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    noisy = split_states(circuit, [unit], noise=0.5)
    assert_sound(noisy)
    assert not torch.allclose(noisy.weights_of(unit[0])[0], noisy.weights_of(unit[0])[1])


@pytest.mark.parametrize("name", FREE)
def test_merging_adds_statistics(name: str) -> None:
    circuit = small_circuit(name, seed=8)
    pairs = similar_states(circuit, 2)
    assert pairs and [pair.cost for pair in pairs] == sorted(pair.cost for pair in pairs)
    merged = merge_states(circuit, pairs, samples(circuit))
    assert_sound(merged.circuit)
    assert merged.circuit.num_parameters < circuit.num_parameters
    for index, region in enumerate(circuit.graph.regions):
        if region.kind in ("input", "sum"):
            total = merged.circuit.statistics_of(index).sum()
            torch.testing.assert_close(total, circuit.statistics_of(index).sum())


def test_the_cheapest_pair_loses_least() -> None:
    """Of four emissions the closest two are found, and merging them costs least."""
    circuit = Circuit(hclt([-1, 0], 4), [2, 2], seed=0, init_noise=3.0)
    low = torch.tensor([0.05, 0.4, 0.45, 0.95])
    for region in (0, 3):
        circuit.statistics_of(region)[:] = torch.stack([low, 1 - low], 1)
    for region in (2, 5):
        circuit.statistics_of(region)[:] = 1.0 + torch.eye(4)[: len(circuit.statistics_of(region))]
    circuit.rescale_to_uses_()
    pairs = similar_states(circuit, 9)
    assert len(pairs) == 4
    assert {(p.region, p.first, p.second) for p in pairs} == {
        (region, *units) for region in (1, 4) for units in ((1, 2), (0, 3))
    }
    x = circuit.sample(2000, 1)
    near = merge_states(circuit, pairs[:1], x).loss
    far = merge_states(circuit, [Pair(pairs[0].region, 0, 3)], x).loss
    assert near < far


def cut_edges(circuit: Circuit) -> list[int]:
    """Cut the edges into one state of each group, so that nothing uses them; those states."""
    states = find_states(circuit)
    groups = exchangeable(states)
    dead = [group[1] for group in groups if len(group) > 1]
    assert dead
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "sum":
            child = region.children[0]
            below = circuit.graph.regions[child]
            if below.kind == "kronecker":
                left, right = (np.isin(states.of_units[c], dead) for c in below.children)
                gone = (left[:, None] | right).flatten()
            else:
                gone = np.isin(states.of_units[child], dead)
            mixed = circuit.graph.mixed_units(index)
            circuit.statistics_of(index)[torch.from_numpy(gone[mixed])] = 0.0
    return dead


@pytest.mark.parametrize("name", FREE)
def test_unused_states_go_without_a_trace(name: str) -> None:
    circuit = small_circuit(name, seed=9)
    states, dead = find_states(circuit), cut_edges(circuit)
    circuit.rescale_to_uses_()
    pruned = prune_states(circuit)
    assert pruned.circuit.num_parameters < circuit.num_parameters
    assert find_states(pruned.circuit).number == states.number - len(dead)
    assert_same(pruned.circuit, circuit)
    assert_on_flow_scale(pruned.circuit)
    reseeded = reseed_states(circuit, noise=0.0)
    assert reseeded.number == len(dead)
    assert_same(reseeded.circuit, circuit)
    assert_on_flow_scale(reseeded.circuit)
    assert reseed_states(reseeded.circuit).number == 0
    noisy = reseed_states(circuit).circuit
    assert_sound(noisy)
    assert noisy.graph.to_json() == circuit.graph.to_json()


@pytest.mark.parametrize("name", FREE)
def test_states_that_live_on_smoothing_are_dead(name: str) -> None:
    circuit = small_circuit(name, seed=9)
    assert count_dead(circuit).number == 0
    dead = cut_edges(circuit)
    # Strong enough for every state to look used to the model's own probabilities.
    circuit.set_smoothing(1000.0, 1000.0, 10)
    states = find_states(circuit)
    by_model = find_dead(states, exchangeable(states), uses_of(circuit, None), DEAD_BELOW)
    assert not by_model.any()
    found = count_dead(circuit)
    assert found.number == len(dead) < found.of
    again = reseed_states(circuit)
    assert again.number == len(dead) and count_dead(again.circuit).number == 0


@pytest.mark.parametrize("name", FREE)
def test_every_region_keeps_a_state(name: str) -> None:
    circuit = small_circuit(name, seed=3)
    pruned = prune_states(circuit, threshold=1e6).circuit
    assert_sound(pruned)
    assert all(region.num_units >= 1 for region in pruned.graph.regions)
    half = prune_states(circuit, aggregate_flows(circuit, samples(circuit)), fraction=0.5)
    assert_sound(half.circuit)
    assert pruned.num_parameters <= half.circuit.num_parameters < circuit.num_parameters


@pytest.mark.parametrize("name", NAMES)
def test_pruned_edges_stay_gone(name: str, tmp_path: Path) -> None:
    circuit = small_circuit(name, seed=4)
    x = samples(circuit, 80)
    pruned = prune_edges(circuit, aggregate_flows(circuit, x), fraction=0.5)
    new = pruned.circuit
    fit(new, x, epochs=1, batch_size=20, pseudocount=5.0, progress=False)
    assert_sound(new)
    for bank in new.bank_list:
        if isinstance(bank, SumBank) and bank.mask is not None:
            assert bool(bank.mask.any(-1).all())
            assert not bank.weights()[~bank.mask].any() and not bank.statistics[~bank.mask].any()
            assert (bank.weights()[bank.mask] > 0).all()
    if name not in FIXED:
        gone = sum(
            int((~b.mask).sum()) for b in new.bank_list if getattr(b, "mask", None) is not None
        )
        total = sum(b.statistics.numel() for b in new.bank_list if isinstance(b, SumBank))
        rows = sum(b.statistics[..., 0].numel() for b in new.bank_list if isinstance(b, SumBank))
        assert gone == min(total // 2, total - rows)
    save_model(new, tmp_path, dataset={}, training={})
    again = load_model(tmp_path)
    assert torch.equal(again(x), new(x))
    if name in ("hclt-2", "tied-tucker", "two-splits"):
        # Masks travel through every other change.
        assert_same(grow(new := fold_smoothing(new), noise=0.0), new)
        assert_sound(merge_states(new, similar_states(new, 1)).circuit)
        assert_sound(prune_states(new).circuit)


@pytest.mark.parametrize("name", ["hclt", "tied-patches", "two-splits", "tucker"])
def test_folded_smoothing_leaves_the_weights(name: str) -> None:
    circuit = small_circuit(name, seed=1)
    circuit.set_smoothing(5.0, 3.0, 20)
    folded = fold_smoothing(circuit)
    assert folded.smoothing == (0.0, 0.0, 20) and circuit.smoothing == (5.0, 3.0, 20)
    assert_same(folded, circuit)
    assert_same(grow(folded, noise=0.0), circuit)
    assert grow(circuit).smoothing == circuit.smoothing


def test_transforms_follow_one_another() -> None:
    circuit = small_circuit("hclt-2", seed=2)
    x = samples(circuit, 100)
    new = grow(circuit, quantile=0.5)
    new = prune_edges(new, aggregate_flows(new, x), fraction=0.6).circuit
    new = prune_states(new).circuit
    new = merge_states(new, similar_states(new, 2)).circuit
    new = reseed_states(split_states(new, [(0, 0)]), below=1e-3).circuit
    assert_sound(new)
    fit(new, x, epochs=2, progress=False)
    assert_sound(new)


def test_real_variables_keep_their_moments() -> None:
    circuit = Circuit(hclt([-1, 0, 1], 3), [None, 3, None], seed=1)
    circuit.standardise(torch.tensor([7.0, 0.0, -2.0]), torch.tensor([3.0, 1.0, 0.1]))
    x = torch.tensor([[5.0, 1.0, -2.1], [9.5, 2.0, torch.nan], [torch.nan, -1.0, -1.9]])
    expected = log_prob_exact(circuit, x)
    for new in (grow(circuit, noise=0.0), split_states(circuit, [(0, 1)], noise=0.0)):
        torch.testing.assert_close(log_prob_exact(new, x), expected, rtol=0, atol=2e-6)
    assert log_prob_exact(grow(circuit, seed=3), x).isfinite().all()
    merged = merge_states(circuit, similar_states(circuit, 1), x)
    assert np.isfinite(merged.loss) and merged.circuit(x).isfinite().all()


@pytest.mark.parametrize("name", RIGID)
def test_single_units_of_block_diagonal_sums_are_refused(name: str) -> None:
    circuit = small_circuit(name)
    unit = (0, 0)
    for change in (
        lambda: prune_states(circuit),
        lambda: split_states(circuit, [unit]),
        lambda: reseed_states(circuit),
        lambda: similar_states(circuit, 1),
        lambda: merge_states(circuit, [Pair(0, 0, 1)]),
        lambda: grow(circuit, quantile=0.9),
    ):
        with pytest.raises(StructureError, match="block-diagonal") as caught:
            change()
        assert "region" in str(caught.value)


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(StructureError, match="no state"):
        grow(small_circuit("one-input"))
    circuit = small_circuit("hclt")
    flows = aggregate_flows(circuit, samples(circuit))
    with pytest.raises(StructureError, match="no such unit"):
        split_states(circuit, [(0, 3)])
    with pytest.raises(StructureError, match="on its own"):
        split_states(circuit, [(circuit.graph.root, 0)])
    with pytest.raises(StructureError, match="cannot be merged"):
        merge_states(circuit, [Pair(0, 1, 1)])
    with pytest.raises(StructureError, match="two pairs"):
        merge_states(circuit, [Pair(0, 0, 1), Pair(0, 1, 2)])
    for settings in ({}, {"fraction": 0.5, "threshold": 0.1}):
        with pytest.raises(ConfigError, match="one of the two"):
            prune_edges(circuit, flows, **settings)
    for change in (
        lambda: prune_edges(circuit, flows, fraction=1.0),
        lambda: prune_states(circuit, threshold=-1.0),
        lambda: grow(circuit, noise=float("nan")),
        lambda: grow(circuit, cross=1.5),
    ):
        with pytest.raises(ConfigError, match="out of its range"):
            change()


def test_a_product_over_a_kronecker_product_is_refused() -> None:
    builder = GraphBuilder()
    pair = builder.kronecker(builder.input(2, 0), builder.input(2, 1))
    circuit = Circuit(builder.finish(builder.product([pair, builder.input(4, 2)]), 3), [2, 2, 2])
    with pytest.raises(StructureError, match="Kronecker") as caught:
        grow(circuit)
    assert "region 2" in str(caught.value)
