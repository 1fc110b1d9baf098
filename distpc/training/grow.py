"""Learns a circuit's structure in a loop: prune what data hardly uses, grow the rest, fit.

After Dang, Liu, Van den Broeck, "Sparse Probabilistic Circuits via Pruning and Growing" (NeurIPS
2022): prune 75 % of the edges by their flows, clone every state with noise N(1, 0.3), train again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.sums import SumBank
from distpc.circuits.transforms import (
    aggregate_flows,
    grow,
    prune_edges,
    prune_states,
    pruning_bound,
    reseed_states,
)
from distpc.errors import ConfigError
from distpc.training.figures import Figures, tally
from distpc.training.fit import Array, as_samples, fit


class Grown(NamedTuple):
    """What the loop made.

    Attributes:
        circuit: of the best loop (by `valid`, or else the last one).
        history: a row a loop, the start among them: `loop`, `bits` (of `valid`, or else of the
            training data, a value), `parameters` (statistics held), `edges` (of sums, pruned ones
            left out), and from the first loop on `pruning_estimate` and `pruning_bound` in nats a
            sample, see `transforms.prune`.
    """

    circuit: Circuit
    history: list[dict[str, float]]


def grow_and_prune(
    circuit: Circuit,
    data: Array,
    *,
    loops: int = 3,
    fraction: float = 0.75,
    noise: float = 0.3,
    cross: float = 1.0,
    reseed: float = 0.0,
    max_parameters: int | None = None,
    valid: Array | None = None,
    seed: int = 0,
    **fit_settings: Any,
) -> Grown:
    """Repeat: prune edges and dead states, clone every state with noise, fit.

    Args:
        circuit: fitted already (see `fit`), since its flows say what is pruned; left as it is.
        data: (N, V) samples to prune and train by.
        loops: how often.
        fraction: of the edges to prune in each loop; 0 only grows.
        noise, cross: see `transforms.grow`.
        reseed: start states again that data use less than this share of an even use; 0: none.
        max_parameters: no loop starts whose circuit would have more statistics than that.
        valid: (N', V) samples to choose epochs and the best loop by.
        seed: of noise and of the order of samples.
        fit_settings: `epochs`, `batch_size`, ... of `fit`; `progress` is off unless given.

    Raises:
        ConfigError: a setting out of its range.
        DataError: the arrays do not fit the circuit.
        StructureError: the circuit's states cannot be cloned.
        TrainingError: see `fit`.
    """
    if loops < 1:
        raise ConfigError(
            "a setting of grow_and_prune is out of its range",
            where="loops",
            found=loops,
            expected="1 or more",
        )
    x = as_samples(circuit, data, "data")
    judged = x if valid is None else as_samples(circuit, valid, "valid")
    settings = {"progress": False, **fit_settings}
    best = circuit
    history = [_row(circuit, judged, 0)]
    current = circuit
    for loop in range(1, loops + 1):
        flows = aggregate_flows(current, x)
        pruned = prune_edges(current, flows, fraction=fraction)
        bound = pruning_bound(current, pruned.dropped, x)
        # States that pruning cut off are of no use to anyone.
        smaller = prune_states(pruned.circuit).circuit
        if reseed > 0:
            flows = aggregate_flows(smaller, x)
            smaller = reseed_states(
                smaller, below=reseed, flows=flows, noise=noise, seed=seed + loop
            ).circuit
        grown = grow(smaller, noise=noise, cross=cross, seed=seed + loop)
        if max_parameters is not None and grown.num_parameters > max_parameters:
            break
        fit(grown, x, valid=valid, seed=seed + loop, **settings)
        row = _row(grown, judged, loop)
        row |= {"pruning_estimate": pruned.estimate, "pruning_bound": bound.bound}
        if valid is None or row["bits"] <= min(known["bits"] for known in history):
            best = grown
        history.append(row)
        current = grown
    return Grown(best, history)


def _row(circuit: Circuit, x: Tensor, loop: int) -> dict[str, float]:
    figures = Figures.of(tally(circuit.log_prob(x.to(circuit.device)), x.to(circuit.device)))
    edges = 0
    for bank in circuit.bank_list:
        if isinstance(bank, SumBank):
            edges += bank.statistics.numel() if bank.mask is None else int(bank.mask.sum())
    return {
        "loop": float(loop),
        "bits": math.inf if figures.impossible else figures.bits,
        "parameters": float(circuit.num_parameters),
        "edges": float(edges),
    }
