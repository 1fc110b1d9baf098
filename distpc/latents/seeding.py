"""First centroids of k-means: k-means++ and its distributed form, k-means||.

k-means++: Arthur and Vassilvitskii 2007; k-means||: Bahmani et al. 2012. Here a round of
k-means|| draws a fixed number of points without replacement, with probability proportional to the
squared distance, by exponential races (Efraimidis and Spirakis 2006): each shard needs only its
own distances and its own random numbers, so a round is one pass over what is new and does not
depend on who holds which shard. Legend: P points of a shard, D feature width, K clusters,
M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distpc.latents.nearest import assign_points

NUM_ROUNDS = 5
"""Oversampling rounds of k-means||."""
CANDIDATES_PER_CLUSTER = 2
"""Candidates drawn in one oversampling round, over K."""
SCALABLE_POINTS_PER_CLUSTER = 1024
"""Points that k-means|| looks at, over K: a seeded draw from every shard."""
PLUS_PLUS_POINTS_PER_CLUSTER = 128
"""Points that k-means++ looks at, over K: they all travel to the driver."""

GREEDY_CLUSTERS = 2048
"""Clusters up to which candidates are reduced one by one; above, in batches."""
BATCHES = 128
"""Of draws in which more candidates are reduced to K: each costs a pass over the candidates."""

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


def draw_points(
    points: Tensor, count: int, rng: np.random.Generator, among: Tensor | None = None
) -> Tensor:
    """`count` different points of a shard, (count, D), in the shard's order.

    Args:
        among: rows in order that may be drawn; default: all.
    """
    total = len(points) if among is None else len(among)
    if count >= total:
        return points if among is None else points[among]
    rows = torch.from_numpy(np.sort(rng.choice(total, size=count, replace=False)))
    return points[rows if among is None else among[rows]]


def random_points(points: np.ndarray, num_clusters: int, rng: np.random.Generator) -> Tensor:
    """K different points, (K, D) float32; when fewer differ, the first is repeated."""
    different = np.unique(points, axis=0)
    chosen = rng.permutation(len(different))[:num_clusters]
    padded = np.concatenate([chosen, np.full(num_clusters - len(chosen), chosen[0])])
    return torch.from_numpy(different[padded].astype(np.float32))


def race(distances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Finishing times (P,) float64 of a shard's points in a round, by their squared distances.

    The smallest times of all shards win. Points on a candidate do not run: inf.
    """
    draws = rng.standard_exponential(len(distances))
    exact = distances.astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.where(exact > 0, draws / exact, np.inf)


def reduce_candidates(
    points: np.ndarray, weights: np.ndarray, num_clusters: int, rng: np.random.Generator
) -> Tensor:
    """K of (M, D) candidates with (M,) weights, (K, D) float32; M below K repeats some.

    Up to `GREEDY_CLUSTERS` by greedy k-means++, above by draws of several at once: those of one
    draw do not know of each other, which matters little when a draw is a hundredth of all.
    """
    if num_clusters <= GREEDY_CLUSTERS:
        return plus_plus(points, weights, num_clusters, rng)
    rows = torch.from_numpy(points.astype(np.float32))
    first = _pick(weights.astype(np.float64), rng.random(1))
    chosen = rows[first]
    nearest = assign_points(rows, chosen)[1]
    while len(chosen) < num_clusters:
        count = min(-(-num_clusters // BATCHES), num_clusters - len(chosen))
        times = race(nearest.numpy() * weights, rng)
        drawn = np.argsort(times, kind="stable")[:count]
        drawn = drawn[np.isfinite(times[drawn])]
        if not len(drawn):
            return torch.cat([chosen, chosen[-1:].repeat(num_clusters - len(chosen), 1)])
        added = rows[torch.from_numpy(drawn)]
        nearest = torch.minimum(nearest, assign_points(rows, added)[1])
        chosen = torch.cat([chosen, added])
    return chosen


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
