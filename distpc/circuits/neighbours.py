"""Smoothing of categorical inputs over neighbouring values, for values that have an order.

A unit that sees a thousand samples of 256 grey values remembers which of them it saw. Its flow is
therefore counted for the neighbours of the value as well: a kernel estimate of each row inside
online EM, the EMS algorithm of Silverman et al. (1990). The weights that are read out stay
ordinary categorical ones, and the total of a row is what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neighbour_kernel(counts: Tensor, width: float) -> Tensor:
    """How a flow on one value is shared out among values near it.

    Gaussian in the distance, damped by the squared ratio of the two values' frequencies: values of
    a mass of their own (the black of a background, a clipped white) neither leak nor collect.

    Args:
        counts: (C,) how often each value occurs in the data.
        width: standard deviation of the Gaussian, in values; above 0.

    Returns:
        (C, C) float32, symmetric, rows sum to one.
    """
    frequency = counts.double() + 1.0
    value = torch.arange(len(counts), dtype=torch.float64)
    gaussian = (-0.5 * ((value.unsqueeze(1) - value) / width).square()).exp()
    # The normaliser of an unbounded line: the ends keep what would fall outside.
    reach = torch.arange(-len(counts), len(counts) + 1, dtype=torch.float64)
    gaussian /= (-0.5 * (reach / width).square()).exp().sum()
    ratio = frequency.unsqueeze(1) / frequency
    kernel = gaussian * torch.minimum(ratio, 1.0 / ratio).square()
    kernel.fill_diagonal_(0.0)
    return (kernel + torch.diag(1.0 - kernel.sum(1))).float()
