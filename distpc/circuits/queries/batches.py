"""How many rows a query evaluates at once, and one result out of many batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpc.circuits.evidence import Evidence

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

MESSAGE_BYTES = 2**28
"""Messages held at once, roughly; one row is evaluated even where its messages are more."""
MAX_ROWS = 1024


def rows_at_once(circuit: Circuit, bytes_per_unit: int, bytes_more: int = 0) -> int:
    """Rows whose messages fit into `MESSAGE_BYTES`.

    Args:
        circuit: the model.
        bytes_per_unit: bytes that a query holds for each unit and row.
        bytes_more: what it holds for a row besides.
    """
    regions = circuit.graph.regions
    units = sum(
        len(plan.regions) * regions[plan.regions[0]].num_units for plan in circuit.schedule.steps
    )
    return min(MAX_ROWS, max(1, MESSAGE_BYTES // (units * bytes_per_unit + bytes_more)))


def batches(
    circuit: Circuit, x: Any, observed: Any, size: int, latents: Any = None
) -> Iterator[tuple[int, Evidence]]:
    """`size` rows of evidence at a time, on the circuit's device, with their first row's number."""
    return circuit.reader.batches(x, latents, observed, size, circuit.device)


def collect(x: Any, blocks: Iterable[tuple[int, Tensor]], empty: tuple[int, ...]) -> Tensor:
    """One tensor of all rows; of shape `empty` where x has none. Never holds the blocks twice."""
    result: Tensor | None = None
    for start, block in blocks:
        if result is None:
            result = block.new_empty((len(x), *block.shape[1:]))
        result[start : start + len(block)] = block
    return torch.zeros(empty) if result is None else result
