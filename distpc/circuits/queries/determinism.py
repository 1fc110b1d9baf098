"""Whether a structure makes a circuit deterministic: a sample then leaves every sum one child."""

from __future__ import annotations

from distpc.structures.region_graph import RegionGraph

INDICATOR = "indicator"
"""The family of inputs whose unit k is category k."""

Support = dict[int, int | None]
"""For each variable of a unit the categories that it allows, as bits; None: any."""


def is_deterministic(graph: RegionGraph) -> bool:
    """Whether, whatever the weights, at most one child unit of any sum unit allows a sample.

    Sufficient, by structure alone: for every sum there is one variable on which the units that
    it mixes allow disjoint sets of categories. Supports start at indicator inputs; a circuit of
    other inputs is deterministic only if no sum mixes more than one unit.
    """
    supports: list[list[Support]] = []
    for index, region in enumerate(graph.regions):
        below = [supports[child] for child in region.children]
        if region.kind == "input":
            assert region.variable is not None
            is_indicator = region.family == INDICATOR
            units: list[Support] = [
                {region.variable: 1 << k if is_indicator else None} for k in range(region.num_units)
            ]
        elif region.kind == "product":
            units = [_both(parts) for parts in zip(*below, strict=True)]
        elif region.kind == "kronecker":
            units = [_both((left, right)) for left in below[0] for right in below[1]]
        elif region.kind == "concat":
            units = [support for part in below for support in part]
        else:
            unions: dict[tuple[int, ...], Support] = {}
            mixed = [tuple(row) for row in graph.mixed_units(index).tolist()]
            for row in dict.fromkeys(mixed):
                children = [below[0][unit] for unit in row]
                if not _are_disjoint(children):
                    return False
                unions[row] = _union(children)
            units = [unions[row] for row in mixed]
        supports.append(units)
    return True


def _both(parts: tuple[Support, ...]) -> Support:
    return {variable: allowed for part in parts for variable, allowed in part.items()}


def _union(children: list[Support]) -> Support:
    total: Support = {}
    for variable in children[0]:
        allowed = 0
        for child in children:
            bits = child[variable]
            if bits is None:
                break
            allowed |= bits
        else:
            total[variable] = allowed
            continue
        total[variable] = None
    return total


def _are_disjoint(children: list[Support]) -> bool:
    """Whether some variable tells all children apart."""
    if len(children) == 1:
        return True
    for variable in children[0]:
        seen = 0
        for child in children:
            bits = child[variable]
            if bits is None or seen & bits:
                break
            seen |= bits
        else:
            return True
    return False
