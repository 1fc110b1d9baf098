"""Grows circuits: clones states with noise, splits single ones, re-starts dead ones.

A clone takes over its share of the original's uses, of the weights that lead to it, and all of
what the original mixed. Without noise clones are the same distribution, so that the likelihood does
not change (with smoothing folded, see `fold_smoothing`); noise is what lets training tell them
apart (Dang, Liu, Van den Broeck 2022: N(1, 0.3) on weights; LVD-PG: also weights between different
copies times 0.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.bank import Bank
from distpc.circuits.circuit import Circuit
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.sums import SumBank
from distpc.circuits.transforms.carry import UnitMap, carry_over, mixing_blocks, unit_maps
from distpc.circuits.transforms.dead import DEAD_BELOW, exchangeable, find_dead
from distpc.circuits.transforms.flows import Flows
from distpc.circuits.transforms.prune import uses_of
from distpc.circuits.transforms.states import States, find_states
from distpc.errors import ConfigError, StructureError

LEAST_FACTOR = 0.1
"""Noise never takes more than nine tenths of a weight."""


def grow(
    circuit: Circuit,
    *,
    noise: float = 0.3,
    cross: float = 1.0,
    flows: Flows | None = None,
    quantile: float = 0.0,
    seed: int = 0,
) -> Circuit:
    """Clone every state, or the most used ones: dense sums get four times the weights.

    Unit k becomes the units 2 k and 2 k + 1 where all are cloned. Block-diagonal sums keep their
    blocks' number (consecutive blocks) or their size (strided ones, whose clones stay apart).

    Args:
        circuit: left as it is.
        noise: standard deviation of the factors on weights, N(1, noise) but at least 0.1; 0: none.
        cross: factor on weights between different copies, in [0, 1].
        flows: of data, to tell the most used states by; without them the model's uses count.
        quantile: clone states whose use is at least this quantile of all states' uses.
        seed: of the noise.

    Raises:
        ConfigError: a setting out of its range.
        StructureError: no state can be cloned, or not on its own.
    """
    _check("noise", noise, np.inf)
    _check("cross", cross, 1.0)
    _check("quantile", quantile, 1.0)
    states = find_states(circuit)
    chosen = ~states.pinned
    if quantile > 0 and chosen.any():
        use = states.use(uses_of(circuit, flows))
        chosen &= use >= np.quantile(use[chosen], quantile)
    if not chosen.any():
        raise StructureError(
            "no state of the circuit can be cloned",
            where="the root's unit, and units that are categories, stay",
            found=f"{states.number} states",
        )
    return _clone(circuit, states, chosen, noise, cross, seed)


def split_states(
    circuit: Circuit,
    units: Sequence[tuple[int, int]],
    *,
    noise: float = 0.3,
    cross: float = 1.0,
    seed: int = 0,
) -> Circuit:
    """Split single states in two, which are neighbours afterwards.

    Args:
        circuit: left as it is.
        units: (region, unit) of each state; any of its units names a state.
        noise, cross, seed: as for `grow`.

    Raises:
        ConfigError: a setting out of its range.
        StructureError: a unit that does not exist or cannot be split on its own.
    """
    _check("noise", noise, np.inf)
    _check("cross", cross, 1.0)
    states = find_states(circuit)
    chosen = np.zeros(states.number, dtype=bool)
    chosen[[states.of(region, unit) for region, unit in units]] = True
    return _clone(circuit, states, chosen, noise, cross, seed)


class Reseeded(NamedTuple):
    """A circuit of the same shape, and how many states were started again."""

    circuit: Circuit
    number: int


def reseed_states(
    circuit: Circuit,
    *,
    below: float = DEAD_BELOW,
    flows: Flows | None = None,
    noise: float = 0.3,
    seed: int = 0,
) -> Reseeded:
    """Start rarely used states again from parts of the most used ones.

    Dead states become alike, because smoothing makes their rows uniform (DESIGN 2.1). Each takes
    the place of a clone of the most used state of the same regions; what the state itself knew is
    forgotten.

    Args:
        circuit: left as it is.
        below: share of an even use below which a state is dead, see `dead`.
        flows: of data, to tell dead states by; without them statistics count.
        noise, seed: as for `grow`.

    Raises:
        ConfigError: a setting out of its range.
        StructureError: a structure whose single units cannot change, naming the region.
    """
    _check("below", below, np.inf)
    _check("noise", noise, np.inf)
    states = find_states(circuit)
    states.refuse_rigid("re-seeding")
    groups, nodes = exchangeable(states), uses_of(circuit, flows, smoothed=False)
    use, dead = states.use(nodes), find_dead(states, groups, nodes, below)
    parts: dict[int, tuple[int, ...]] = {}
    for group in groups:
        alive = [state for state in group if not dead[state]]
        takers = dict.fromkeys(alive, 1)
        for state in group:
            if dead[state] and alive:
                source = max(alive, key=lambda s: use[s] / takers[s])
                takers[source] += 1
                parts[state] = (source,)
    maps = unit_maps(states, np.ones(states.number, dtype=np.int64), parts)
    new = carry_over(circuit, maps)
    _perturb(new, maps, noise, 1.0, seed)
    return Reseeded(new, len(parts))


def _clone(
    circuit: Circuit,
    states: States,
    chosen: np.ndarray,
    noise: float,
    cross: float,
    seed: int,
) -> Circuit:
    if not (chosen | states.pinned).all():
        states.refuse_rigid("cloning some states")
    maps = unit_maps(states, 1 + chosen)
    blocks = mixing_blocks(circuit.graph, maps)
    for index in states.rigid:
        # Neighbours are in different blocks if every such-and-such unit is one.
        region = circuit.graph.regions[index]
        blocks[index] = region.blocks * (2 if region.strided else 1)
    new = carry_over(circuit, maps, blocks)
    _perturb(new, maps, noise, cross, seed)
    return new


@torch.no_grad()
def _perturb(new: Circuit, maps: list[UnitMap], noise: float, cross: float, seed: int) -> None:
    """Noise on all that clones have and on weights that lead to them; rows keep their totals."""
    generator = torch.Generator().manual_seed(seed)
    for bank, plan in zip(new.bank_list, new.schedule.banks, strict=True):
        for table, owners in enumerate(plan.owners):
            own = maps[owners[0]]
            rows = bank.statistics_of(table)
            changed = rows.cpu()
            if isinstance(bank, SumBank):
                region = new.graph.regions[owners[0]]
                below = maps[region.children[0]]
                mixed = torch.from_numpy(new.graph.mixed_units(owners[0]))
                if region.blocks == 1:
                    changed = changed * _cross_factors(own.copy, below.copy, cross)
                touched = own.is_shared.unsqueeze(1) | below.is_shared[mixed]
                changed = _multiply(changed, touched, noise, generator)
            elif noise > 0:
                changed = _perturb_input(bank, table, own.is_shared, noise, generator)
            rows[:] = changed.to(rows)


def _cross_factors(row_copies: Tensor, column_copies: Tensor, cross: float) -> Tensor:
    """Factors (K', K) that keep the weight of a clone's both edges to the clones of one unit."""
    rows, columns = row_copies.unsqueeze(1), column_copies.unsqueeze(0)
    factors = torch.where(rows == columns, 2 / (1 + cross), 2 * cross / (1 + cross))
    return torch.where((rows >= 0) & (columns >= 0), factors, 1.0)


def _multiply(rows: Tensor, touched: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if noise == 0:
        return rows
    factors = 1 + noise * torch.randn(rows.shape, generator=generator)
    changed = rows * torch.where(touched, factors.clamp_min(LEAST_FACTOR), 1.0)
    total = changed.sum(-1, keepdim=True)
    return changed * torch.where(total > 0, rows.sum(-1, keepdim=True) / total, 1.0)


def _perturb_input(
    bank: Bank, table: int, touched: Tensor, noise: float, generator: torch.Generator
) -> Tensor:
    """Changed statistics of one table of inputs."""
    rows = bank.statistics_of(table).cpu()
    if isinstance(bank, CategoricalBank):
        return _multiply(rows, touched.unsqueeze(1), noise, generator)
    # What makes sense in every other family is a mixture: |N(0, noise)| of another unit, at most
    # half, brought to the row's own uses.
    share = (noise * torch.randn(len(rows), 1, generator=generator)).abs().clamp_max(0.5)
    order = torch.randperm(len(rows), generator=generator)
    other = rows[order]
    if bank.learns_by == "em":
        statistics = bank.statistics.detach()
        uses = bank.totals(statistics).expand_as(statistics)[table].T.cpu()
        other = other * (uses / uses[order].clamp_min(1e-30))
    return torch.where(touched.unsqueeze(1), (1 - share) * rows + share * other, rows)


def _check(name: str, value: float, limit: float) -> None:
    if not 0 <= value <= limit or value == np.inf:
        raise ConfigError(
            "a setting of growing is out of its range",
            where=name,
            found=value,
            expected="0 or more" if limit == np.inf else f"0 .. {limit:g}",
        )
