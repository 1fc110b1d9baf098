"""Posteriors of latent variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpc.circuits.queries.batches import batches, collect, rows_at_once
from distpc.circuits.queries.flows import BYTES_PER_UNIT, flows, refuse_impossible

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


def posterior(
    circuit: Circuit, x: Any, observed: Any = None, batch_size: int | None = None
) -> Tensor:
    """Posterior of latent variables given the evidence.

    Returns:
        (B, Z, K) float32, K the largest number of values; 0 beyond a latent's own values.

    Raises:
        EvidenceError: evidence of probability 0.
    """
    width = max(circuit.latent_sizes, default=0)
    places = [
        (region.latent, region.num_units, place)
        for region, place in zip(circuit.graph.regions, circuit.schedule.places, strict=True)
        if region.latent is not None and place is not None
    ]
    steps = sorted({step for _, _, (step, _) in places})
    size = batch_size or rows_at_once(circuit, BYTES_PER_UNIT)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for start, evidence in batches(circuit, x, observed, size):
            log_probs, step_flows = flows(circuit, evidence, steps)
            refuse_impossible(log_probs, start)
            block = torch.zeros(len(log_probs), circuit.num_latents, width, device=circuit.device)
            for latent, num_units, (step, row) in places:
                block[:, latent, :num_units] += step_flows[step][row]
            yield start, block

    return collect(x, blocks(), (0, circuit.num_latents, width))
