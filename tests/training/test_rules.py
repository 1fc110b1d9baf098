"""Rules against independent float64 implementations of `papers.md` C.3 on the judge's flows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "circuits"))

from graphs import chain, hclt, random_evidence, small_circuit, tree_parents

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import exact_weights, log_prob_exact
from distpc.config.schema import WHOLE_ROWS
from distpc.errors import ConfigError, TrainingError
from distpc.training.fit import fit
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import (
    RULES,
    Smoothing,
    convert_,
    make_rule,
    needs_whole_rows,
    refuse_shards,
)

BATCH, STEPS, N = 6, 3, 50
SMOOTHING = Smoothing(0.3, 0.6, N)
CIRCUITS: dict[str, Callable[[], Circuit]] = {
    "dense": lambda: small_circuit("hclt"),
    "tied": lambda: small_circuit("tied-chain"),
    "shared": lambda: small_circuit("shared-child"),
    "monarch": lambda: small_circuit("monarch"),
    "gaussian": lambda: Circuit(hclt(tree_parents(4, 0), 3), [None] * 4, seed=1),
    "mixed": lambda: Circuit(chain(4, 2), [3, None, 2, None], seed=2),
}
STEP_SIZES = [0.4, 0.2, 0.1]


def batches(circuit: Circuit) -> list[Tensor]:
    """Batches with missing values."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        columns = []
        for categories in circuit.num_categories:
            if categories is None:
                columns.append(0.5 + torch.randn(BATCH, generator=generator))
            else:
                columns.append(torch.randint(0, categories, (BATCH,), generator=generator))
        x = torch.stack([column.float() for column in columns], 1)
        x[torch.rand(x.shape, generator=generator) < 0.2] = torch.nan
        found.append(x)
    return found


def is_real(circuit: Circuit, region: int) -> bool:
    variable = circuit.graph.regions[region].variable
    return variable is not None and circuit.num_categories[variable] is None


