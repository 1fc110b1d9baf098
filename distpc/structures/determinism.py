"""Whether a circuit is deterministic, as far as its region graph tells.

Units over disjoint sets of values can be told apart by their inputs alone: unit k of an
"indicator" input is possible for category k only. What is kept of a unit's support is, for each
variable that restricts it, the categories it allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distpc.structures.region_graph import RegionGraph

INDICATOR = "indicator"
"""The family whose unit k is a point mass at category k."""

Support = dict[int, frozenset[int]]


def is_deterministic(graph: RegionGraph) -> bool:
    """Whether every sum unit mixes units of disjoint supports, whatever the weights are.

    A sum of one child unit does. Weights of zero, by which a circuit may be deterministic too,
    are not in the graph.
    """
    supports: list[list[Support]] = []
    for index, region in enumerate(graph.regions):
        below = [supports[child] for child in region.children]
        if region.kind == "input":
            units = _input(region.family, region.num_units, region.variable)
        elif region.kind == "product":
            units = [_joined(factors) for factors in zip(*below, strict=True)]
        elif region.kind == "kronecker":
            units = [_joined((left, right)) for left in below[0] for right in below[1]]
        elif region.kind == "concat":
            units = [unit for child in below for unit in child]
        else:
            known: dict[tuple[int, ...], Support] = {}
            for mixed in map(tuple, graph.mixed_units(index).tolist()):
                if mixed in known:
                    continue
                children = [below[0][unit] for unit in mixed]
                if not _disjoint(children):
                    return False
                known[mixed] = _union(children, graph)
            units = [known[tuple(mixed)] for mixed in graph.mixed_units(index).tolist()]
        supports.append(units)
    return True


def _input(family: str | None, num_units: int, variable: int | None) -> list[Support]:
    if family != INDICATOR or variable is None:
        return [{}] * num_units
    return [{variable: frozenset([unit])} for unit in range(num_units)]


def _joined(factors: Sequence[Support]) -> Support:
    return {variable: allowed for factor in factors for variable, allowed in factor.items()}


def _disjoint(units: Sequence[Support]) -> bool:
    """Whether no two units are possible for the same values."""
    if len(units) < 2:
        return True
    for variable in units[0]:
        # One variable that tells all of them apart is the usual case, and quick to check.
        allowed = [unit.get(variable) for unit in units]
        sets = [values for values in allowed if values is not None]
        if len(sets) == len(units) and sum(map(len, sets)) == len(frozenset().union(*sets)):
            return True
    return all(
        any(one[variable].isdisjoint(other[variable]) for variable in one.keys() & other.keys())
        for one, other in combinations(units, 2)
    )


def _union(units: Sequence[Support], graph: RegionGraph) -> Support:
    """What a mixture allows: a variable restricts it if it restricts every unit, to less than
    all categories."""
    common = set(units[0]).intersection(*units[1:])
    joined = {variable: frozenset().union(*(u[variable] for u in units)) for variable in common}
    return {v: values for v, values in joined.items() if len(values) < graph.indicated[v]}
