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
        values: observed values of those samples; characters of text.
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
        return bits_per_value(self.nats, self.values)


def bits_per_value(nats: float, values: float) -> float:
    """-log2 likelihood per observed value; infinite where no value counts."""
    return -nats / values / math.log(2) if values else math.inf


def count_values(x: Tensor, counted: str = "values") -> Tensor:
    """(B,) int64: what the figure of each sample is divided by.

    Args:
        x: (B, V) integers with -1, or floats with NaN, where missing.
        counted: see `DatasetSpec.counted`. `characters` of UTF-8 are the bytes that do not continue
            one, 0b10xxxxxx (RFC 3629); `values` are all that are not missing.
    """
    if x.is_floating_point():
        return (~torch.isnan(x)).sum(-1)
    counts = x != MISSING
    if counted == "characters":
        counts &= (x & 0xC0) != 0x80
    return counts.sum(-1)


def tally(likelihoods: Tensor, x: Tensor, counted: str = "values") -> Tensor:
    """(5,) float64: the sums that `Figures` holds.

    Args:
        likelihoods: (B,) nats.
        x: (B, V) the samples, on the same device.
        counted: see `count_values`.
    """
    finite = torch.isfinite(likelihoods)
    impossible = likelihoods == -math.inf
    observed = count_values(x, counted)
    values = [
        torch.where(finite, likelihoods.double(), 0.0).sum(),
        torch.where(finite, observed, 0).sum(),
        # Made where it is needed: a copy from the host would wait for the device.
        torch.full((), len(likelihoods), device=likelihoods.device),
        impossible.sum(),
        (~finite & ~impossible).sum(),
    ]
    return torch.stack([value.to(likelihoods.device, torch.float64) for value in values])
