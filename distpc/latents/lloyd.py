"""K-means over held shards: rounds and restarts; stops and goes on between any two rounds.

Nothing here knows who holds a shard (see `questions`): sums are added up in a tree of workers, and
what comes here is the next round's centroids, once. Balanced clusters: after a round centroids of
small clusters move into large ones, which they split (see `balance`). Mini-batches (Sculley 2010)
move centroids to the mean of all batch points that they were given so far. Legend: D feature
width, K clusters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents import seeding
from distpc.latents.balance import POINTS_PER_SPLIT, apply_splits, plan_splits, small_clusters
from distpc.latents.entries import Entries
from distpc.latents.first import FirstCentroids
from distpc.latents.holder import Draw, View
from distpc.latents.kmeans import refill
from distpc.latents.questions import Holders
from distpc.latents.state import FitState

# Beside the streams of `first`: (seed, stream, restart, round, shard).
_BATCH, _SPLIT, _FAR = 4, 5, 6

_FAR_POINTS = 4
"""Far points that are chosen from for each empty cluster."""
_FAR_DRAWN = 1024
"""Points that are looked at for each of those."""

_ROUNDING = 1e-12
"""Inertia over the points' squared lengths below which it is the rounding of zero."""


@dataclass(frozen=True)
class Measured:
    """One round's centroids against the points.

    Attributes:
        inertia: sum of squared distances.
        counts: (K,) points of each cluster.
        means: (K, D) float32, their means.
        handle: of the centroids.
    """

    inertia: float
    counts: np.ndarray
    means: np.ndarray
    handle: Any


