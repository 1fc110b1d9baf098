"""K-means over held shards: seeding, rounds, restarts; stops and goes on between any two rounds.

Nothing here knows who holds a shard: `ask(method, items)` puts a question of `FeatureHolder` and
returns the answers in the order of items; `hold` does so for questions with two answers, of which
the second, (K, D) large, stays with whoever made it: sums are added up in a tree of workers, and
what comes here is the next round's centroids, once. Legend: D feature width, K clusters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents import seeding
from distpc.latents.kmeans import refill
from distpc.latents.store import read_tensors, write_tensors

Ask = Callable[[str, Sequence[Any]], list[Any]]
Hold = Callable[[str, Sequence[Any]], list[tuple[Any, Any]]]

# Streams of random numbers: (seed, stream, restart, round, shard).
_FIRST, _DRAW, _RACE, _CHOOSE = range(4)

_FAR_POINTS = 4
"""Far points that are looked at for each empty cluster."""


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


@dataclass
class FitState:
    """Everything that the rest of a fit depends on; kept on disk after every round.

    Attributes:
        restart: the one under way.
        centroids: (K, D) float32 of the next round; None before a restart is seeded.
        best: (K, D) float32 of the best finished restart, if any.
        best_restart: which one that was.
        inertia: per restart, the inertia of each round's centroids.
        refilled: per restart, empty clusters that were moved after each round.
        seconds: worked so far, over all attempts.
    """

    restart: int = 0
    centroids: Tensor | None = None
    best: Tensor | None = None
    best_restart: int = 0
    inertia: list[list[float]] = field(default_factory=list)
    refilled: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the state, whole or not at all."""
        tensors = {"centroids": self.centroids, "best": self.best}
        facts = {
            "restart": self.restart,
            "best_restart": self.best_restart,
            "inertia": self.inertia,
            "refilled": self.refilled,
            "seconds": self.seconds,
        }
        write_tensors(
            path,
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            {"holds": "k-means state", "fingerprint": fingerprint, "facts": facts},
        )

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> FitState:
        """The state of an interrupted attempt with the same fingerprint, or a fresh one.

        Raises:
            LatentError: there is one, and it cannot be read.
        """
        if not path.exists():
            return cls()
        tensors, metadata = read_tensors(path, "k-means state", None)
        if metadata["fingerprint"] != fingerprint:
            return cls()
        state = cls(**metadata["facts"])
        # Cloned, since the file that they are mapped from is about to be replaced.
        state.centroids = tensors["centroids"].clone() if "centroids" in tensors else None
        state.best = tensors["best"].clone() if "best" in tensors else None
        return state