class Straightforward:
    """The formulas row by row in float64: a table a distinct parameter, tied regions together.

    Of a table (rows, entries) `theta` holds weights, or for Gaussians the moments (1, m1, m2) of
    standardised values (centre 0 and spread 1 here); `flow` the flows *summed* over a batch.
    """

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.owners: list[list[int]] = [
            owners for plan in circuit.schedule.banks for owners in plan.owners
        ]
        self.is_sum = [circuit.graph.regions[owners[0]].kind == "sum" for owners in self.owners]
        weights = exact_weights(circuit)
        self.is_real = [is_real(circuit, owners[0]) for owners in self.owners]
        self.theta = [
            _moments(weights[owners[0]]) if real else weights[owners[0]]
            for owners, real in zip(self.owners, self.is_real, strict=True)
        ]
        self.memory: list[dict[str, Any]] = [{} for _ in self.owners]

    def weights(self) -> dict[int, Tensor]:
        """What the judge evaluates with."""
        found = {}
        for owners, theta, real in zip(self.owners, self.theta, self.is_real, strict=True):
            table = theta
            if real:
                mean = theta[:, 1]
                variance = (theta[:, 2] - mean**2).clamp_min(1e-4)
                table = torch.stack([mean, variance], 1)
            found.update(dict.fromkeys(owners, table.clone()))
        return found

    def flows(self, x: Tensor) -> list[Tensor]:
        """Sums over the batch of theta * dlogp/dtheta; of Gaussians those of (1, z, z^2)."""
        weights = self.weights()
        for tensor in {id(tensor): tensor for tensor in weights.values()}.values():
            tensor.requires_grad_()
        log_prob_exact(self.circuit, x, weights=weights).sum().backward()
        found = []
        for owners, real in zip(self.owners, self.is_real, strict=True):
            tensor = weights[owners[0]]
            assert tensor.grad is not None
            if not real:
                found.append((tensor * tensor.grad).detach())
        flows = iter(found)
        return [
            self._gaussian_flow(owners, weights, x) if real else next(flows)
            for owners, real in zip(self.owners, self.is_real, strict=True)
        ]

    def _gaussian_flow(self, owners: list[int], weights: dict[int, Tensor], x: Tensor) -> Tensor:
        """Posterior uses of each unit, sample by sample, times (1, z, z^2): the use is the
        derivative of log p in a constant added to the unit's log density."""
        total = torch.zeros(len(weights[owners[0]]), 3, dtype=torch.float64)
        for owner in owners:
            variable = self.circuit.graph.regions[owner].variable
            for sample in x:
                z = sample[variable].double()
                if z.isnan():
                    continue
                uses = self._uses(owner, weights, sample)
                total += uses.unsqueeze(1) * torch.stack([z**0, z, z**2])
        return total

    def _uses(self, owner: int, weights: dict[int, Tensor], sample: Tensor) -> Tensor:
        plain = {index: tensor.detach() for index, tensor in weights.items()}
        variance = plain[owner][:, 1]
        variable = self.circuit.graph.regions[owner].variable
        square = (sample[variable].double() - plain[owner][:, 0]) ** 2
        # d log N / d variance = (square / variance - 1) / (2 variance), nonzero almost surely.
        slope = (square / variance - 1) / (2 * variance)
        own = plain[owner].clone().requires_grad_()
        log_prob_exact(self.circuit, sample[None], weights={**plain, owner: own}).sum().backward()
        assert own.grad is not None
        return own.grad[:, 1] / slope

    def uses(self) -> list[Tensor]:
        """TD of each row, from the root down; a tied row is used in all of its regions."""
        graph, weights = self.circuit.graph, self.weights()
        found = [torch.zeros(region.num_units, dtype=torch.float64) for region in graph.regions]
        found[graph.root][:] = 1.0
        for index in reversed(range(len(graph.regions))):
            region, down = graph.regions[index], found[index]
            if region.kind == "sum":
                mixed = torch.from_numpy(graph.mixed_units(index))
                found[region.children[0]].index_add_(
                    0, mixed.flatten(), (weights[index] * down.unsqueeze(1)).flatten()
                )
            elif region.kind == "product":
                for child in region.children:
                    found[child] += down
            elif region.kind == "kronecker":
                left, right = region.children
                grid = down.view(len(found[left]), len(found[right]))
                found[left] += grid.sum(1)
                found[right] += grid.sum(0)
            elif region.kind == "concat":
                sizes = [len(found[child]) for child in region.children]
                for child, part in zip(region.children, down.split(sizes), strict=True):
                    found[child] += part
        return [torch.stack([found[owner] for owner in owners]).sum(0) for owners in self.owners]

    def prior(self, table: int, pc: float) -> Tensor:
        """pc spread over a row; of Gaussians pc observations of mean 0 and variance 1."""
        if self.is_real[table]:
            return pc * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
        return torch.full((self.theta[table].shape[1],), pc / self.theta[table].shape[1]).double()

    def normalise(self, table: int, values: Tensor) -> Tensor:
        total = values[:, :1] if self.is_real[table] else values.sum(1, keepdim=True)
        return values / total

    def pseudocount(self, table: int) -> float:
        return SMOOTHING.pseudocount if self.is_sum[table] else SMOOTHING.leaf_pseudocount

    # The rules, as C.3 writes them; `pc` in the unit of the flows of each.

    def full_batch_em(self, flows: list[Tensor], step_size: float) -> None:
        for table, flow in enumerate(flows):
            pc = self.pseudocount(table) * BATCH / N
            self.theta[table] = self.normalise(table, flow + self.prior(table, pc))

    def mini_batch_em(self, flows: list[Tensor], step_size: float) -> None:
        for table, flow in enumerate(flows):
            pc = self.pseudocount(table) * BATCH / N
            target = self.normalise(table, flow + self.prior(table, pc))
            self.theta[table] = (1 - step_size) * self.theta[table] + step_size * target

    def anemone(self, flows: list[Tensor], step_size: float, momentum: float = 0.0) -> None:
        uses = self.uses()
        for table, flow in enumerate(flows):
            memory = self.memory[table]
            memory["t"] = memory.get("t", -1) + 1
            flow = (1 - momentum) * flow
            memory["buffer"] = momentum * memory.get("buffer", torch.zeros_like(flow)) + flow
            flow = memory["buffer"] / (1 - momentum ** (memory["t"] + 1))
            mixed = step_size / BATCH * flow
            mixed = mixed + (1 - step_size) * uses[table].unsqueeze(1) * self.theta[table]
            pc = self.pseudocount(table) / N
            self.theta[table] = self.normalise(table, mixed + self.prior(table, pc))

    def anemone_with_momentum(self, flows: list[Tensor], step_size: float) -> None:
        self.anemone(flows, step_size, momentum=0.9)

    def adam(self, flows: list[Tensor], step_size: float) -> None:
        """torch's Adam on logits (for Gaussians mean and log deviation), gradients by autograd of
        the log-likelihood that the flows are of: sum of flow * log theta(logits)."""
        for table, flow in enumerate(flows):
            memory = self.memory[table]
            if "adam" not in memory:
                theta = self.theta[table]
                mean = theta[:, 1]
                start = (
                    torch.stack([mean, 0.5 * (theta[:, 2] - mean**2).log()])
                    if self.is_real[table]
                    else theta.log()
                )
                memory["logits"] = start.clone().requires_grad_()
                memory["adam"] = torch.optim.Adam([memory["logits"]], lr=step_size)
            logits = memory["logits"]
            if self.is_real[table]:
                mean, deviation = logits[0], logits[1].exp()
                square = flow[:, 2] - 2 * mean * flow[:, 1] + mean**2 * flow[:, 0]
                likelihood = (-0.5 * square / deviation**2 - flow[:, 0] * deviation.log()).sum()
            else:
                likelihood = (flow * logits.log_softmax(1)).sum()
            (-likelihood / BATCH).backward()
            logits.grad.clamp_(-5, 5)
            memory["adam"].param_groups[0]["lr"] = step_size
            memory["adam"].step()
            memory["adam"].zero_grad()
            with torch.no_grad():
                if self.is_real[table]:
                    variance = (2 * logits[1]).exp()
                    self.theta[table] = torch.stack(
                        [torch.ones_like(variance), logits[0], variance + logits[0] ** 2], 1
                    )
                else:
                    self.theta[table] = logits.softmax(1)

    def online_em(self, flows: list[Tensor], step_size: float) -> None:
        """DESIGN 2.1: running means of flows per sample, read out with smoothing."""
        for table, flow in enumerate(flows):
            memory = self.memory[table]
            memory["S"] = (1 - step_size) * memory["S"] + step_size * flow / BATCH
            pc = self.pseudocount(table) / N
            self.theta[table] = self.normalise(table, memory["S"] + self.prior(table, pc))

    def growing_em(self, flows: list[Tensor], step_size: float) -> None:
        """Exact M-steps on the mean flow of batch 1, of 2 and 3, of 4 to 7 ..."""
        for table, flow in enumerate(flows):
            memory = self.memory[table]
            waiting = [*memory.get("flows", []), flow / BATCH]
            memory["flows"] = waiting
            if len(waiting) == memory.get("wanted", 1):
                memory["S"] = torch.stack(waiting).mean(0)
                memory["flows"], memory["wanted"] = [], 2 * len(waiting)
            pc = self.pseudocount(table) / N
            self.theta[table] = self.normalise(table, memory["S"] + self.prior(table, pc))


