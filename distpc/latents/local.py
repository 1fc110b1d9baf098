"""K-means of points that one process holds: for small jobs inside of a stage's worker.

Legend: P points, D width, K clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distpc.errors import LatentError
from distpc.latents.kmeans import grid_bits, refill, totals_of
from distpc.latents.nearest import assign_points
from distpc.latents.seeding import PLUS_PLUS_POINTS_PER_CLUSTER, draw_points, plus_plus

MAX_POINTS = 65_536
"""Points that a clustering looks at, drawn by its seed where there are more."""


def cluster_points(
    points: Tensor, num_clusters: int, num_rounds: int, seed: list[int], start: Tensor | None = None
) -> Tensor:
    """Lloyd's centroids (K, D) float32, empty clusters moved to far points.

    Args:
        points: (P, D) finite, of any float type.
        num_clusters: K.
        num_rounds: of Lloyd's algorithm; 0 leaves the first centroids.
        seed: of everything random.
        start: (k, D) centroids to go on from, the first ones of the result; the others are drawn
            as k-means++ would, far from those. Default: all are drawn.

    Raises:
        LatentError: no points.
    """
    if not len(points):
        raise LatentError("there are no points to cluster", found=f"shape {tuple(points.shape)}")
    rng = np.random.default_rng(seed)
    points = draw_points(points.float(), MAX_POINTS, rng)
    few = draw_points(points, PLUS_PLUS_POINTS_PER_CLUSTER * num_clusters, rng)
    if start is None:
        centroids = plus_plus(few.numpy(), np.ones(len(few)), num_clusters, rng)
    else:
        centroids = _extended(start.float(), points, num_clusters, rng)
    bits = grid_bits(len(points), float(points.abs().max()))
    for _ in range(num_rounds):
        total = totals_of(points, centroids, bits)
        means = total.means(centroids.numpy())
        empty = np.flatnonzero(total.counts == 0)
        if len(empty):
            _, distances = assign_points(points, centroids)
            far = distances.topk(min(len(points), 4 * len(empty))).indices
            means, _ = refill(means, empty, distances[far].numpy(), points[far].numpy())
        moved = torch.from_numpy(means)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _extended(start: Tensor, points: Tensor, num_clusters: int, rng: np.random.Generator) -> Tensor:
    """The given centroids, and points drawn in proportion to their squared distances from all."""
    centroids = start
    while len(centroids) < num_clusters:
        masses = assign_points(points, centroids)[1].double().numpy()
        total = masses.sum()
        row = int(rng.choice(len(points), p=masses / total if total > 0 else None))
        centroids = torch.cat([centroids, points[row : row + 1]])
    return centroids[:num_clusters]
