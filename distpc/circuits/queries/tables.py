"""Weights of regions, a bank at a time: reading a bank out for each of its regions is quadratic."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distpc.circuits.bank import Bank
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.inputs import TableBank
from distpc.circuits.schedule import SumPlan
from distpc.circuits.sums import SumBank
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


def sum_tables(circuit: Circuit, plan: SumPlan, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(region, weights (K', fan-in)) of a step's sums."""
    bank = circuit.bank_list[plan.bank]
    assert isinstance(bank, SumBank)
    weights = bank.weights(dtype)
    for region in plan.regions:
        yield region, weights[circuit.bank_of(region)[1]]


def input_tables(
    circuit: Circuit, variables: Collection[int] | None = None
) -> Iterator[tuple[list[int], Bank, Tensor]]:
    """(regions that share it, bank, table in float64) of the inputs of some variables (None: all).

    Over categories a table holds probabilities (C, K); of Gaussian units, means and variances
    (2, K).

    Raises:
        EvidenceError: a family that is neither.
    """
    wanted = None if variables is None else set(variables)
    regions = circuit.graph.regions
    for plan, bank in zip(circuit.schedule.banks, circuit.bank_list, strict=True):
        if isinstance(bank, SumBank):
            continue
        weights: Tensor | None = None
        for table, owners in enumerate(plan.owners):
            used = [o for o in owners if wanted is None or regions[o].variable in wanted]
            if not used:
                continue
            if isinstance(bank, TableBank):
                weights = bank.weights(torch.float64) if weights is None else weights
                yield used, bank, weights[bank.table(table)]
            elif isinstance(bank, GaussianBank):
                yield used, bank, bank.weights_of(table, torch.float64).T
            else:
                raise EvidenceError(
                    "what this query asks is not known of a family of inputs",
                    where=f"input region {used[0]} of variable {regions[used[0]].variable}",
                    found=plan.kind,
                    expected="a family over categories, or gaussian",
                )
