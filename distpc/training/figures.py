"""Sums over samples from which bits per dimension are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distpc.data.spec import MISSING


@dataclass(frozen=True)
class Figures:
    """Sums over samples.

    Attributes:
        nats: log-likelihood of the samples with a finite one.
        values: observed values of those samples.
        samples: all samples.
        impossible: samples of likelihood 0.
        not_a_number: samples with NaN or +infinity.
    """

    nats: float
    values: float
    samples: int
    impossible: int
    not_a_number: int

    NAMES: ClassVar[tuple[str, ...]] = ("nats", "values", "samples", "impossible", "not_a_number")

    @classmethod
    def of(cls, totals: Tensor) -> Figures:
        """From the sums in the order of `NAMES`."""
        nats, values, *counts = totals.tolist()
        return cls(nats, values, *(int(count) for count in counts))

    @property
    def bits(self) -> float:
        """Bits per observed value (dimension, character) of the samples that are possible."""
        return -self.nats / max(self.values, 1.0) / math.log(2)


def tally(likelihoods: Tensor, x: Tensor) -> Tensor:
    """(5,) float64: the sums that `Figures` holds, of (B,) nats of samples (B, V)."""
    finite = torch.isfinite(likelihoods)
    impossible = likelihoods == -math.inf
    observed = (~torch.isnan(x) if x.is_floating_point() else x != MISSING).sum(-1)
    values = [
        torch.where(finite, likelihoods.double(), 0.0).sum(),
        torch.where(finite, observed, 0).sum(),
        torch.tensor(len(likelihoods)),
        impossible.sum(),
        (~finite & ~impossible).sum(),
    ]
    return torch.stack([value.to(likelihoods.device, torch.float64) for value in values])
