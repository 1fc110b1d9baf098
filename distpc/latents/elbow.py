"""How the distance to the nearest centroid falls with the number of clusters: the elbow over K."""

from __future__ import annotations

from typing import Any

import numpy as np

POINTS = 16_384
"""Features that are clustered; as many others are held out."""
_POINTS_PER_CLUSTER = 16
_ROUNDS = 25


def sizes_around(num_clusters: int, num_points: int) -> list[int]:
    """Powers of two from 2 to four times `num_clusters`, and it, with 16 points a cluster."""
    most = num_points // _POINTS_PER_CLUSTER
    sizes = {2**power for power in range(1, 40) if 2**power <= 4 * num_clusters}
    return sorted(size for size in sizes | {num_clusters} if 2 <= size <= most)


def elbow(features: np.ndarray, sizes: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Cluster half of (P, D) features for each size and measure both halves.

    Returns:
        For each size up to the number of different features: `num_clusters`, and mean squared
        distances to the nearest centroid of the half that was clustered (`fitted`) and of the
        other (`held_out`).
    """
    from sklearn.cluster import KMeans

    points = features.astype(np.float32)[np.random.default_rng(seed).permutation(len(features))]
    half = len(points) // 2
    different = len(np.unique(points[:half], axis=0))
    found = []
    for size in sizes:
        if size > different:
            continue
        model = KMeans(size, n_init=1, max_iter=_ROUNDS, random_state=seed).fit(points[:half])
        found.append(
            {
                "num_clusters": size,
                "fitted": float(model.inertia_ / half),
                "held_out": float(-model.score(points[half:]) / (len(points) - half)),
            }
        )
    return found
