"""Quadrature on [-1, 1]: points, weights, and points moved at random inside their cells."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distpc.errors import ConfigError

RULES = ("trapezoid", "gauss_legendre")


class Quadrature(NamedTuple):
    """The integral of f over [-1, 1] is about the sum of weights * f(points).

    Attributes:
        points: (K,) float64, rising.
        weights: (K,) float64, positive, with sum 2.
    """

    points: Tensor
    weights: Tensor


@lru_cache(maxsize=256)
def quadrature(rule: str, num_points: int) -> Quadrature:
    """The K-point rule of that name; one point is the midpoint.

    Args:
        rule: "trapezoid" (composite; error of order K^-2, end points included), or
            "gauss_legendre" (exact for polynomials up to degree 2 K - 1).
        num_points: K.

    Raises:
        ConfigError: no such rule, or no points.
    """
    if rule not in RULES:
        raise ConfigError(
            "there is no such quadrature rule",
            where="rule",
            found=rule,
            expected=", ".join(RULES),
        )
    if num_points < 1:
        raise ConfigError(
            "a quadrature has no points", where="num_points", found=num_points, expected="1 or more"
        )
    if rule == "gauss_legendre":
        points, weights = np.polynomial.legendre.leggauss(num_points)
    elif num_points == 1:
        points, weights = np.zeros(1), np.full(1, 2.0)
    else:
        points = np.linspace(-1.0, 1.0, num_points)
        weights = np.full(num_points, 2.0 / (num_points - 1))
        weights[[0, -1]] /= 2.0
    return Quadrature(torch.from_numpy(points), torch.from_numpy(weights))


def jittered(rule: Quadrature, amount: float, generator: torch.Generator) -> Quadrature:
    """The same weights at points drawn from their own cells.

    The cells part [-1, 1] in order, each as long as its point's weight. A point drawn uniformly
    from its cell makes the rule an unbiased estimate of the integral (stratified sampling), so a
    network that is trained so cannot lean on where the points lie.

    Args:
        rule: whose points lie in their cells, as those of both rules here do.
        amount: 0 leaves points where they are, 1 draws from the whole cell; between, each goes that
            part of the way.
        generator: of the draws.
    """
    ends = rule.weights.cumsum(0) - 1.0
    drawn = ends - rule.weights * torch.rand(len(ends), generator=generator, dtype=torch.float64)
    return Quadrature(torch.lerp(rule.points, drawn, amount).clamp(-1.0, 1.0), rule.weights)
