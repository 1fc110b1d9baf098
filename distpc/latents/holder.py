"""The Ray worker of k-means: holds feature shards and answers with a few rows and counts.

Legend: P points (patches) of a shard, D feature width, K clusters, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.errors import LatentError
from distpc.latents.kmeans import (
    Totals,
    assign_points,
    distinct_points,
    farthest,
    totals_of,
)
from distpc.latents.seeding import draw_points, generator, race
from distpc.latents.store import read_shard, shard_path

Seed = tuple[int, ...]
Round = tuple[int, int]
"""Restart and number of a round."""

_READ_ROWS = 8192


@dataclass(frozen=True)
class ShardFacts:
    """What the driver must know of a shard before clustering.

    Attributes:
        samples: N samples in it.
        sums: (D,) float64, sum of its points.
        squares: sum of its points' squared lengths.
        points: P.
        largest: largest absolute value in them.
        distinct: (n, D) float32 different points, all of them if n is below the limit asked for.
    """

    samples: int
    points: int
    sums: np.ndarray
    squares: float
    largest: float
    distinct: np.ndarray


class FeatureHolder:
    """Answers questions about feature shards. A shard stays mapped after its first question.

    Args:
        folder: of the features stage.
        fingerprint: of the features stage.
        device: where distances are computed, `cpu` or `cuda`.
    """

    def __init__(self, folder: str, fingerprint: str, device: str) -> None:
        self._folder = Path(folder)
        self._fingerprint = fingerprint
        self._device = torch.device(device)
        self._shards: dict[str, Tensor] = {}
        # Squared distances of the last round, for who asks for far points next.
        self._distances: dict[str, tuple[Round, Tensor]] = {}

    def describe(self, item: tuple[str, int]) -> ShardFacts:
        """Sizes, moments and up to `limit` different points of shard `name`."""
        name, limit = item
        rows = self._rows(name)
        points = rows.flatten(0, 1)
        sums = torch.zeros(points.shape[1], dtype=torch.float64)
        squares = largest = 0.0
        for block in points.split(_READ_ROWS):
            exact = block.double()
            sums += exact.sum(0)
            squares += float(exact.square().sum())
            largest = max(largest, float(exact.abs().max()))
        if not np.isfinite(squares):
            raise LatentError(
                "features are not finite",
                where=shard_path(self._folder, name),
                fix="run the features stage again; it names the samples",
            )
        distinct = distinct_points(points, limit)
        return ShardFacts(len(rows), len(points), sums.numpy(), squares, largest, distinct)

    def draw(self, item: tuple[str, int, Seed]) -> np.ndarray:
        """(count, D) float32 points of shard `name`, drawn by `seed`."""
        name, count, seed = item
        return draw_points(self._points(name), count, generator(*seed)).numpy()

    def race(
        self, item: tuple[str, int, Seed, Seed, np.ndarray, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A shard's entries in an oversampling round, among the points drawn by `draw_seed`."""
        name, drawn, draw_seed, race_seed, candidates, count = item
        points = draw_points(self._points(name), drawn, generator(*draw_seed))
        return race(points, self._to_device(candidates), count, generator(*race_seed))

    def weigh(self, item: tuple[str, int, Seed, np.ndarray]) -> np.ndarray:
        """(M,) how many of the shard's drawn points are nearest to each candidate."""
        name, drawn, draw_seed, candidates = item
        points = draw_points(self._points(name), drawn, generator(*draw_seed))
        labels, _ = assign_points(points, self._to_device(candidates))
        return np.bincount(labels.numpy(), minlength=len(candidates))

    def totals(self, item: tuple[Sequence[str], Round, np.ndarray, int]) -> tuple[Any, Totals]:
        """What the shards `names` contribute to a Lloyd round with (K, D) float32 centroids.

        Returns:
            the inertia of each shard, for the driver; and the contribution, which is held.
        """
        names, number, centroids, bits = item
        on_device = self._to_device(centroids)
        total: Totals | None = None
        inertia = []
        for name in names:
            part, distances = totals_of(self._points(name), on_device, bits)
            self._distances[name] = number, distances
            inertia.append(float(distances.double().sum()))
            total = part if total is None else total + part
        assert total is not None
        return inertia, total

    def add(self, item: tuple[Totals, Totals]) -> tuple[None, Totals]:
        """The contribution of two groups of shards, held."""
        first, second = item
        return None, first + second

    def means(self, item: tuple[Totals, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(K,) counts and (K, D) float32 means of all shards' contribution."""
        total, centroids = item
        return total.counts, total.means(centroids)

    def farthest(self, item: tuple[str, Round, np.ndarray, int]) -> tuple[np.ndarray, np.ndarray]:
        """Up to `count` points of a shard farthest from these centroids, those of the round."""
        name, number, centroids, count = item
        known, distances = self._distances.get(name, (None, None))
        if distances is None or known != number:
            _, distances = assign_points(self._points(name), self._to_device(centroids))
        return farthest(self._points(name), distances, count)

    def _points(self, name: str) -> Tensor:
        return self._rows(name).flatten(0, 1)

    def _rows(self, name: str) -> Tensor:
        if name not in self._shards:
            path = shard_path(self._folder, name)
            rows = read_shard(path, "features", fingerprint=self._fingerprint).rows
            if rows.ndim != 3:
                raise LatentError(
                    "features have the wrong number of axes",
                    where=path,
                    found=f"shape {tuple(rows.shape)}",
                    expected="(samples, latents, width)",
                )
            self._shards[name] = rows
        return self._shards[name]

    def _to_device(self, array: np.ndarray) -> Tensor:
        # Arrays from the object store are read-only; torch wants to own what it may write to.
        return torch.from_numpy(np.array(array, dtype=np.float32)).to(self._device)
