"""Lloyd's k-means over shards of points: what points contribute to a round, and how it adds up.

Contributions are exact: features are float16, so multiples of 2^-24, and their float64 sums are
without rounding as long as they stay below 2^29. So they may be added in any order, over any
groups of shards, and the result is the same, bit for bit, for any number of workers. Where sums
could grow larger, points are rounded to a coarser grid first (`grid_bits`).

Legend: P points of a shard, D feature width, K clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distpc.latents.nearest import chunks

_HALF_BITS = 24
_EXACT_BITS = 53
_HASHED_ROWS = 4096
_SQUARED_ROWS = 8192


@dataclass(frozen=True)
class Totals:
    """What points contribute to a Lloyd round; exact, so that `+` has no order.

    Attributes:
        sums: (K, D) float64, sum of the points that are nearest to each centroid.
        counts: (K,) int64, how many those are.
    """

    sums: np.ndarray
    counts: np.ndarray

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.sums + other.sums, self.counts + other.counts)

    def reduction(self, centroids: np.ndarray) -> float:
        """Sum of squared distances to the nearest of (K, D) `centroids`, less that to the origin:
        no distance has to be computed for it."""
        exact = centroids.astype(np.float64)
        mixed = float(np.sum(exact * self.sums))
        own = float(np.sum(np.square(exact).sum(1) * self.counts))
        return own - 2 * mixed

    def means(self, centroids: np.ndarray) -> np.ndarray:
        """(K, D) float32 mean of each cluster; an empty one keeps its (K, D) `centroids` row."""
        filled = self.counts > 0
        means = centroids.astype(np.float64)
        means[filled] = self.sums[filled] / self.counts[filled, None]
        return means.astype(np.float32)


def grid_bits(num_points: int, largest: float) -> int:
    """Binary digits behind the point that points may have for their sums to be exact in float64.

    Args:
        num_points: of all shards.
        largest: largest absolute value in them.

    Returns:
        At most 24, which rounds no float16; fewer, even negative, where sums could grow too large.
    """
    bound = math.frexp(max(1.0, num_points * largest))[1]
    return min(_HALF_BITS, _EXACT_BITS - bound)


def totals_of(points: Tensor, centroids: Tensor, bits: int) -> Totals:
    """A shard's contribution to a Lloyd round.

    Args:
        points: (P, D) of any float type, on the CPU.
        centroids: (K, D) float32, on the device that is to do the work.
        bits: of the grid that points are rounded to, see `grid_bits`.
    """
    num_clusters, width = centroids.shape
    sums = torch.zeros(num_clusters, width, dtype=torch.float64, device=centroids.device)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=centroids.device)
    for _, chunk, labels in chunks(points, centroids):
        exact = chunk.double()
        if bits < _HALF_BITS:
            exact = torch.round(exact * 2.0**bits) * 2.0**-bits
        sums.index_add_(0, labels, exact)
        counts += torch.bincount(labels, minlength=num_clusters)
    return Totals(sums.cpu().numpy(), counts.cpu().numpy())


def squares_of(points: Tensor) -> float:
    """Sum of the squared lengths of (P, D) points."""
    return sum(float(block.double().square().sum()) for block in points.split(_SQUARED_ROWS))


def farthest(distances: Tensor, count: int) -> np.ndarray:
    """Rows of the `count` largest of (P,) float32 distances, largest first, of equal ones the first
    first; all rows when there are fewer."""
    values = distances.numpy()
    count = min(count, len(values))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    ties = np.flatnonzero(values == border)[: count - len(above)]
    chosen = np.concatenate([above, ties])
    return chosen[np.lexsort((chosen, -values[chosen]))]


def refill(
    means: np.ndarray, empty: np.ndarray, distances: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, int]:
    """Move empty clusters to far points.

    A point that was just made a centroid lowers the distances of the others, so that several
    empty clusters spread out instead of landing on copies of one outlier.

    Args:
        means: (K, D) float32 centroids of the next round.
        empty: indices of empty clusters.
        distances: (n,) squared distances of candidates to their centroids, in the order of shards.
        candidates: (n, D) points.

    Returns:
        (K, D) float32 centroids and the number of clusters that were moved; a cluster stays where
        it was when no far point is left away from every centroid.
    """
    found = means.copy()
    points, left = candidates.astype(np.float64), distances.astype(np.float64)
    moved = 0
    for cluster in empty:
        if not len(left) or left.max() <= 0:
            break
        chosen = points[left.argmax()]
        found[cluster] = chosen.astype(np.float32)
        left = np.minimum(left, np.square(points - chosen).sum(1))
        moved += 1
    return found, moved


def distinct_hashes(points: Tensor, limit: int) -> np.ndarray:
    """Hashes (n,) uint64 of up to `limit` different points (P, D) float16 of a shard: of all of
    them when n < limit. That two points share one is as likely as 2^-48."""
    factors = np.random.default_rng(0).integers(2**63, size=points.shape[1], dtype=np.uint64) | 1
    found = np.zeros(0, dtype=np.uint64)
    for block in points.split(_HASHED_ROWS):
        # Adding zero makes -0 and 0 alike.
        bits = (block + 0.0).numpy().view(np.uint16).astype(np.uint64)
        found = np.union1d(found, (bits * factors).sum(1, dtype=np.uint64))
        if len(found) >= limit:
            break
    return found[:limit]