@dataclass(frozen=True)
class Lloyd:
    """One clustering job.

    Attributes:
        ask: puts a question to every shard.
        hold: the same, where the second answer stays behind a handle.
        shards: names of the shards, in order.
        sizes: points in each.
        bits: of the grid on which sums of points are exact.
        num_groups: groups of shards whose sums are made one by one.
        config: clusters, rounds, restarts, tolerance, seeding.
        seed: of everything random.
        put: makes an array cheap to send to every shard (Ray's object store).
        keep: called with the state after every round.
        log: called with restart, round and inertia after every round.
    """

    ask: Ask
    hold: Hold
    shards: Sequence[str]
    sizes: Sequence[int]
    bits: int
    num_groups: int
    config: LatentsConfig
    seed: int
    put: Callable[[np.ndarray], Any] = lambda array: array
    keep: Callable[[FitState], None] = lambda state: None
    log: Callable[[int, int, float], None] = lambda restart, number, inertia: None

    def run(self, state: FitState) -> FitState:
        """Finish all restarts from `state` on; afterwards `best` holds the centroids.

        Raises:
            LatentError: a shard's features are not finite.
        """
        while state.restart < self.config.num_restarts:
            began = time.monotonic()
            if state.centroids is None:
                state.centroids = self._first_centroids(state.restart)
                state.inertia.append([])
                state.refilled.append([])
            self._round(state, state.centroids)
            state.seconds += time.monotonic() - began
            self.keep(state)
        return state

    def _round(self, state: FitState, centroids: Tensor) -> None:
        """Measure the centroids; then move them, or end the restart."""
        inertia, refilled = state.inertia[-1], state.refilled[-1]
        number = state.restart, len(inertia)
        total = self._measure(centroids, number)
        inertia.append(total.inertia)
        self.log(state.restart, len(inertia) - 1, total.inertia)
        if len(inertia) <= self.config.num_rounds and not self._converged(total, state):
            state.centroids, moved = self._moved(total, number)
            refilled.append(moved)
            return
        if state.best is None or total.inertia < state.inertia[state.best_restart][-1]:
            state.best, state.best_restart = centroids, state.restart
        state.centroids = None
        state.restart += 1

    def _converged(self, total: Measured, state: FitState) -> bool:
        inertia, refilled = state.inertia[-1], state.refilled[-1]
        if total.inertia == 0:
            return True
        if len(inertia) < 2 or refilled[-1] > 0 or not total.counts.all():
            return False
        return inertia[-2] - inertia[-1] <= self.config.tolerance * inertia[-2]

    def _measure(self, centroids: Tensor, number: tuple[int, int]) -> Measured:
        handle = self.put(centroids.numpy())
        groups = self._groups()
        noted = self.hold("totals", [(group, number, handle, self.bits) for group in groups])
        inertia = [value for values, _ in noted for value in values]
        for name, value in zip(self.shards, inertia, strict=True):
            if not np.isfinite(value):
                raise LatentError(
                    "features are not finite, or too large to square",
                    where=f"feature shard {name}",
                    found=f"inertia {value}",
                    fix="run the features stage again",
                )
        totals = [total for _, total in noted]
        while len(totals) > 1:
            pairs = list(zip(totals[::2], totals[1::2], strict=False))
            rest = totals[2 * len(pairs) :]
            totals = [total for _, total in self.hold("add", pairs)] + rest
        counts, means = self.ask("means", [(totals[0], handle)])[0]
        return Measured(sum(inertia), counts, means, handle)

    def _groups(self) -> list[list[str]]:
        """Neighbouring shards, in groups of about equally many points."""
        ends = np.cumsum(np.asarray(self.sizes, dtype=np.int64))
        middles = ends - np.asarray(self.sizes) / 2
        of_shard = np.minimum(middles * self.num_groups // ends[-1], self.num_groups - 1)
        found = [
            [self.shards[int(i)] for i in np.flatnonzero(of_shard == group)]
            for group in range(self.num_groups)
        ]
        return [group for group in found if group]

    def _moved(self, total: Measured, number: tuple[int, int]) -> tuple[Tensor, int]:
        """The next round's centroids, and how many empty clusters moved to far points."""
        empty = np.flatnonzero(total.counts == 0)
        if not len(empty):
            return torch.from_numpy(np.array(total.means)), 0
        # More than needed: copies of one outlier are no use. The same number from every shard, lest
        # the result depend on how points are sharded.
        wanted = min(self.config.num_clusters, _FAR_POINTS * len(empty) + _FAR_POINTS)
        items = [(name, number, total.handle, wanted) for name in self.shards]
        far = self.ask("farthest", items)
        distances = np.concatenate([distances for distances, _ in far])
        candidates = np.concatenate([points for _, points in far])
        kept = np.argsort(-distances, kind="stable")[:wanted]
        means, moved = refill(total.means, empty, distances[kept], candidates[kept])
        return torch.from_numpy(means), moved

    def _first_centroids(self, restart: int) -> Tensor:
        """(K, D) float32 by the configured method."""
        num_clusters = self.config.num_clusters
        choose = seeding.generator(self.seed, _CHOOSE, restart)
        if self.config.init == "random":
            drawn = self._draw(_DRAW, restart, seeding.RANDOM_POINTS_PER_CLUSTER * num_clusters)
            return seeding.random_points(drawn, num_clusters, choose)
        if self.config.init == "k-means++":
            drawn = self._draw(_DRAW, restart, seeding.PLUS_PLUS_POINTS_PER_CLUSTER * num_clusters)
            return seeding.plus_plus(drawn, np.ones(len(drawn)), num_clusters, choose)
        candidates = self._candidates(restart)
        handle = self.put(candidates)
        quotas = self._quotas()
        parts = self.ask(
            "weigh",
            [
                (name, quotas[shard], (self.seed, _DRAW, restart, 0, shard), handle)
                for shard, name in enumerate(self.shards)
            ],
        )
        return seeding.plus_plus(candidates, np.sum(parts, axis=0), num_clusters, choose)

    def _candidates(self, restart: int) -> np.ndarray:
        """Candidates of k-means||: one random point, then rounds of far ones."""
        count = seeding.CANDIDATES_PER_CLUSTER * self.config.num_clusters
        quotas = self._quotas()
        first = seeding.generator(self.seed, _FIRST, restart)
        candidates = self._draw(_FIRST, restart, len(self.shards))
        candidates = candidates[[int(first.integers(len(candidates)))]]
        for number in range(seeding.NUM_ROUNDS):
            handle = self.put(candidates)
            items = [
                (
                    name,
                    quotas[shard],
                    (self.seed, _DRAW, restart, 0, shard),
                    (self.seed, _RACE, restart, number, shard),
                    handle,
                    count,
                )
                for shard, name in enumerate(self.shards)
            ]
            chosen = seeding.winners(self.ask("race", items), count)
            candidates = np.concatenate([candidates, chosen])
        return candidates

    def _quotas(self) -> list[int]:
        total = seeding.SCALABLE_POINTS_PER_CLUSTER * self.config.num_clusters
        return seeding.quotas(self.sizes, total)

    def _draw(self, stream: int, restart: int, total: int) -> np.ndarray:
        """About `total` points (n, D) drawn over all shards."""
        quotas = seeding.quotas(self.sizes, total)
        items = [
            (name, quotas[shard], (self.seed, stream, restart, 0, shard))
            for shard, name in enumerate(self.shards)
            if quotas[shard] > 0
        ]
        return np.concatenate(self.ask("draw", items))


def check_distinct(distinct: Sequence[np.ndarray], num_clusters: int, where: Path) -> None:
    """Refuse points too alike to be clustered.

    Args:
        distinct: per shard, its different points, up to `num_clusters` of them.

    Raises:
        LatentError: fewer different points than clusters.
    """
    if any(len(points) >= num_clusters for points in distinct):
        return
    found = len(torch.unique(torch.from_numpy(np.concatenate(distinct)), dim=0))
    if found < num_clusters:
        raise LatentError(
            "there are fewer different features than clusters",
            where=where,
            found=f"{found} different feature vectors",
            expected=f"at least latents.num_clusters = {num_clusters}",
            fix="set fewer latents.num_clusters, raise latents.max_samples, or look at the teacher:"
            " one that gives every patch the same features has not learnt to tell them apart",
        )
