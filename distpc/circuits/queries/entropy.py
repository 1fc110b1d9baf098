"""Entropies of a circuit: exact ones, bounds, and an estimate, in nats.

With Z the choices of all sums, the chain rule along the circuit gives in closed form

    H(X, Z) = sum over sum units of uses * H(row of weights) + H(X | Z)
    H(X | Z) = sum over input units of uses * H(unit)

where uses is how often a sample is expected to use the unit. H(X) itself is hard unless X
determines Z (a deterministic circuit), where H(X) = H(X, Z); else H(X | Z) <= H(X) <= H(X, Z).
With real variables, the entropies of X are differential ones.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.queries.tables import input_tables, sum_tables
from distpc.circuits.queries.uses import uses
from distpc.circuits.schedule import SumPlan
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


class Entropy(NamedTuple):
    """Entropies in nats.

    Attributes:
        joint: H(X, Z), exact: an upper bound on H(X).
        given_latents: H(X | Z), exact: a lower bound on H(X).
        exact: H(X) where the circuit is deterministic; None elsewhere, where there is no formula.
        estimate: H(X) as the mean of -log p(x) over samples; NaN without samples.
        standard_error: of the estimate; NaN with fewer than two samples.
        num_samples: that the estimate is made of.
    """

    joint: float
    given_latents: float
    exact: float | None
    estimate: float
    standard_error: float
    num_samples: int


@torch.no_grad()
def entropy(circuit: Circuit, num_samples: int = 0, seed: int = 0) -> Entropy:
    """H(X, Z), H(X | Z), and H(X) where it is known or estimated.

    Args:
        circuit: the model.
        num_samples: samples to estimate H(X) by; 0: no estimate.
        seed: of the samples.

    Raises:
        EvidenceError: no such number of samples, or inputs whose entropy is not known.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 0:
        raise EvidenceError(
            "no such number of samples", where="num_samples", found=num_samples, expected="0, 1, .."
        )
    of_units = uses(circuit, torch.float64)
    given_latents = 0.0
    for regions, bank, table in input_tables(circuit):
        if isinstance(bank, GaussianBank):
            entropies = 0.5 * (table[1].log() + math.log(2 * math.pi * math.e))
        else:
            entropies = torch.special.entr(table).sum(0)
        given_latents += sum(float(of_units[region] @ entropies) for region in regions)
    of_choices = 0.0
    for plan in circuit.schedule.steps:
        if isinstance(plan, SumPlan):
            for region, weights in sum_tables(circuit, plan, torch.float64):
                of_choices += float(of_units[region] @ torch.special.entr(weights).sum(-1))
    joint = given_latents + of_choices
    exact = joint if circuit.graph.is_deterministic else None
    mean, error = _estimate(circuit, int(num_samples), seed)
    return Entropy(joint, given_latents, exact, mean, error, int(num_samples))


def _estimate(circuit: Circuit, num_samples: int, seed: int) -> tuple[float, float]:
    if not num_samples:
        return math.nan, math.nan
    x = circuit.sample(num_samples, seed=seed)
    surprise: Tensor = -circuit.log_prob(x).double()
    if num_samples == 1:
        return float(surprise.mean()), math.nan
    return float(surprise.mean()), float(surprise.std() / math.sqrt(num_samples))
