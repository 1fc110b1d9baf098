"""The fewest bytes and operations of a training step: what a roofline is drawn with.

Counted once, here, whatever an implementation moves beside. Legend: B batch, K states, C
categories, w bytes of a message's entry (2 in bfloat16, 4 in float32).

* A parameter, float32: read by the forward pass, read by the backward pass, written by the update,
  which takes flows as they come: 12 bytes. A tied one counts once, though caches may lose it
  between its uses.
* A sum over K units for a batch: forward reads B x K and writes B x K; backward reads both and the
  flow that arrives, and writes the flow that it passes on: 6 B K w.
* A leaf: the forward pass looks up B x K entries (or reads its table, if that is smaller), the
  backward pass reads a flow of B x K; the table itself is among the parameters.
* A product is part of the sum above it and of the leaf below: nothing.
"""

from __future__ import annotations

from circuit_bench.cases import Case

PARAMETER_BYTES = 12


def step_bytes(case: Case, num_parameters: int) -> int:
    """Of one training step, at least."""
    width = 2 if case.dtype == "bfloat16" else 4
    message = case.batch * case.num_states
    sums = (case.num_variables - 1) * 6 * message * width
    looked_up = min(case.batch, case.num_categories) * case.num_states * 4
    leaves = case.num_variables * (looked_up + message * width)
    return PARAMETER_BYTES * num_parameters + sums + leaves


def step_flops(case: Case) -> float:
    """6 x batch x K x K a dense block: one product forward, two backward."""
    return 1e9 * case.gflop()
