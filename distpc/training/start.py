"""Where training starts: the distilled circuit, or random parameters near the data's marginals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit

MARGINAL_SAMPLES = 20_000
"""Samples from which marginals are counted; a histogram of one variable needs no more."""


def marginal_counts(
    batches: Iterable[np.ndarray | Tensor], num_categories: Sequence[int | None]
) -> list[Tensor | None]:
    """Counts of every categorical variable's values; None for real variables.

    Args:
        batches: (B, V) integers or floats, missing values (-1, NaN) left out of the counts.
        num_categories: C of every variable.

    Returns:
        Per variable (C,) float64.
    """
    counts = [None if c is None else torch.zeros(c, dtype=torch.float64) for c in num_categories]
    for batch in batches:
        x = torch.as_tensor(batch)
        for variable, total in enumerate(counts):
            if total is not None:
                values = x[:, variable]
                known = values[values >= 0].long()
                total += torch.bincount(known, minlength=len(total)).to(total)
    return counts


@torch.no_grad()
def start_near_marginals_(circuit: Circuit, counts: Sequence[Tensor | None]) -> None:
    """Multiply every categorical row of a random circuit by its variable's marginal.

    Rows that start near the data's marginal differ by the circuit's own noise alone, so that no
    state begins where there is no data: the tuned EM baseline of the measured prototypes. Tied
    rows take the marginal of all their variables together. Statistics are then scaled to the
    expected uses of their rows.

    Args:
        circuit: with random parameters.
        counts: as `marginal_counts` gives them.
    """
    pooled: dict[str | int, Tensor] = {}
    owners: dict[str | int, int] = {}
    for index, region in enumerate(circuit.graph.regions):
        if region.kind != "input" or region.variable is None:
            continue
        count = counts[region.variable]
        if count is not None:
            key = index if region.tie is None else region.tie
            pooled[key] = pooled.get(key, 0) + count
            owners.setdefault(key, index)
    for key, index in owners.items():
        rows = circuit.statistics_of(index)
        smoothed = pooled[key] + 1.0 / len(pooled[key])
        marginal = (smoothed / smoothed.sum()).to(rows)
        noisy = circuit.weights_of(index) * marginal
        rows.copy_(noisy / noisy.sum(-1, keepdim=True))
    circuit.rescale_to_uses_()
