"""Features in two dimensions: their principal components, and where centroids lie in them.

Legend: P points, D feature width, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_SIDE = 512
_MARGIN = 12


@dataclass(frozen=True)
class Projection:
    """Points of a plane.

    Attributes:
        points: (P, 2) float32 features.
        labels: (P,) their clusters.
        centroids: (K, 2) float32.
        explained: shares of the features' variance that the two axes hold.
    """

    points: np.ndarray
    labels: np.ndarray
    centroids: np.ndarray
    explained: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """The shares, and the centroids' places."""
        return {
            "explained": list(self.explained),
            "centroids": [[round(float(v), 5) for v in row] for row in self.centroids],
        }


def project(features: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> Projection:
    """Principal components of (P, D) features; D = 1 has a flat second axis.

    Args:
        labels: (P,) clusters.
        centroids: (K, D).
    """
    values = features.astype(np.float64)
    mean = values.mean(axis=0)
    spread = np.cov(values - mean, rowvar=False, bias=True).reshape(len(mean), len(mean))
    variances, axes = np.linalg.eigh(spread)
    top = axes[:, ::-1][:, :2]
    # The sign of an axis is arbitrary: the same for the same features everywhere.
    top = top * np.where(np.abs(top).max(0) == top.max(0), 1.0, -1.0)
    top = np.pad(top, ((0, 0), (0, 2 - top.shape[1])))
    shares = np.pad(variances[::-1], (0, 2))[:2] / max(variances.sum(), 1e-300)
    return Projection(
        ((values - mean) @ top).astype(np.float32),
        labels,
        ((centroids - mean) @ top).astype(np.float32),
        (float(shares[0]), float(shares[1])),
    )


def colours(labels: np.ndarray) -> np.ndarray:
    """(P, 3) uint8: hues that neighbouring numbers do not share."""
    hue = (labels * 0.61803398875) % 1.0
    bands = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return np.rint(40 + 190 * bands.clip(0, 1)).astype(np.uint8)


def scatter_picture(projection: Projection) -> np.ndarray:
    """(512, 512, 3) uint8: points in their cluster's colour, centroids as black crosses."""
    picture = np.full((_SIDE, _SIDE, 3), 255, dtype=np.uint8)
    everything = np.concatenate([projection.points, projection.centroids])
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = (_SIDE - 2 * _MARGIN - 1) / np.maximum(high - low, 1e-12)

    def places(points: np.ndarray) -> np.ndarray:
        return (_MARGIN + (points - low) * scale).round().astype(int)

    at = places(projection.points)
    for shift in ((0, 0), (0, 1), (1, 0), (1, 1)):
        picture[_SIDE - 1 - at[:, 1] - shift[1], at[:, 0] + shift[0]] = colours(projection.labels)
    at = places(projection.centroids)
    for step in range(-3, 4):
        picture[_SIDE - 1 - at[:, 1] + step, at[:, 0]] = 0
        picture[_SIDE - 1 - at[:, 1], at[:, 0] + step] = 0
    return picture
