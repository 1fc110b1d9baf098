"""The first centroids of a restart, from seeded draws over all shards.

What the driver sees is a few points a cluster at most, whatever the number of shards. Legend:
D feature width, K clusters, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from distpc.config.schema import LatentsConfig
from distpc.latents import seeding
from distpc.latents.holder import Draw, View
from distpc.latents.questions import Holders

# Streams of random numbers: (seed, stream, restart, round, shard).
_FIRST, _DRAW, _RACE, _CHOOSE = range(4)


@dataclass(frozen=True)
class FirstCentroids:
    """Chooses K points by `config.init`.

    Attributes:
        holders: of the points.
        views: of them, in order.
        sizes: points in each.
        config: clusters and method.
        seed: of everything random.
    """

    holders: Holders
    views: Sequence[View]
    sizes: Sequence[int]
    config: LatentsConfig
    seed: int

    def __call__(self, restart: int) -> Tensor:
        """(K, D) float32."""
        num_clusters = self.config.num_clusters
        choose = seeding.generator(self.seed, _CHOOSE, restart)
        if self.config.init == "random":
            drawn = self._draw(_DRAW, restart, seeding.RANDOM_POINTS_PER_CLUSTER * num_clusters)
            return seeding.random_points(drawn, num_clusters, choose)
        if self.config.init == "k-means++":
            drawn = self._draw(_DRAW, restart, seeding.PLUS_PLUS_POINTS_PER_CLUSTER * num_clusters)
            return seeding.reduce_candidates(drawn, np.ones(len(drawn)), num_clusters, choose)
        candidates, weights = self._candidates(restart)
        return seeding.reduce_candidates(candidates, weights, num_clusters, choose)

    def _candidates(self, restart: int) -> tuple[np.ndarray, np.ndarray]:
        """(M, D) candidates of k-means||, one random point and then rounds of far ones; and (M,)
        how many points are nearest to each."""
        count = seeding.CANDIDATES_PER_CLUSTER * self.config.num_clusters
        total = seeding.SCALABLE_POINTS_PER_CLUSTER * self.config.num_clusters
        draws = self._draws(_DRAW, restart, total)
        first = seeding.generator(self.seed, _FIRST, restart)
        candidates = self._draw(_FIRST, restart, sum(size > 0 for size in self.sizes))
        candidates = candidates[[int(first.integers(len(candidates)))]]
        ends = [1]
        for number in range(seeding.NUM_ROUNDS):
            handle = self.holders.put(candidates)
            items = [
                (
                    draw,
                    place,
                    (self.seed, _RACE, restart, number, shard),
                    handle,
                    tuple(ends),
                    count,
                )
                for place, (shard, draw) in enumerate(draws)
            ]
            entries = self.holders.sum("race", items)[1]
            if not len(entries.keys):
                break
            chosen = self.holders.take([draw for _, draw in draws], entries)
            candidates = np.concatenate([candidates, chosen])
            ends.append(len(candidates))
        handle = self.holders.put(candidates)
        questions = [(draw, handle, tuple(ends)) for _, draw in draws]
        return candidates, self.holders.sum("weigh", questions)[1]

    def _draws(self, stream: int, restart: int, total: int) -> list[tuple[int, Draw]]:
        """About `total` points shared out over shards; the shard's number beside each draw."""
        quotas = seeding.quotas(self.sizes, total)
        return [
            (shard, Draw(view, quotas[shard], (self.seed, stream, restart, 0, shard)))
            for shard, view in enumerate(self.views)
            if quotas[shard] > 0
        ]

    def _draw(self, stream: int, restart: int, total: int) -> np.ndarray:
        """The points of such draws, (n, D) float32."""
        draws = [draw for _, draw in self._draws(stream, restart, total)]
        return np.concatenate(self.holders.each("draw", draws))