def _moments(weights: Tensor) -> Tensor:
    mean, variance = weights.unbind(1)
    return torch.stack([torch.ones_like(mean), mean, variance + mean**2], 1)


def learn(circuit: Circuit, optimizer: CircuitOptimizer, x: Tensor, step_size: float) -> None:
    optimizer.set_step_size(step_size)
    optimizer.zero_grad()
    (-circuit(x).sum() / len(x)).backward()
    optimizer.step()


RULE_CASES = {**{name: (name, {}) for name in RULES if name != "anemone"}}
RULE_CASES["anemone"] = ("anemone", {"momentum": 0.0})
RULE_CASES["anemone_with_momentum"] = ("anemone", {"momentum": 0.9})


@pytest.mark.parametrize("shape", CIRCUITS)
@pytest.mark.parametrize("case", RULE_CASES)
def test_steps_follow_the_formulas(case: str, shape: str) -> None:
    # Float64 parameters leave 1e-8 of rounding, from float32 log-likelihoods and uses.
    circuit = CIRCUITS[shape]().double()
    name, options = RULE_CASES[case]
    judge = Straightforward(circuit)
    rule = make_rule(name, circuit, SMOOTHING, **options)
    rule.start()
    if name in ("online_em", "growing_em"):
        # Random circuits start with S = theta * uses, whose read-out is smoothed from here on.
        memory = [
            {"S": theta * uses.unsqueeze(1)}
            for theta, uses in zip(judge.theta, judge.uses(), strict=True)
        ]
        judge = Straightforward(circuit)
        judge.memory = memory
    optimizer = CircuitOptimizer(circuit.parameter_groups(), rule=rule)
    for x, step_size in zip(batches(circuit), STEP_SIZES, strict=True):
        step_size = step_size / 10 if name == "adam" else step_size
        flows = judge.flows(x)
        learn(circuit, optimizer, x, step_size)
        getattr(judge, case)(flows, step_size)
        ours, theirs = exact_weights(circuit), judge.weights()
        for region, expected in theirs.items():
            torch.testing.assert_close(ours[region], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", ["tied", "monarch", "mixed"])
@pytest.mark.parametrize("name", RULES)
def test_rows_sum_to_one_and_statistics_return_to_the_flow_scale(name: str, shape: str) -> None:
    circuit = CIRCUITS[shape]()
    rule = make_rule(name, circuit, SMOOTHING)
    rule.start()
    optimizer = CircuitOptimizer(circuit.parameter_groups(), rule=rule)
    for x in batches(circuit):
        learn(circuit, optimizer, x, 0.05)
        for region, weights in exact_weights(circuit).items():
            assert bool(weights.isfinite().all())
            if not is_real(circuit, region):
                torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)).double())
    x = batches(circuit)[0]
    before = circuit(x)
    convert_(circuit, Smoothing(0.0, 0.0, N))
    torch.testing.assert_close(circuit(x), before, rtol=1e-6, atol=1e-6)
    uses = circuit.uses()
    for bank, plan in zip(circuit.bank_list, circuit.schedule.banks, strict=True):
        for table, owners in enumerate(plan.owners):
            rows = bank.statistics_of(table)
            total = rows[:, 0] if is_real(circuit, owners[0]) else rows.sum(1)
            expected = torch.stack([uses[owner] for owner in owners]).sum(0)
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["dense", "tied", "gaussian", "mixed"])
def test_converting_keeps_the_model(shape: str) -> None:
    circuit = CIRCUITS[shape]()
    x = torch.cat(batches(circuit))
    fit(circuit, x, rule="anemone", epochs=3, batch_size=6, progress=False)
    for smoothing in (SMOOTHING, Smoothing(5.0, 9.0, 20), Smoothing(0.0, 0.0, 1), SMOOTHING):
        before = log_prob_exact(circuit, x)
        convert_(circuit, smoothing)
        torch.testing.assert_close(log_prob_exact(circuit, x), before, rtol=0, atol=1e-6)
        assert circuit.smoothing == smoothing


