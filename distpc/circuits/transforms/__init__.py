"""Structure learning as functions from a circuit (and flows of data) to a new circuit."""

from distpc.circuits.transforms.dead import DEAD_BELOW, DeadStates, count_dead
from distpc.circuits.transforms.flows import Flows, aggregate_flows
from distpc.circuits.transforms.grow import Reseeded, grow, reseed_states, split_states
from distpc.circuits.transforms.merge import Merged, Pair, merge_states, similar_states
from distpc.circuits.transforms.prune import (
    Pruned,
    PruningBound,
    prune_edges,
    prune_states,
    pruning_bound,
)
from distpc.circuits.transforms.smoothing import fold_smoothing

__all__ = [
    "DEAD_BELOW",
    "DeadStates",
    "Flows",
    "Merged",
    "Pair",
    "Pruned",
    "PruningBound",
    "Reseeded",
    "aggregate_flows",
    "count_dead",
    "fold_smoothing",
    "grow",
    "merge_states",
    "prune_edges",
    "prune_states",
    "pruning_bound",
    "reseed_states",
    "similar_states",
    "split_states",
]
