"""First centroids of k-means: k-means++ and its distributed form, k-means||.

k-means++: Arthur and Vassilvitskii 2007; k-means||: Bahmani et al. 2012. Here a round of
k-means|| draws a fixed number of points without replacement, with probability proportional to the
squared distance, by exponential races (Efraimidis and Spirakis 2006): each shard needs only its
own distances and its own random numbers, so a round is one pass and does not depend on who holds
which shard. Legend: P points of a shard, D feature width, K clusters, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distpc.latents.kmeans import assign_points

NUM_ROUNDS = 5
"""Oversampling rounds of k-means||."""
CANDIDATES_PER_CLUSTER = 2
"""Candidates drawn in one oversampling round, over K."""
SCALABLE_POINTS_PER_CLUSTER = 1024
"""Points that k-means|| looks at, over K: a seeded draw from every shard."""
PLUS_PLUS_POINTS_PER_CLUSTER = 128
"""Points that k-means++ looks at, over K: they all travel to the driver."""

RANDOM_POINTS_PER_CLUSTER = 4
"""Points among which the random start chooses, over K: enough to find K that differ."""


def generator(*parts: int) -> np.random.Generator:
    """Random numbers that depend on nothing but `parts` (seed, restart, round, shard, ...)."""
    return np.random.default_rng(parts)


def quotas(sizes: Sequence[int], total: int) -> list[int]:
    """Share out min(total, sum of sizes) draws over shards in proportion to their sizes."""
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    total = min(total, int(ends[-1]))
    cuts = ends * total // ends[-1]
    return np.diff(cuts, prepend=0).tolist()


def draw_points(points: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """`count` different points of a shard, (count, D) float32, in the shard's order."""
    if count >= len(points):
        return points.float()
    rows = np.sort(rng.choice(len(points), size=count, replace=False))
    return points[torch.from_numpy(rows)].float()


def random_points(points: np.ndarray, num_clusters: int, rng: np.random.Generator) -> Tensor:
    """K different points, (K, D) float32; when fewer differ, the first is repeated."""
    different = np.unique(points, axis=0)
    chosen = rng.permutation(len(different))[:num_clusters]
    padded = np.concatenate([chosen, np.full(num_clusters - len(chosen), chosen[0])])
    return torch.from_numpy(different[padded].astype(np.float32))


def race(
    points: Tensor, candidates: Tensor, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A shard's entries in one oversampling round.

    Args:
        points: (P, D) that the shard contributes.
        candidates: (M, D) float32 so far.
        count: entries that win the round, over all shards.
        rng: the shard's own random numbers for this round.

    Returns:
        finishing times (n,) float64, smallest first, and the points (n, D) float32; n <= count.
        The `count` smallest times of all shards win; points on a candidate do not run.
    """
    distances = assign_points(points, candidates)[1].double().numpy()
    draws = rng.standard_exponential(len(distances))
    with np.errstate(divide="ignore"):
        times = np.where(distances > 0, draws / distances, np.inf)
    order = np.argsort(times, kind="stable")[:count]
    order = order[np.isfinite(times[order])]
    return times[order], points[torch.from_numpy(order)].float().numpy()


def winners(entries: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """The new candidates (n, D) float32 of a round, from every shard's entries in shard order."""
    times = np.concatenate([times for times, _ in entries])
    points = np.concatenate([points for _, points in entries])
    return points[np.argsort(times, kind="stable")[:count]]


def plus_plus(
    points: np.ndarray, weights: np.ndarray, num_clusters: int, rng: np.random.Generator
) -> Tensor:
    """Greedy weighted k-means++: of several draws, keep the one that lowers the inertia most.

    Args:
        points: (M, D).
        weights: (M,) points' worth of each row.

    Returns:
        (K, D) float32. When fewer than K points differ the last is repeated; a Lloyd round then
        finds those clusters empty and refills them.
    """
    rows = points.astype(np.float64)
    rows -= rows.mean(0)
    norms = np.square(rows).sum(1)
    # Below this the difference of two large numbers is rounding, not distance.
    floor = 1e-12 * max(norms.max(), np.finfo(np.float64).tiny)
    num_trials = 2 + int(np.log(num_clusters))
    chosen = [_pick(weights.astype(np.float64), rng.random(1))[0]]
    nearest = _distances(rows, norms, chosen, floor)[0]
    while len(chosen) < num_clusters:
        masses = nearest * weights
        if masses.sum() <= 0:
            chosen.append(chosen[-1])
            continue
        trials = _pick(masses, rng.random(num_trials))
        lowered = np.minimum(nearest, _distances(rows, norms, trials, floor))
        best = int((lowered @ weights).argmin())
        nearest = lowered[best]
        chosen.append(trials[best])
    return torch.from_numpy(points[chosen].astype(np.float32))


def _pick(masses: np.ndarray, uniforms: np.ndarray) -> list[int]:
    """Indices drawn in proportion to `masses`; entries of zero mass are never drawn."""
    ends = np.cumsum(masses)
    picked = np.searchsorted(ends, uniforms * ends[-1], side="right")
    return np.minimum(picked, np.flatnonzero(masses)[-1]).tolist()


def _distances(
    rows: np.ndarray, norms: np.ndarray, chosen: Sequence[int], floor: float
) -> np.ndarray:
    """(len(chosen), M) squared distances of all rows to the chosen ones."""
    picked = list(chosen)
    squares = norms[picked, None] - 2 * (rows[picked] @ rows.T) + norms
    return np.where(squares > floor, squares, 0.0)