def test_weights_of_zero_survive_a_conversion_without_falling_below_it() -> None:
    circuit = small_circuit("hclt")
    region = next(i for i, r in enumerate(circuit.graph.regions) if r.kind == "sum")
    circuit.statistics_of(region)[:, 0] = 0.0
    convert_(circuit, SMOOTHING)
    weights = circuit.weights_of(region, torch.float64)
    assert bool((weights >= 0).all()) and float(weights[:, 0].max()) < 1e-7
    assert bool(circuit(torch.zeros(2, 6).long()).isfinite().all())


def samples(count: int, seed: int = 0) -> Tensor:
    """Rows that copy their first entry three times in four."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2, (count, 7), generator=generator)
    copied = torch.rand(x.shape, generator=generator) < 0.75
    return torch.where(copied, x[:, :1], x)


@pytest.mark.parametrize("name", RULES)
def test_fit_learns_by_every_rule_and_online_em_goes_on_from_there(name: str) -> None:
    circuit, x, valid = small_circuit("hclt-2"), samples(300), samples(100, seed=1)
    options = {"step_size": 0.05} if name == "adam" else {}
    history = fit(
        circuit, x, rule=name, epochs=8, batch_size=50, valid=valid, progress=False, **options
    )
    assert history[-1]["valid_bits"] < history[0]["valid_bits"] < 1.1
    best = min(row["valid_bits"] for row in history)
    found = -float(circuit.log_prob(valid).double().mean()) / 7 / math.log(2)
    assert found == pytest.approx(best, abs=1e-5)
    after = fit(circuit, x, epochs=2, step_size=0.02, batch_size=50, valid=valid, progress=False)
    assert after[0]["valid_bits"] < best + 0.01


def test_full_batch_em_takes_all_flows_of_an_epoch_at_once() -> None:
    x = samples(60)
    once, parts = small_circuit("hclt-2"), small_circuit("hclt-2")
    for circuit, size in ((once, 60), (parts, 17)):
        fit(circuit, x, rule="full_batch_em", epochs=3, batch_size=size, progress=False)
    for ours, theirs in zip(once.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_updating_in_backward_fits_the_same_circuit() -> None:
    circuits = [small_circuit("tied-chain") for _ in range(2)]
    x = random_evidence(circuits[0], 40, 0)[0]
    for circuit, early in zip(circuits, (False, True), strict=True):
        fit(circuit, x, epochs=2, batch_size=16, update_in_backward=early, progress=False)
    for ours, theirs in zip(*(circuit.parameters() for circuit in circuits), strict=True):
        assert torch.equal(ours, theirs)


def test_rules_that_need_whole_rows_are_refused_where_rows_are_cut() -> None:
    circuit, moments = small_circuit("hclt"), CIRCUITS["gaussian"]()
    for name in ("online_em", "growing_em", "adam"):
        refuse_shards(make_rule(name, circuit, SMOOTHING), 3)
        assert not needs_whole_rows(name, circuit.num_categories)
    whole = [(name, circuit) for name in WHOLE_ROWS] + [("adam", moments)]
    assert {name for name, _ in whole} | {"online_em", "growing_em"} == set(RULES)
    for name, one in whole:
        rule = make_rule(name, one, SMOOTHING)
        assert needs_whole_rows(name, one.num_categories)
        refuse_shards(rule, 0)
        with pytest.raises(TrainingError, match=f"'{name}' needs whole rows"):
            refuse_shards(rule, 1)


def test_unknown_rules_and_schedules_are_named() -> None:
    for setting in ({"rule": "sgd"}, {"schedule": "stairs"}):
        with pytest.raises(ConfigError, match="no such") as caught:
            fit(small_circuit("hclt-2"), samples(9), progress=False, **setting)
        assert caught.value.where == next(iter(setting))
