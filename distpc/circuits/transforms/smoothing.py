"""Makes smoothing part of the statistics."""

from __future__ import annotations

import copy

import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.sums import SumBank


@torch.no_grad()
def fold_smoothing(circuit: Circuit) -> Circuit:
    """A circuit with the same weights whose read-out adds nothing: S <- S + eps.

    Pseudocounts are imaginary samples a *row*, so with them on, a state's clones are smoothed twice
    as much as the state was. Fold before a change of states that must not change the likelihood;
    training (`set_smoothing`) turns smoothing on again.
    """
    new = copy.deepcopy(circuit)
    pseudocount, leaf_pseudocount, num_samples = circuit.smoothing
    for bank in new.bank_list:
        if bank.learns_by == "em":
            count = pseudocount if isinstance(bank, SumBank) else leaf_pseudocount
            bank.statistics.add_(bank.pseudo_samples(count / num_samples))
    new.set_smoothing(0.0, 0.0, num_samples)
    return new
