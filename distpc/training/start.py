"""What training takes from the data before it starts: marginals, scales, a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.inputs import CategoricalBank, TableBank
from distpc.circuits.neighbours import neighbour_kernel
from distpc.circuits.random_start import RandomStart

MARGINAL_SAMPLES = 20_000
"""Samples from which marginals are counted; a histogram of one variable needs no more."""


@dataclass
class Marginals:
    """What each variable looks like on its own.

    Attributes:
        counts: per categorical variable (C,) float64 counts of its values; None for real ones.
        centre, spread: (V,) float64 mean and standard deviation of real variables, else 0 and 1.
    """

    counts: list[Tensor | None]
    centre: Tensor
    spread: Tensor


def marginals_of(
    batches: Iterable[np.ndarray | Tensor], num_categories: Sequence[int | None]
) -> Marginals:
    """Count values and take moments; missing values (-1, NaN) are left out.

    Args:
        batches: (B, V) integers or floats.
        num_categories: C of every variable, None for real ones.
    """
    counts = [None if c is None else torch.zeros(c, dtype=torch.float64) for c in num_categories]
    moments = torch.zeros(3, len(counts), dtype=torch.float64)
    origin: Tensor | None = None
    for batch in batches:
        x = torch.as_tensor(batch)
        if origin is None:
            # Moments about a value near the mean keep small variances of large values.
            origin = x[:1].double().nan_to_num(0.0)
        known = ~torch.isnan(x) if x.is_floating_point() else x >= 0
        shifted = torch.where(known, x.double() - origin, 0.0)
        moments += torch.stack([known.double().sum(0), shifted.sum(0), shifted.square().sum(0)])
        for variable, total in enumerate(counts):
            if total is not None:
                values = x[:, variable]
                values = values[values >= 0].long()
                total += torch.bincount(values, minlength=len(total)).to(total)
    if origin is None:
        raise ValueError("no samples")
    number = moments[0].clamp_min(1.0)
    mean = moments[1] / number
    deviation = (moments[2] / number - mean.square()).clamp_min(0.0).sqrt()
    is_real = torch.tensor([c is None for c in num_categories])
    return Marginals(
        counts,
        centre=torch.where(is_real, mean + origin[0], 0.0),
        # A constant column has no scale of its own.
        spread=torch.where(is_real & (deviation > 0), deviation, 1.0),
    )


@torch.no_grad()
def start_near_data_(circuit: Circuit, batches: Iterable[np.ndarray | Tensor]) -> None:
    """Move a random circuit's inputs to where the data are.

    Every categorical row is multiplied by its variable's marginal, so that rows differ by the
    circuit's own noise alone and no state begins where there is no data: the tuned EM baseline of
    the measured prototypes. Other families over categories do alike (`start_near_`). Tied rows
    take the marginal of all their variables together. Real variables are standardised. Statistics
    are then scaled to the expected uses of their rows.

    Args:
        circuit: with random parameters.
        batches: (B, V) samples.
    """
    marginals = marginals_of(batches, circuit.num_categories)
    circuit.standardise(marginals.centre, marginals.spread)
    for (number, table), shares in table_shares(circuit, marginals).items():
        bank = circuit.bank_list[number]
        assert isinstance(bank, TableBank)
        # The scale of statistics does not matter before the last line.
        bank.start_near_(table, shares.to(circuit.device))
    circuit.rescale_to_uses_()


def random_near_data(
    circuit: Circuit, batches: Iterable[np.ndarray | Tensor], seed: int, noise: float
) -> RandomStart:
    """Values of a random circuit whose inputs are where the data are, see `start_near_data_`.

    Args:
        circuit: which is going to be filled with them, whole or in parts; its real variables are
            standardised.
        batches: (B, V) samples.
        seed, noise: see `Circuit`.
    """
    marginals = marginals_of(batches, circuit.num_categories)
    circuit.standardise(marginals.centre, marginals.spread)
    return RandomStart(circuit, seed, noise, table_shares(circuit, marginals))


def table_shares(circuit: Circuit, marginals: Marginals) -> dict[tuple[int, int], Tensor]:
    """By bank and table, the shares (C,) of the values of all variables that the table is for."""
    shares = {}
    for number, plan in enumerate(circuit.schedule.banks):
        for table, owners in enumerate(plan.owners):
            variables = [circuit.graph.regions[owner].variable for owner in owners]
            counts = [marginals.counts[v] for v in variables if v is not None]
            known = [count for count in counts if count is not None]
            if known:
                # One value's worth over all of them: none is ruled out.
                pooled = torch.stack(known).sum(0) + 1.0 / len(known[0])
                shares[number, table] = pooled / pooled.sum()
    return shares


def standardise_if_new(circuit: Circuit, x: Tensor) -> None:
    """Set the scale of real variables from samples (N, V), unless the circuit has one already."""
    banks = [bank for bank in circuit.bank_list if isinstance(bank, GaussianBank)]
    is_new = all(bool((b.centre == 0).all()) and bool((b.spread == 1).all()) for b in banks)
    if banks and is_new:
        marginals = marginals_of([x], circuit.num_categories)
        circuit.standardise(marginals.centre, marginals.spread)


def smooth_over_neighbours(
    circuit: Circuit, batches: Iterable[np.ndarray | Tensor], width: float
) -> None:
    """Let training spread the flows of categorical inputs over neighbouring values.

    Frequencies of values are those of all variables together. Tables of another number of
    categories than most variables have keep their flows.

    Args:
        circuit: whose later backward passes spread flows.
        batches: (B, V) samples.
        width: standard deviation in values; 0 for no spreading.
    """
    banks = [bank for bank in circuit.bank_list if isinstance(bank, CategoricalBank)]
    kernel: Tensor | None = None
    if width > 0 and banks:
        categories = [count for count in circuit.num_categories if count is not None]
        size = max(categories, key=categories.count)
        found = marginals_of(batches, circuit.num_categories).counts
        alike = [counts for counts in found if counts is not None and len(counts) == size]
        kernel = neighbour_kernel(torch.stack(alike).sum(0), width)
    for bank in banks:
        bank.kernel = None if kernel is None else kernel.to(bank.starts.device)