@dataclass(frozen=True)
class Lloyd:
    """One clustering job.

    Attributes:
        holders: of the points.
        views: of the points, in order.
        sizes: points in each.
        bits: of the grid on which sums of points are exact.
        config: clusters, rounds, restarts, tolerance, seeding.
        seed: of everything random.
        keep: called with the state after every round.
        log: called with restart, round and inertia after every round.
    """

    holders: Holders
    views: Sequence[View]
    sizes: Sequence[int]
    bits: int
    config: LatentsConfig
    seed: int
    keep: Callable[[FitState], None] = lambda state: None
    log: Callable[[int, int, float], None] = lambda restart, number, inertia: None

    def run(self, state: FitState) -> FitState:
        """Finish all restarts from `state` on; afterwards `best` holds the centroids.

        Raises:
            LatentError: a shard's features are not finite.
        """
        first = FirstCentroids(self.holders, self.views, self.sizes, self.config, self.seed)
        while state.restart < self.config.num_restarts:
            began = time.monotonic()
            if state.centroids is None:
                self._begin(state, first(state.restart))
            self.round(state)
            state.seconds += time.monotonic() - began
            self.keep(state)
        return state

    def _begin(self, state: FitState, centroids: Tensor) -> None:
        state.centroids = centroids
        mini_batch = self.config.algorithm == "mini_batch"
        state.seen = torch.zeros(len(centroids), dtype=torch.int64) if mini_batch else None
        state.inertia.append([])
        state.refilled.append([])

    def round(self, state: FitState) -> None:
        """Measure the centroids; then move them, or end the restart."""
        assert state.centroids is not None
        inertia, refilled = state.inertia[-1], state.refilled[-1]
        number = state.restart, len(inertia)
        is_last = len(inertia) >= self.config.num_rounds
        sources = self._sources(number, whole=is_last)
        total = self.measure(state.centroids, sources)
        share = sum(map(_size, sources, self.sizes)) / sum(self.sizes)
        inertia.append(total.inertia / share)
        self.log(state.restart, len(inertia) - 1, inertia[-1])
        if is_last or self._converged(total, state):
            self._end(state)
            return
        if state.seen is not None:
            total = _averaged(total, state)
        if self.config.balanced and len(inertia) < self.config.num_rounds:
            # Not in the last round, so that what is kept are means.
            total = self._split(total, number)
        state.centroids, moved = self._moved(total, number)
        refilled.append(moved)

    def _end(self, state: FitState) -> None:
        """Keep the restart's centroids if they are the best so far."""
        inertia = state.inertia[-1][-1]
        if state.best is None or inertia < state.inertia[state.best_restart][-1]:
            state.best, state.best_restart = state.centroids, state.restart
        state.centroids = state.seen = None
        state.restart += 1

    def _converged(self, total: Measured, state: FitState) -> bool:
        if state.seen is not None or self.config.balanced:
            # A batch's inertia is noise, and splits may raise it: all rounds are made.
            return False
        inertia, refilled = state.inertia[-1], state.refilled[-1]
        if total.inertia == 0:
            return True
        if len(inertia) < 2 or refilled[-1] > 0 or not total.counts.all():
            return False
        return inertia[-2] - inertia[-1] <= self.config.tolerance * inertia[-2]

    def _sources(self, number: tuple[int, int], whole: bool) -> list[Draw | View]:
        """The points of a round: all of them, or its mini-batch."""
        if whole or self.config.algorithm == "lloyd":
            return list(self.views)
        return list(self._draws(_BATCH, number, self.config.batch_points))

    def _draws(self, stream: int, number: tuple[int, int], total: int) -> list[Draw]:
        """About `total` points of a round, a draw for every view."""
        quotas = seeding.quotas(self.sizes, total)
        return [
            Draw(view, quota, (self.seed, stream, *number, shard))
            for shard, (view, quota) in enumerate(zip(self.views, quotas, strict=True))
        ]

    def measure(self, centroids: Tensor, sources: Sequence[Draw | View]) -> Measured:
        """Inertia, counts and means of (K, D) centroids.

        Raises:
            LatentError: the inertia is not finite.
        """
        handle = self.holders.put(centroids.numpy())
        items = [(source, handle, self.bits) for source in sources]
        parts, (counts, means, reduction) = self.holders.sum("totals", items, "means", handle)
        squares = sum(parts)
        inertia = squares + reduction
        if not np.isfinite(inertia):
            raise LatentError(
                "centroids are not finite, or features are too large to square",
                where="latents.num_clusters",
                found=f"inertia {inertia}",
                fix="run the features stage again; see its teacher's loss",
            )
        inertia = inertia if inertia > _ROUNDING * squares else 0.0
        return Measured(inertia, counts, means, handle)

    def _split(self, total: Measured, number: tuple[int, int]) -> Measured:
        """Means of which those of small clusters have moved into large ones."""
        small = small_clusters(total.counts)
        if not len(small):
            return total
        draws = self._draws(_SPLIT, number, POINTS_PER_SPLIT * (len(small) + 1))
        labels = self.holders.each("labels", [(draw, total.handle) for draw in draws])
        splits = plan_splits(total.counts, small, np.concatenate(labels))
        if not len(splits.small):
            return total
        points = self.holders.take(draws, Entries.at(splits.drawn, [draw.size for draw in draws]))
        counts, means = apply_splits(splits, points, total.counts, total.means)
        return Measured(total.inertia, counts, means, total.handle)

    def _moved(self, total: Measured, number: tuple[int, int]) -> tuple[Tensor, int]:
        """The next round's centroids, and how many empty clusters moved to far points."""
        empty = np.flatnonzero(total.counts == 0)
        if not len(empty):
            return torch.from_numpy(np.array(total.means)), 0
        # More than needed: copies of one outlier are no use.
        wanted = min(self.config.num_clusters, _FAR_POINTS * len(empty) + _FAR_POINTS)
        draws = self._draws(_FAR, number, _FAR_DRAWN * wanted)
        items = [(draw, shard, total.handle, wanted) for shard, draw in enumerate(draws)]
        far = self.holders.sum("farthest", items)[1]
        candidates = self.holders.take(draws, far)
        means, moved = refill(total.means, empty, -far.keys, candidates)
        return torch.from_numpy(means), moved


def _averaged(total: Measured, state: FitState) -> Measured:
    """Counts of all batches so far, and the means of all points that they gave each cluster."""
    assert state.seen is not None and state.centroids is not None
    state.seen = state.seen + torch.from_numpy(np.array(total.counts))
    seen = state.seen.numpy()
    weight = total.counts / np.maximum(seen, 1)
    before = state.centroids.numpy().astype(np.float64)
    means = before + weight[:, None] * (total.means - before)
    return Measured(total.inertia, seen, means.astype(np.float32), total.handle)


def _size(source: Draw | View, size: int) -> int:
    return min(source.size, size) if isinstance(source, Draw) else size
