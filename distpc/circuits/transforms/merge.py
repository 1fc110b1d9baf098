"""Merges states that are much the same: statistics are added, and the weights into them too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.transforms.carry import carry_over, mixing_blocks, unit_maps
from distpc.circuits.transforms.flows import Flows
from distpc.circuits.transforms.prune import uses_of
from distpc.circuits.transforms.states import States, find_states
from distpc.errors import StructureError


class Merged(NamedTuple):
    """A circuit with fewer states.

    Attributes:
        circuit: a new one.
        loss: fall of the mean log-likelihood of the data in nats (negative: it rose); NaN where no
            data were given.
    """

    circuit: Circuit
    loss: float


class Pair(NamedTuple):
    """Two exchangeable states, named by units of one region.

    Attributes:
        region, first, second: two units of a region.
        cost: nats a sample that telling them apart is worth, see `similar_states`.
    """

    region: int
    first: int
    second: int
    cost: float = float("nan")


def merge_states(circuit: Circuit, pairs: Sequence[Pair], data: Any = None) -> Merged:
    """Make one state of the two of each pair, in the place of the first.

    Args:
        circuit: left as it is.
        pairs: disjoint; of `similar_states`, or any.
        data: (N, V) samples to measure the loss by.

    Raises:
        StructureError: a unit that does not exist or cannot be changed, two states that are not
            exchangeable (units of the same regions), or one in two pairs.
    """
    states = find_states(circuit)
    states.refuse_rigid("merging states")
    copies = np.ones(states.number, dtype=np.int64)
    parts: dict[int, tuple[int, ...]] = {}
    for pair in pairs:
        first = states.of(pair.region, pair.first)
        second = states.of(pair.region, pair.second)
        where = f"region {pair.region}, units {pair.first} and {pair.second}"
        if first == second or states.regions[first] != states.regions[second]:
            raise StructureError(
                "two states cannot be merged",
                where=where,
                found="one state" if first == second else "units of different regions",
                expected="two states whose units are in the same regions",
            )
        if not copies[first] or not copies[second] or first in parts or second in parts:
            raise StructureError("a state is in two pairs", where=where, expected="disjoint pairs")
        copies[second] = 0
        parts[first] = (first, second)
    maps = unit_maps(states, copies, parts)
    new = carry_over(circuit, maps, mixing_blocks(circuit.graph, maps))
    if data is None:
        return Merged(new, float("nan"))
    before, after = (c.log_prob(data).double() for c in (circuit, new))
    possible = before.isfinite()
    return Merged(new, float((before - after)[possible].mean()))


def similar_states(circuit: Circuit, count: int, flows: Flows | None = None) -> list[Pair]:
    """The pairs of states that are cheapest to merge, disjoint, cheapest first.

    The cost of a pair is the fall of the expected log-likelihood of samples that come with their
    states: over all rows that the two own, u1 KL(p1 | m) + u2 KL(p2 | m) with the uses u of the
    states and m the merged row (what comes of adding their statistics).

    Args:
        circuit: the model.
        count: pairs wanted; fewer come back where there are no more.
        flows: of data, for the uses; without them those that the model expects.

    Raises:
        StructureError: a structure whose single units cannot change, naming the region.
    """
    states = find_states(circuit)
    states.refuse_rigid("merging states")
    use = states.use(uses_of(circuit, flows))
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for state, regions in enumerate(states.regions):
        if regions and not states.pinned[state]:
            groups[regions].append(state)
    found: list[tuple[float, int, int]] = []
    for regions, group in groups.items():
        if len(group) > 1:
            costs = _costs(circuit, states, regions, np.array(group), use)
            # A state is in one pair at most: more than this many of a group are never needed.
            rows, columns = np.triu_indices(len(group), 1)
            order = np.argsort(costs[rows, columns], kind="stable")[: count * len(group)]
            found += [
                (float(costs[rows[i], columns[i]]), group[rows[i]], group[columns[i]])
                for i in order
            ]
    taken: set[int] = set()
    pairs: list[Pair] = []
    for cost, first, second in sorted(found):
        if len(pairs) < count and not {first, second} & taken:
            taken |= {first, second}
            region = _name(states, first)
            units = states.of_units[region]
            pairs.append(
                Pair(
                    region,
                    int(np.flatnonzero(units == first)[0]),
                    int(np.flatnonzero(units == second)[0]),
                    cost,
                )
            )
    return pairs


def _name(states: States, state: int) -> int:
    """A region that has the state; the latent's own, where there is one."""
    own = states.regions[state]
    return next((r for r in own if states.graph.regions[r].latent is not None), own[0])


def _costs(
    circuit: Circuit, states: States, regions: tuple[int, ...], group: np.ndarray, use: np.ndarray
) -> np.ndarray:
    """(G, G) costs of merging two states of a group."""
    uses = torch.from_numpy(use[group])
    total = torch.zeros(len(group), len(group), dtype=torch.float64)
    tables: dict[tuple[int, int], int] = {}
    for index in dict.fromkeys(regions):
        if circuit.graph.regions[index].kind in ("sum", "input"):
            bank, table = circuit.bank_of(index)
            tables.setdefault((id(bank), table), index)
    for index in tables.values():
        units = [np.flatnonzero(states.of_units[index] == state) for state in group]
        bank, _ = circuit.bank_of(index)
        for rows in zip(*units, strict=True):
            weights = circuit.weights_of(index, torch.float64).cpu()[list(rows)]
            if isinstance(bank, GaussianBank):
                total += _gaussian_cost(weights, uses)
            else:
                total += _table_cost(weights, uses)
    return total.numpy()


def _table_cost(rows: Tensor, uses: Tensor) -> Tensor:
    """Of rows of probabilities (G, C): u1 H(m) + u2 H(m) - u1 H(p1) - u2 H(p2)."""
    own = uses * -torch.special.xlogy(rows, rows).sum(-1)
    costs = torch.zeros(len(rows), len(rows), dtype=rows.dtype)
    for number, (row, use) in enumerate(zip(rows, uses, strict=True)):
        both = (use + uses).clamp_min(1e-300).unsqueeze(1)
        mean = (use * row + uses.unsqueeze(1) * rows) / both
        entropy = -torch.special.xlogy(mean, mean).sum(-1)
        costs[number] = (both[:, 0] * entropy - own - own[number]).clamp_min(0.0)
    return costs


def _gaussian_cost(rows: Tensor, uses: Tensor) -> Tensor:
    """Of rows (G, 2) of mean and variance, against the Gaussian of the merged moments."""
    mean, variance = rows.unbind(-1)
    both = (uses + uses.unsqueeze(1)).clamp_min(1e-300)
    first, second = uses.unsqueeze(1) / both, uses / both
    merged = first * variance.unsqueeze(1) + second * variance
    merged = merged + first * second * (mean.unsqueeze(1) - mean).square()
    logs = merged.log() - first * variance.log().unsqueeze(1) - second * variance.log()
    return 0.5 * both * logs
