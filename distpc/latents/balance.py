"""Clusters of about one size: centroids of small clusters move into large ones and split them.

No point is forced to a centroid that is not its nearest, so a balanced codebook is used like any
other. The rule is that of cuVS's balanced k-means (`adjust_centers`): a moved centroid goes an
eighth of the way from the large cluster's mean to one of its points. Legend: D width, K clusters,
P drawn points, n splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

POINTS_PER_SPLIT = 64
"""Points that are drawn for each small cluster, so that large clusters are found among them."""

_SMALL = 0.5
_LARGER = 2.0
_REACH = 1 / 8


@dataclass(frozen=True)
class Splits:
    """Which centroid goes where.

    Attributes:
        small: (n,) clusters that move.
        large: (n,) clusters that they split; may repeat.
        drawn: (n,) int64, the drawn point towards which each goes.
    """

    small: np.ndarray
    large: np.ndarray
    drawn: np.ndarray


def small_clusters(counts: np.ndarray) -> np.ndarray:
    """Clusters with less than half of an equal share of points, the smallest first."""
    found = np.flatnonzero(counts * len(counts) < _SMALL * counts.sum())
    return found[np.argsort(counts[found], kind="stable")]


def plan_splits(counts: np.ndarray, small: np.ndarray, labels: np.ndarray) -> Splits:
    """Match small clusters with large ones.

    Args:
        counts: (K,) points of each cluster.
        small: clusters that may move.
        labels: (P,) clusters of points drawn at random.
    """
    parts = np.ones(len(counts))
    loads = counts.astype(np.float64)
    # The drawn points of each cluster, in their order.
    order = np.argsort(labels, kind="stable")
    begins = np.searchsorted(labels[order], np.arange(len(counts) + 1))
    used = np.zeros(len(counts), dtype=np.int64)
    chosen: list[tuple[int, int, int]] = []
    for cluster in small.tolist():
        large = int(loads.argmax())
        while loads[large] > 0 and begins[large] + used[large] >= begins[large + 1]:
            # None of its points was drawn, or all are taken.
            loads[large] = 0
            large = int(loads.argmax())
        if loads[large] < _LARGER * max(counts[cluster], _SMALL * counts.sum() / len(counts)):
            break
        chosen.append((cluster, large, int(order[begins[large] + used[large]])))
        used[large] += 1
        parts[large] += 1
        loads[large] = counts[large] / parts[large]
    columns = np.array(chosen, dtype=np.int64).reshape(-1, 3).T
    return Splits(columns[0], columns[1], columns[2])


def apply_splits(
    splits: Splits, points: np.ndarray, counts: np.ndarray, means: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(K,) counts, of moved clusters a point at least, and (K, D) float32 means after the splits.

    Args:
        points: (n, D) float32, those towards which centroids go.
    """
    found, held = means.copy(), counts.copy()
    found[splits.small] = (1 - _REACH) * means[splits.large] + _REACH * points
    held[splits.small] = np.maximum(held[splits.small], 1)
    return held, found
