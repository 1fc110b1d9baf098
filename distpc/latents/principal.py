"""Principal components of features, and whitening: a linear map before k-means.

Legend: P points, D feature width, d width afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distpc.errors import LatentError

_BLOCK_ROWS = 512
_LEAST_VARIANCE = 1e-6
"""Directions with less of the largest variance are the rounding of float16, not a signal."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of points, in float64; added up in a fixed order.

    Attributes:
        count: P.
        sums: (D,).
        products: (D, D) sum of x x^T.
    """

    count: int
    sums: np.ndarray
    products: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.sums + other.sums, self.products + other.products
        )


def moments_of(points: Tensor) -> Moments:
    """Moments of (P, D) points."""
    width = points.shape[1]
    sums = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    # Short products: a library shares long ones out over threads, and the sum's order with them.
    for block in points.split(_BLOCK_ROWS):
        exact = block.double()
        sums += exact.sum(0)
        products += exact.T @ exact
    return Moments(len(points), sums.numpy(), products.numpy())


@dataclass(frozen=True)
class Projection:
    """x -> (x - mean) basis, rounded to float16 like features, so that sums of it are exact too.

    Attributes:
        mean: (D,) float32.
        basis: (D, d) float32.
    """

    mean: Tensor
    basis: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """(P, D) of any float type -> (P, d) float16, on the CPU."""
        parts = [
            ((block.to(self.basis.device).float() - self.mean) @ self.basis).half().cpu()
            for block in points.split(_BLOCK_ROWS)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.basis.shape[1]).half()

    def to(self, device: torch.device | str) -> Projection:
        """The same on another device."""
        return Projection(self.mean.to(device), self.basis.to(device))


def fit_projection(
    moments: Moments, width: int | None, whiten: bool, where: Path | str
) -> Projection:
    """Principal directions, those of the largest variance first.

    Args:
        moments: of all points.
        width: d; default: every direction with variance.
        whiten: divide each direction by its standard deviation.
        where: of the features, for errors.

    Raises:
        LatentError: no direction has variance, or fewer than `width` have.
    """
    mean = moments.sums / moments.count
    covariance = moments.products / moments.count - np.outer(mean, mean)
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1], directions[:, ::-1]
    # Rounding leaves a constant feature a variance of this size, of either sign.
    floor = 1e-12 * max(float(np.abs(moments.products).max()) / moments.count, 1e-300)
    if variances[0] <= floor:
        raise LatentError(
            "features do not vary: there are no principal directions",
            where=where,
            found=f"variance {max(variances[0], 0.0):.3g} in all {len(mean)} columns",
            expected="features that tell patches apart",
            fix="look at the teacher, or raise latents.max_samples",
        )
    rank = int((variances > max(_LEAST_VARIANCE * variances[0], floor)).sum())
    if width is not None and width > rank:
        raise LatentError(
            "features vary in fewer directions than were asked for",
            where=where,
            found=f"{rank} directions with variance, of {len(mean)} columns",
            expected=f"at least latents.projection_width = {width}",
            fix=f"set latents.projection_width={rank}",
        )
    kept = rank if width is None else width
    basis = directions[:, :kept]
    # A direction's sign is arbitrary: its largest component is made positive.
    largest = np.abs(basis).argmax(0)
    basis = basis * np.sign(basis[largest, np.arange(kept)])
    if whiten:
        basis = basis / np.sqrt(variances[:kept])
    return Projection(
        torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(basis.astype(np.float32))
    )
