"""Posterior probabilities of units, which are flows: one backward pass answers for all variables
(and all latents) at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distpc.circuits.evidence import Evidence
from distpc.circuits.schedule import InputPlan
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

BYTES_PER_UNIT = 12
"""Of a row's flows: the message, its flow, and what autograd saves."""


class Reader(NamedTuple):
    """An input region, and where its units' flows are."""

    region: int
    step: int
    row: int


def readers(circuit: Circuit, variables: Iterable[int]) -> dict[int, list[Reader]]:
    """For each of the variables the input regions that look it up."""
    found: dict[int, list[Reader]] = defaultdict(list)
    for number, plan in enumerate(circuit.schedule.steps):
        for row, bag in enumerate(plan.bags) if isinstance(plan, InputPlan) else ():
            for region in bag:
                variable = circuit.graph.regions[region].variable
                assert variable is not None
                found[variable].append(Reader(region, number, row))
    return {variable: found[variable] for variable in variables}


def steps_of(found: dict[int, list[Reader]]) -> list[int]:
    """The steps that readers need the flows of."""
    return sorted({reader.step for of_variable in found.values() for reader in of_variable})


def flows(
    circuit: Circuit, evidence: Evidence, steps: Iterable[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Log-likelihoods (B,), and for each of `steps` the posterior use of its units (E, B, K)."""
    wanted = list(steps)
    with torch.enable_grad():
        evaluation = circuit.evaluate(evidence, keep=True)
        of_steps = [evaluation.scaled.outputs[step] for step in wanted]
        if evaluation.logs is not None:
            of_steps += [evaluation.logs.outputs[step] for step in wanted]
        grads = torch.autograd.grad(
            evaluation.log_prob.sum(), of_steps, allow_unused=True, materialize_grads=True
        )
    result = [grad.contiguous() for grad in grads[: len(wanted)]]
    if evaluation.logs is not None:
        for flow, extra in zip(result, grads[len(wanted) :], strict=True):
            flow.index_add_(1, evaluation.again, extra.to(flow.dtype))
    return evaluation.log_prob.detach(), dict(zip(wanted, result, strict=True))


def refuse_impossible(log_probs: Tensor, start: int) -> None:
    """Raise EvidenceError for evidence of probability 0; `start` is the batch's first row."""
    impossible = (~log_probs.isfinite()).nonzero()[:, 0]
    if len(impossible):
        raise EvidenceError(
            "the evidence has probability 0, nothing can be conditioned on it",
            where=f"rows {(impossible[:5] + start).tolist()} of x",
            found=f"{len(impossible)} such rows",
            fix="observe fewer variables, or train with a pseudocount",
        )
