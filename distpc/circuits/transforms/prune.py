"""Prunes what data hardly uses: edges, which become structural zeros, and whole states.

Dropping a set E of edges without renormalising leaves p(x) (1 - P_E(x)), with P_E(x) the posterior
probability that an induced tree uses any of them, and P_E(x) <= F_E(x), the sum of their flows.
Renormalising only makes the other weights larger. So the mean log-likelihood falls by at most

    bound = -(1/N) sum_x log(1 - F_E(x)),   to first order  estimate = (1/N) sum_x F_E(x)

(Dang, Liu, Van den Broeck, "Sparse Probabilistic Circuits via Pruning and Growing", NeurIPS 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.sums import SumBank
from distpc.circuits.transforms.carry import UnitMap, carry_over, mixing_blocks, unit_maps
from distpc.circuits.transforms.flows import Flows, batch_flows, evidence_batches
from distpc.circuits.transforms.states import States, find_states
from distpc.errors import ConfigError

Dropped = dict[int, Tensor]
"""For each sum region bool (K', fan-in), its dropped edges; tied regions have equal ones."""


class Pruned(NamedTuple):
    """A pruned circuit.

    Attributes:
        circuit: a new one.
        dropped: of the old circuit, for `pruning_bound`.
        estimate: first-order fall of the mean log-likelihood in nats, (1/N) sum of their flows;
            NaN where no flows of data were given.
    """

    circuit: Circuit
    dropped: Dropped
    estimate: float


class PruningBound(NamedTuple):
    """How much the mean log-likelihood may fall, in nats.

    Attributes:
        bound: -(1/N) sum log(1 - F_E(x)); infinite where an x needs the edges.
        estimate: (1/N) sum F_E(x).
    """

    bound: float
    estimate: float


def prune_edges(
    circuit: Circuit,
    flows: Flows,
    *,
    fraction: float | None = None,
    threshold: float | None = None,
) -> Pruned:
    """Drop the edges of sums that data uses least; the most used one of each unit stays.

    The shapes stay what they are: a dropped edge is a structural zero (see `SumBank.mask`), which
    smoothing and training never revive. Rows keep their totals.

    Args:
        circuit: left as it is.
        flows: of data, see `aggregate_flows`.
        fraction: of the edges that there are, in [0, 1); fewer go where every unit is down to one.
        threshold: or: drop edges used at most that often a sample.

    Raises:
        ConfigError: not exactly one rule, or one out of its range.
    """
    if (fraction is None) == (threshold is None):
        raise ConfigError("edges are pruned by a fraction or by a threshold, one of the two")
    _check("fraction", fraction, 1.0)
    _check("threshold", threshold, np.inf)
    sums = {n: bank for n, bank in enumerate(circuit.bank_list) if isinstance(bank, SumBank)}
    scores = {number: _scores(bank, flows.edges[number]) for number, bank in sums.items()}
    limit = _limit(list(scores.values()), fraction, threshold, flows.num_samples)
    new = copy.deepcopy(circuit)
    dropped: Dropped = {}
    estimate = 0.0
    for number in sums:
        edges = flows.edges[number]
        assert edges is not None
        drop = limit(scores[number])
        estimate += float(edges[drop].sum()) / max(flows.num_samples, 1)
        for table, owners in enumerate(circuit.schedule.banks[number].owners):
            dropped.update(dict.fromkeys(owners, drop[table]))
        if bool(drop.any()):
            target = new.bank_list[number]
            assert isinstance(target, SumBank)
            _mask(target, drop)
    return Pruned(new, dropped, estimate)


def prune_states(
    circuit: Circuit,
    flows: Flows | None = None,
    *,
    fraction: float | None = None,
    threshold: float = 0.0,
) -> Pruned:
    """Drop rarely used states and fold the circuit anew, smaller.

    A state is a unit of all regions that must have equally many (see `states`); every region keeps
    at least one. Values of latents are renumbered: the order of those that stay is kept.

    Args:
        circuit: left as it is.
        flows: of data, see `aggregate_flows`; without them the uses that the model expects count.
        fraction: drop this part of the states.
        threshold: or: drop states used at most that often a sample; at 0 the likelihood does not
            change where smoothing is off.

    Raises:
        ConfigError: a fraction or threshold out of its range.
        StructureError: a structure whose single units cannot go, naming the region.
    """
    _check("fraction", fraction, 1.0)
    _check("threshold", threshold, np.inf)
    states = find_states(circuit)
    states.refuse_rigid("pruning states")
    use = states.use(uses_of(circuit, flows))
    gone = use <= threshold
    if fraction is not None:
        gone = np.zeros(states.number, dtype=bool)
        free = np.flatnonzero(~states.pinned)
        gone[free[np.argsort(use[free], kind="stable")[: int(fraction * len(free))]]] = True
    gone &= ~states.pinned
    _keep_one(states, use, gone)
    maps = unit_maps(states, (~gone).astype(np.int64))
    dropped = dict(_dropped_columns(circuit, maps))
    estimate = float("nan") if flows is None else _estimate(circuit, flows, dropped)
    new = carry_over(circuit, maps, mixing_blocks(circuit.graph, maps))
    return Pruned(new, dropped, estimate)


@torch.no_grad()
def pruning_bound(
    circuit: Circuit, dropped: Dropped, data: Any, batch_size: int = 256
) -> PruningBound:
    """The bound for a set of edges over a data set; see the module.

    Args:
        circuit: before pruning.
        dropped: of `Pruned`, or any set.
        data, batch_size: as for `aggregate_flows`; samples of likelihood 0 are left out.
    """
    parts = []
    for evidence in evidence_batches(circuit, data, batch_size):
        evaluation, flows, _ = batch_flows(circuit, evidence, [])
        used = torch.zeros(len(evaluation.log_prob), dtype=torch.float64, device=circuit.device)
        for region, drop in dropped.items():
            child = circuit.graph.regions[region].children[0]
            places = circuit.schedule.places[region], circuit.schedule.places[child]
            assert places[0] is not None and places[1] is not None
            below = evaluation.scaled.outputs[places[1][0]][places[1][1]].detach().double()
            if evaluation.logs is not None:
                logs = evaluation.logs.outputs[places[1][0]][places[1][1]].detach().double()
                top = logs.amax(-1, keepdim=True)
                below[evaluation.again] = (logs - torch.where(top.isneginf(), 0.0, top)).exp()
            flow = flows[places[0][0]][places[0][1]].double()
            used += _edge_use(circuit, region, drop, below, flow)
        parts.append(used[evaluation.log_prob.isfinite()])
    use = torch.cat(parts) if parts else torch.zeros(0)
    if not len(use):
        return PruningBound(0.0, 0.0)
    bound = torch.log1p(-use.clamp_max(1.0)).mean().abs()
    return PruningBound(float(bound), float(use.mean()))


def uses_of(circuit: Circuit, flows: Flows | None, *, smoothed: bool = True) -> list[np.ndarray]:
    """Uses a sample of every region's units: of data, or those that the model expects, with its
    smoothing or without."""
    if flows is None:
        return [use.double().cpu().numpy() for use in circuit.uses(smoothed=smoothed)]
    return [(nodes / max(flows.num_samples, 1)).cpu().numpy() for nodes in flows.nodes]


def _check(name: str, value: float | None, limit: float) -> None:
    if value is not None and not 0 <= value < limit:
        raise ConfigError(
            "a setting of pruning is out of its range",
            where=name,
            found=value,
            expected=f"0 or more, below {limit:g}",
        )


def _scores(bank: SumBank, edges: Tensor | None) -> Tensor:
    """Flows, infinite for edges that have to stay or are gone already."""
    assert edges is not None
    inside = edges if bank.mask is None else torch.where(bank.mask, edges, -torch.inf)
    scores = inside.clone()
    scores.scatter_(-1, inside.argmax(-1, keepdim=True), torch.inf)
    return torch.where(inside.isneginf(), torch.nan, scores)


def _limit(
    scores: list[Tensor], fraction: float | None, threshold: float | None, num_samples: int
) -> Any:
    """A function of scores: which of them fall."""
    if threshold is not None:
        return lambda values: values <= threshold * num_samples
    assert fraction is not None
    if not scores:
        return torch.isneginf
    present = torch.cat([values[~values.isnan()] for values in scores])
    free = present[present.isfinite()]
    number = min(int(fraction * len(present)), len(free))
    if number == 0:
        return lambda values: torch.zeros_like(values, dtype=torch.bool)
    last = free.kthvalue(number).values
    # Of equal flows at the border only as many as asked for.
    left = number - int((free < last).sum())

    def falls(values: Tensor) -> Tensor:
        nonlocal left
        drop = values < last
        equal = (values == last).flatten().nonzero()[:left, 0]
        left -= len(equal)
        drop.view(-1)[equal] = True
        return drop

    return falls


@torch.no_grad()
def _mask(bank: SumBank, drop: Tensor) -> None:
    statistics = bank.statistics.detach()
    total = statistics.sum(-1, keepdim=True)
    statistics[drop] = 0.0
    found = statistics.sum(-1, keepdim=True)
    statistics *= torch.where(found > 0, total / found, 1.0)
    bank.mask = ~drop if bank.mask is None else bank.mask & ~drop


def _keep_one(states: States, use: np.ndarray, gone: np.ndarray) -> None:
    """Let the most used state of every region stay, in place."""
    for region, of_units in zip(states.graph.regions, states.of_units, strict=True):
        if region.kind != "kronecker" and gone[of_units].all():
            gone[of_units[use[of_units].argmax()]] = False


def _dropped_columns(circuit: Circuit, maps: list[UnitMap]) -> Iterator[tuple[int, Tensor]]:
    """For each sum the edges to units that are gone."""
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "sum":
            below = maps[region.children[0]]
            is_gone = torch.ones(below.num_old, dtype=torch.bool)
            is_gone[below.source] = False
            yield index, is_gone[torch.from_numpy(circuit.graph.mixed_units(index))]


def _estimate(circuit: Circuit, flows: Flows, dropped: Dropped) -> float:
    total = 0.0
    for number, plan in enumerate(circuit.schedule.banks):
        edges = flows.edges[number]
        if plan.kind == "sum" and edges is not None:
            for table, owners in enumerate(plan.owners):
                total += float(edges[table].cpu()[dropped[owners[0]]].sum())
    return total / max(flows.num_samples, 1)


def _edge_use(circuit: Circuit, region: int, drop: Tensor, below: Tensor, flow: Tensor) -> Tensor:
    """Flow (B,) through dropped edges, given the child's message and the sum's flow.

    Both on any scale of their sample: only the shares of edges in a unit matter.
    """
    theta = circuit.weights_of(region, torch.float64)
    theta_dropped = torch.where(drop.to(theta.device), theta, 0.0)
    if circuit.graph.regions[region].blocks > 1:
        mixed = torch.from_numpy(circuit.graph.mixed_units(region)).to(below.device)
        chosen = below[:, mixed]
        out, part = (chosen * theta).sum(-1), (chosen * theta_dropped).sum(-1)
    else:
        out, part = below @ theta.T, below @ theta_dropped.T
    return torch.where(out > 0, flow * part / torch.where(out > 0, out, 1.0), 0.0).sum(-1)
