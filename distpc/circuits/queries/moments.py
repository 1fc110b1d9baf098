"""Means and variances of variables given evidence; categories count as the numbers 0 .. C - 1."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distpc.circuits.evidence import Evidence
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.queries.batches import batches, collect, rows_at_once
from distpc.circuits.queries.flows import (
    BYTES_PER_UNIT,
    flows,
    readers,
    refuse_impossible,
    steps_of,
)
from distpc.circuits.queries.tables import input_tables
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


class Moments(NamedTuple):
    """Of each variable given a row's evidence.

    Attributes:
        mean: (B, n) float32; the value itself where it is observed.
        variance: (B, n) float32; 0 where observed.
    """

    mean: Tensor
    variance: Tensor


def expectation(
    circuit: Circuit,
    x: Any,
    observed: Any = None,
    variables: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Moments:
    """E[X_v | evidence] and Var[X_v | evidence].

    A variable is a mixture of its units by their posteriors F_k: E = sum_k F_k m_k and
    Var = sum_k F_k (s_k^2 + (m_k - E)^2), with each unit's own mean and variance.

    Args:
        circuit: the model.
        x: (B, V) values; those not observed are ignored.
        observed: bool (V,) or (B, V).
        variables: those to answer for; None: all of them.
        batch_size: rows evaluated at once; None: as many as fit into bounded memory.

    Raises:
        EvidenceError: evidence of probability 0, or an unknown variable.
    """
    asked = list(range(circuit.num_variables)) if variables is None else list(variables)
    for variable in asked:
        if not 0 <= variable < circuit.num_variables:
            raise EvidenceError(
                "there is no such variable",
                where="variables",
                found=variable,
                expected=f"0 .. {circuit.num_variables - 1}",
            )
    found = readers(circuit, asked)
    steps = steps_of(found)
    of_regions = unit_moments(circuit, asked)
    units = {
        variable: [torch.cat([of_regions[r.region][i] for r in found[variable]]) for i in (0, 1)]
        for variable in asked
    }
    size = batch_size or rows_at_once(circuit, BYTES_PER_UNIT, 8 * len(asked))

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for start, evidence in batches(circuit, x, observed, size):
            log_probs, step_flows = flows(circuit, evidence, steps)
            refuse_impossible(log_probs, start)
            block = torch.empty(len(log_probs), len(asked), 2, device=circuit.device)
            for position, variable in enumerate(asked):
                flow = torch.cat([step_flows[r.step][r.row] for r in found[variable]], dim=1)
                block[:, position] = _mix(flow.double(), *units[variable])
                _keep_observed(circuit, evidence, variable, block[:, position])
            yield start, block

    both = collect(x, blocks(), (0, len(asked), 2))
    return Moments(both[..., 0], both[..., 1])


def _mix(flow: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(B, 2) mean and variance of mixtures (B, K) of units (K,)."""
    flow = flow / flow.sum(-1, keepdim=True)
    mixed = flow @ mean
    spread = (mean - mixed.unsqueeze(1)).square_().add_(variance)
    return torch.stack([mixed, (flow * spread).sum(-1)], dim=-1)


def _keep_observed(circuit: Circuit, evidence: Evidence, variable: int, block: Tensor) -> None:
    if circuit.num_categories[variable] is None:
        assert evidence.reals is not None
        values = evidence.reals[variable]
        seen = ~values.isnan()
    else:
        values = evidence.codes[variable]
        seen = values >= 0
    block[:, 0] = torch.where(seen, values.to(block.dtype), block[:, 0])
    block[:, 1] = torch.where(seen, 0.0, block[:, 1])


def unit_moments(circuit: Circuit, variables: Collection[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and variance (K,) float64 of each unit of the inputs of some variables, by region."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for regions, bank, table in input_tables(circuit, variables):
        if isinstance(bank, GaussianBank):
            mean, variance = table
        else:
            numbers = torch.arange(len(table), dtype=table.dtype, device=table.device).unsqueeze(1)
            mean = (table * numbers).sum(0)
            variance = (table * (numbers - mean).square()).sum(0)
        found.update(dict.fromkeys(regions, (mean, variance)))
    return found
