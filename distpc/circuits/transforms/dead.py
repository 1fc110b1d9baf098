"""Dead states: those that hardly any data use.

Smoothing gives every state some use, and a state that lives on it alone looks alive to the model's
own probabilities. So uses are counted without smoothing, and a state is dead by comparison with the
other values of its latents: where all of K are used alike each has a K-th of the uses.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from distpc.circuits.circuit import Circuit
from distpc.circuits.transforms.prune import uses_of
from distpc.circuits.transforms.states import States, find_states

DEAD_BELOW = 0.05
"""A state that is used less than this share of an even use is dead."""


class DeadStates(NamedTuple):
    """How many states are dead, of how many that could be."""

    number: int
    of: int


def count_dead(circuit: Circuit, below: float = DEAD_BELOW) -> DeadStates:
    """Dead states of a circuit, by its statistics.

    Args:
        circuit: looked at.
        below: share of an even use below which a state is dead.
    """
    states = find_states(circuit)
    groups = exchangeable(states)
    dead = find_dead(states, groups, uses_of(circuit, None, smoothed=False), below)
    return DeadStates(int(dead.sum()), sum(map(len, groups)))


def exchangeable(states: States) -> list[list[int]]:
    """States that are values of the same latents, without those that have to stay as they are."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for state, regions in enumerate(states.regions):
        if regions and not states.pinned[state]:
            groups[regions].append(state)
    return list(groups.values())


def find_dead(
    states: States, groups: list[list[int]], nodes: list[np.ndarray], below: float
) -> np.ndarray:
    """Which states are dead, (number of states,) bool.

    Args:
        states: of the circuit.
        groups: of exchangeable ones.
        nodes: uses of each region's units.
        below: share of an even use.
    """
    use = states.use(nodes)
    dead = np.zeros(states.number, dtype=bool)
    for group in groups:
        dead[group] = use[group] < below * use[group].mean()
    return dead
