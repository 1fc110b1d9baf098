"""Random binary partitions (RAT): halves of random orders of the variables, several times over.

Peharz et al., "Random sum-product networks: a simple and effective approach to probabilistic deep
learning", UAI 2019.
"""

from __future__ import annotations

import numpy as np

from distpc.structures.layers import check_size
from distpc.structures.partitions import Hierarchy, partition_circuit
from distpc.structures.region_graph import RegionGraph

_Range = tuple[int, int, int, int]
"""A node: depth, repetition, and the range of that repetition's order."""


def random_binary(
    num_variables: int,
    num_states: int,
    *,
    num_repetitions: int = 4,
    max_depth: int | None = None,
    num_input_units: int | None = None,
    layer: str = "cp",
    tied: bool = False,
    seed: int = 0,
    family: str | None = None,
) -> RegionGraph:
    """Random halves, down to `max_depth`; below it variables are independent given the unit.

    Args:
        num_variables: V.
        num_states: K, units of every inner region.
        num_repetitions: random orders, mixed at the root.
        max_depth: most halvings; default: down to single variables.
        num_input_units: units of every input; default K.
        layer: see `Layer`.
        tied: whether regions of one depth share parameters, over all repetitions, and the inputs
            of a variable their distributions.
        seed: of the orders.
        family: of the inputs.

    Raises:
        StructureError: naming the argument that does not fit.
    """
    num_variables = check_size("num_variables", num_variables)
    num_repetitions = check_size("num_repetitions", num_repetitions)
    if max_depth is not None:
        max_depth = check_size("max_depth", max_depth)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(num_variables).tolist() for _ in range(num_repetitions)]
    # All repetitions meet in one root.
    root = (0, 0, 0, num_variables)
    splits: dict[_Range, list[tuple[_Range, ...]]] = {}
    for repetition in range(num_repetitions):
        pending = [(0, repetition, 0, num_variables)]
        while pending:
            level, _, first, last = pending.pop()
            if level == max_depth or last - first < 2:
                continue
            middle = (first + last + 1) // 2
            halves = (
                (level + 1, repetition, first, middle),
                (level + 1, repetition, middle, last),
            )
            node = (level, repetition, first, last) if level else root
            splits.setdefault(node, []).append(halves)
            pending += halves
    hierarchy = Hierarchy(
        root,
        splits,
        variables=lambda node: orders[node[1]][node[2] : node[3]],
        shape=lambda node: f"depth/{node[0]}",
        input_tie=lambda variable: f"input/{variable}",
    )
    return partition_circuit(
        hierarchy,
        num_variables,
        num_states,
        num_input_units=num_input_units,
        layer=layer,
        tied=tied,
        family=family,
    )
