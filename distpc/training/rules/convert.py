"""From one rule to another without losing the model."""

from __future__ import annotations

import torch

from distpc.circuits.circuit import Circuit
from distpc.training.rules.base import Smoothing, em_banks

_LEAST_USES = 1e-30
_TAKEN_OUT = 1.0 - 1e-6
"""Share of the new smoothing that is taken out of S; all of it would, after rounding, leave
weights just below zero."""


@torch.no_grad()
def convert_(circuit: Circuit, smoothing: Smoothing) -> None:
    """Change how a circuit's read-out is smoothed, and bring S to the flow scale, in place.

    Rules differ in what they leave in S: running means of flows that the read-out smooths (online
    EM), or rows of any sum that are smoothed already (the others). Weights stay what they are:

        S <- theta * (uses + q) - q / fan-in        (moments and their prior, where there are some)

    with q the new smoothing in uses per sample. Entries may become as low as -q / fan-in, which
    the read-out adds; under online EM they are above zero again after the first flows.

    Args:
        circuit: with the statistics and the smoothing of the rule before.
        smoothing: of the read-out from now on; zeros for rules on whole rows.
    """
    before = Smoothing(*circuit.smoothing)
    for bank in em_banks(circuit):
        bank.statistics.add_(bank.pseudo_samples(before.uses_of(bank)).to(bank.statistics))
    circuit.set_smoothing(0.0, 0.0, smoothing.num_samples)
    circuit.rescale_to_uses_()
    for bank in em_banks(circuit):
        uses = smoothing.uses_of(bank)
        # A copy: the totals of moments are a view of the statistics.
        total = bank.totals(bank.statistics).clamp_min(_LEAST_USES)
        bank.statistics.mul_(1.0 + uses / total)
        bank.statistics.sub_(bank.pseudo_samples(uses * _TAKEN_OUT).to(bank.statistics))
    circuit.set_smoothing(*smoothing)
