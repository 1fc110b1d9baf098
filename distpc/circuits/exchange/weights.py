"""Write weights into a circuit: the way in for models that were trained elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distpc.circuits.gaussian import VARIANCE_FLOOR, GaussianBank
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.sums import SumBank
from distpc.errors import StructureError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

TOLERANCE = 1e-3
"""How far a row of weights may be from summing to one: bfloat16 files are off by some 1e-3."""


@torch.no_grad()
def write_weights(circuit: Circuit, weights: Mapping[int, Tensor]) -> None:
    """Give a circuit these weights, as statistics on the scale of expected uses, unsmoothed.

    Args:
        circuit: changed in place; its inputs are categorical or Gaussian.
        weights: for each sum region theta (K', fan-in), each categorical one probabilities (K, C),
            each Gaussian one mean and variance (K, 2). Tied regions: one of them is enough.

    Raises:
        StructureError: a region without weights, weights of another shape, negative, NaN, or rows
            that do not sum to one; a variance that float32 moments cannot hold.
    """
    circuit.set_smoothing(0.0, 0.0, 1)
    for bank, plan in zip(circuit.bank_list, circuit.schedule.banks, strict=True):
        for table, owners in enumerate(plan.owners):
            given = next((owner for owner in owners if owner in weights), None)
            kind = circuit.graph.regions[owners[0]].kind
            where = f"region {owners[0] if given is None else given} ({kind})"
            if given is None:
                raise StructureError("a region got no weights", where=where)
            if not isinstance(bank, SumBank | CategoricalBank | GaussianBank):
                raise StructureError(
                    "weights of this family cannot be written", where=where, found=plan.kind
                )
            value = weights[given].detach().cpu().double()
            into = bank.statistics_of(table)
            shape = (len(into), 2) if isinstance(bank, GaussianBank) else tuple(into.shape)
            _check_shape(value, shape, where)
            if isinstance(bank, GaussianBank):
                _write_gaussian(bank, table, value, where)
            else:
                into.copy_(check_rows(value, where))
    circuit.rescale_to_uses_()


def check_rows(weights: Tensor, where: str) -> Tensor:
    """Rows (..., fan-in) of weights >= 0 that sum to one, made exactly so.

    Raises:
        StructureError: naming `where` and the row.
    """
    total = weights.sum(-1)
    is_bad = (weights < 0).any(-1) | ~((total - 1).abs() <= TOLERANCE)
    if is_bad.any():
        row = tuple(is_bad.nonzero()[0].tolist())
        raise StructureError(
            "weights are no distribution",
            where=f"{where}, row {row[0] if len(row) == 1 else row}",
            found=f"least {weights[row].min():.4g}, sum {total[row]:.6g}",
            expected="weights >= 0 with sum 1",
            fix="normalise the model first (softmax weights in libcirkit)",
        )
    return weights / total.unsqueeze(-1)


def _check_shape(value: Tensor, shape: tuple[int, ...], where: str) -> None:
    if tuple(value.shape) != shape:
        raise StructureError(
            "weights do not fit their region", where=where, found=tuple(value.shape), expected=shape
        )
    if not value.isfinite().all():
        raise StructureError(
            "weights hold NaN or infinity",
            where=where,
            found=f"{int((~value.isfinite()).sum())} of {value.numel()} entries",
        )


def _write_gaussian(bank: GaussianBank, table: int, moments: Tensor, where: str) -> None:
    """Moments (K, 2) about a centre and spread chosen so that float32 holds them."""
    mean, variance = moments.unbind(-1)
    if not (variance > 0).all():
        raise StructureError(
            "a Gaussian unit has no variance",
            where=f"{where}, unit {int((variance <= 0).nonzero()[0])}",
            found=f"{float(variance.min()):.4g}",
            expected="a variance above 0",
        )
    centre = mean.mean()
    # The floor on variances is relative to the spread: no unit may fall below it.
    spread = (variance.mean() + (mean - centre).square().mean()).sqrt()
    spread = spread.clamp_max((variance.min() / (2 * VARIANCE_FLOOR)).sqrt())
    bank.centre[table], bank.spread[table] = centre, spread
    z = (mean - centre) / spread
    into = bank.statistics_of(table)
    into.copy_(torch.stack([torch.ones_like(z), z, variance / spread**2 + z.square()], dim=-1))
    error = (bank.weights_of(table, torch.float64)[:, 1].cpu() / variance - 1).abs()
    if not (error <= TOLERANCE).all():
        raise StructureError(
            "the units' variances differ too much for float32 moments",
            where=f"{where}, unit {int(error.argmax())}",
            found=f"variances {float(variance.min()):.4g} to {float(variance.max()):.4g}, "
            f"means {float(mean.min()):.4g} to {float(mean.max()):.4g}",
        )
