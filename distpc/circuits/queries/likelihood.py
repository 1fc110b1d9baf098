"""Likelihoods of rows, with or without values missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpc.circuits.queries.batches import batches, collect, rows_at_once

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


@torch.no_grad()
def log_prob(
    circuit: Circuit,
    x: Any,
    observed: Any = None,
    latents: Any = None,
    batch_size: int | None = None,
) -> Tensor:
    """Log-likelihoods (B,) in nats, float32, without gradients.

    Args:
        circuit: the model.
        x: (B, V) values.
        observed: bool (V,) or (B, V); False sums the variable out.
        latents: (B, Z) integers, -1 where unobserved.
        batch_size: rows evaluated at once; None: as many as fit into bounded memory.
    """
    size = batch_size or rows_at_once(circuit, 8)
    evidence = batches(circuit, x, observed, size, latents)
    return collect(x, ((start, circuit(batch)) for start, batch in evidence), (0,))
