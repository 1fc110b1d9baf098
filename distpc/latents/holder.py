"""The Ray worker of k-means: holds feature shards and answers with a few rows and counts.

What would be large together (sums, weights, entries of all shards) comes as the second of a pair:
it stays where it was made, and `add` puts two of them together. Legend: P points of a shard or a
draw of it, D feature width, K clusters, M candidates. Tokens that samples lack are no points.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distpc.errors import LatentError
from distpc.latents.entries import Entries
from distpc.latents.kmeans import Totals, distinct_hashes, farthest, squares_of, totals_of
from distpc.latents.nearest import assign_points
from distpc.latents.principal import Moments, Projection, moments_of
from distpc.latents.seeding import draw_points, generator, race
from distpc.latents.store import PRESENT, StoredShard, read_shard, read_tensors, shard_path
from distpc.parallel.stopwatch import count

Seed = tuple[int, ...]

_READ_ROWS = 2048
_MOST_KEYS_NAMED = 5


class View(NamedTuple):
    """Points of one shard: of all its positions, or of one."""

    shard: str
    position: int | None = None


class Draw(NamedTuple):
    """A seeded draw of a view's points."""

    view: View
    size: int
    seed: Seed


@dataclass(frozen=True)
class ShardFacts:
    """What the driver must know of a shard before clustering.

    Attributes:
        samples: N samples in it.
        at_positions: (Z,) points at each latent of a sample: N, less those that samples lack.
        sums: (D,) float64, sum of its points.
        squares: sum of its points' squared lengths.
        largest: largest absolute value in them.
    """

    samples: int
    at_positions: np.ndarray
    sums: np.ndarray
    squares: float
    largest: float

    @property
    def positions(self) -> int:
        """Z latents of a sample."""
        return len(self.at_positions)

    @property
    def points(self) -> int:
        """P, of all positions."""
        return int(self.at_positions.sum())

    def size(self, position: int | None) -> int:
        """Points of one position, or of all."""
        return self.points if position is None else int(self.at_positions[position])


@dataclass
class _Nearest:
    """How far a draw's points are from the candidates so far, of which `chunks` are known."""

    seed: Seed
    chunks: tuple[int, ...]
    distances: Tensor
    labels: Tensor


class FeatureHolder:
    """Answers questions about feature shards.

    A shard is mapped for the time of a question only, so that its pages count as this worker's for
    no longer: the system keeps them anyway as long as it has memory. What is kept beyond that, by
    a worker that was first to be asked about a shard, is bounded.

    Args:
        folder: of the features stage.
        fingerprint: of the features stage.
        device: where distances are computed, `cpu` or `cuda`.
        in_memory: keep a copy of the shards' float16 features instead of mapping their files.
        projection: mean (F,) and basis (F, D) that features of F columns go through first; what
            comes out is kept in float16.
        most_bytes: that are kept of either; further shards are read, or projected, for every
            question anew.
        positions: the first of those that are held, and the one behind the last; views number
            them from 0, and they are copied into memory. Default: all.
    """

    def __init__(
        self,
        folder: str,
        fingerprint: str,
        device: str,
        in_memory: bool = False,
        projection: tuple[np.ndarray, np.ndarray] | None = None,
        most_bytes: int = sys.maxsize,
        positions: tuple[int, int] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._fingerprint = fingerprint
        self._device = torch.device(device)
        self._in_memory = in_memory or positions is not None
        self._positions = slice(*(positions or (None,)))
        self._projection: Projection | None = None
        if projection is not None:
            mean, basis = projection
            self._projection = Projection(self._to_device(mean), self._to_device(basis))
        self._room = most_bytes
        self._kept: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._squares: dict[View, float] = {}
        self._nearest: dict[View, _Nearest] = {}

    def describe(self, name: str) -> ShardFacts:
        """Sizes and moments of shard `name`.

        Raises:
            LatentError: its features are not finite; names the samples.
        """
        shard = read_shard(
            shard_path(self._folder, name), "features", fingerprint=self._fingerprint
        )
        rows, present = self._shard(name)
        points = rows.flatten(0, 1) if present is None else rows[present]
        sums = torch.zeros(points.shape[1], dtype=torch.float64)
        squares = largest = 0.0
        for block in points.split(_READ_ROWS):
            exact = block.double()
            sums += exact.sum(0)
            squares += float(exact.square().sum())
            largest = max(largest, float(exact.abs().max()) if len(exact) else 0.0)
        if not np.isfinite(squares):
            raise _not_finite(shard, rows)
        at_positions = np.full(rows.shape[1], len(rows))
        if present is not None:
            at_positions = present.sum(0).numpy()
        return ShardFacts(len(rows), at_positions, sums.numpy(), squares, largest)

    def moments(self, name: str) -> tuple[None, Moments]:
        """First and second moments of the shard's points, held."""
        return None, moments_of(self._points(View(name)))

    def distinct(self, item: tuple[View, int]) -> np.ndarray:
        """Hashes of up to `limit` different points of a view."""
        view, limit = item
        return distinct_hashes(self._points(view), limit)

    def take(self, item: tuple[Draw | View, np.ndarray]) -> np.ndarray | None:
        """(n, D) float32, the rows (n,) of a view or of a draw from it; None for no rows."""
        source, rows = item
        if not len(rows):
            return None
        return self._taken(source)[torch.from_numpy(np.array(rows))].float().numpy()

    def draw(self, item: Draw) -> np.ndarray:
        """(size, D) float32 points."""
        return self._taken(item).float().numpy()

    def race(
        self, item: tuple[Draw, int, Seed, np.ndarray, Sequence[int], int]
    ) -> tuple[None, Entries]:
        """A shard's entries in an oversampling round, held.

        The item: the points that run, the shard's position, its seed for this round, the (M, D)
        candidates so far, where each earlier round's candidates end, and how many win.
        """
        draw, shard, seed, candidates, ends, count = item
        near = self._near(draw, candidates, ends)
        times = race(near.distances.numpy(), generator(*seed))
        rows = np.flatnonzero(np.isfinite(times))
        return None, Entries.of(shard, times[rows], rows, count)

    def weigh(self, item: tuple[Draw, np.ndarray, Sequence[int]]) -> tuple[None, np.ndarray]:
        """(M,) how many of the drawn points are nearest to each candidate, held."""
        draw, candidates, ends = item
        labels = self._near(draw, candidates, ends).labels
        del self._nearest[draw.view]
        return None, np.bincount(labels.numpy(), minlength=len(candidates))

    def totals(self, item: tuple[Draw | View, np.ndarray, int]) -> tuple[float, Totals]:
        """What points contribute to a Lloyd round: the sum of their squared lengths, for the
        driver; and their sums by cluster, which are held."""
        source, centroids, bits = item
        # A round has no use for what another worker weighed in the end.
        self._nearest.clear()
        points = self._taken(source)
        total = totals_of(points, self._to_device(centroids), bits)
        count(points=len(points))
        return self._squares_of(source), total

    def each(self, item: tuple[str, Sequence[Any]]) -> list[Any]:
        """The answers to one question about several shards."""
        question, items = item
        return [getattr(self, question)(part) for part in items]

    def sum_each(self, item: tuple[str, Sequence[Any]]) -> tuple[list[Any], Any]:
        """The first answers to one question about several shards, and the sum of the second."""
        question, items = item
        notes, total = [], None
        for part in items:
            note, held = getattr(self, question)(part)
            notes.append(note)
            total = held if total is None else total + held
        return notes, total

    def add(self, item: tuple[Any, Any]) -> tuple[None, Any]:
        """Two things that were held, put together."""
        first, second = item
        return None, first + second

    def show(self, item: Any) -> Any:
        """Something that was held, for the driver."""
        return item

    def means(self, item: tuple[Totals, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
        """Of all shards' contribution: (K,) counts, (K, D) float32 means, and the inertia less the
        points' squared lengths."""
        total, centroids = item
        return total.counts, total.means(centroids), total.reduction(centroids)

    def labels(self, item: tuple[Draw, np.ndarray]) -> np.ndarray:
        """(size,) int32, the nearest of (K, D) centroids to each drawn point."""
        draw, centroids = item
        labels, _ = assign_points(self._taken(draw), self._to_device(centroids))
        return labels.int().numpy()

    def farthest(self, item: tuple[Draw, int, np.ndarray, int]) -> tuple[None, Entries]:
        """Up to `count` drawn rows farthest from these centroids, held."""
        draw, shard, centroids, count = item
        _, distances = assign_points(self._taken(draw), self._to_device(centroids))
        rows = farthest(distances, count)
        return None, Entries.of(shard, -distances.numpy()[rows], rows, count)

    def _near(self, draw: Draw, candidates: np.ndarray, ends: Sequence[int]) -> _Nearest:
        """Distances to all candidates, chunk by chunk: a worker that knows earlier chunks and one
        that does not compute the very same."""
        near = self._nearest.get(draw.view)
        chunks = tuple(ends)
        if near is None or near.seed != draw.seed or near.chunks != chunks[: len(near.chunks)]:
            near = None
        known = 0 if near is None else len(near.chunks)
        points = self._taken(draw) if known < len(chunks) else None
        for number in range(known, len(chunks)):
            assert points is not None
            start = chunks[number - 1] if number else 0
            part = self._to_device(candidates[start : chunks[number]])
            labels, distances = assign_points(points, part)
            if near is None:
                near = _Nearest(draw.seed, chunks[:1], distances, labels.int())
                continue
            nearer = distances < near.distances
            near.distances = torch.where(nearer, distances, near.distances)
            near.labels = torch.where(nearer, labels.int() + start, near.labels)
            near.chunks = chunks[: number + 1]
        assert near is not None
        self._nearest[draw.view] = near
        return near

    def _taken(self, source: Draw | View) -> Tensor:
        if isinstance(source, Draw):
            points, there = self._column(source.view)
            return draw_points(points, source.size, generator(*source.seed), there)
        return self._points(source)

    def _squares_of(self, source: Draw | View) -> float:
        if isinstance(source, Draw):
            return squares_of(self._taken(source))
        if source not in self._squares:
            self._squares[source] = squares_of(self._points(source))
        return self._squares[source]

    def _points(self, view: View) -> Tensor:
        points, there = self._column(view)
        return points if there is None else points[there]

    def _column(self, view: View) -> tuple[Tensor, Tensor | None]:
        """A view's points and those that samples lack, and which rows of these are points; None
        where all are."""
        rows, present = self._shard(view.shard)
        if view.position is None:
            there = None if present is None else present.flatten().nonzero()[:, 0]
            return rows.flatten(0, 1), there
        there = None if present is None else present[:, view.position].nonzero()[:, 0]
        return rows[:, view.position], there

    def _shard(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(N, Z, D) float16, and (N, Z) bool, which of them there are; None where all are."""
        if name in self._kept:
            return self._kept[name]
        rows, present = self._mapped(name)
        if self._projection is not None:
            projected = self._projection(rows.flatten(0, 1))
            rows = projected.view(*rows.shape[:2], -1)
        elif not self._in_memory:
            return rows, present
        if rows.nbytes <= self._room:
            self._room -= rows.nbytes
            kept = rows if self._projection is not None else rows.clone()
            self._kept[name] = kept, None if present is None else present.clone()
        return self._kept.get(name, (rows, present))

    def _mapped(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(N, Z, F) float16 and (N, Z) bool, in their file."""
        path = shard_path(self._folder, name)
        tensors = read_tensors(path, "features", self._fingerprint)[0]
        rows = tensors["features"]
        if rows.ndim != 3 or rows.dtype != torch.float16:
            raise LatentError(
                "features have the wrong number of axes, or another type",
                where=path,
                found=f"shape {tuple(rows.shape)}, {rows.dtype}",
                expected="(samples, latents, width), torch.float16",
            )
        present = tensors.get(PRESENT)
        held = self._positions
        return rows[:, held], None if present is None else present[:, held]

    def _to_device(self, array: np.ndarray) -> Tensor:
        # Arrays from the object store are read-only; torch wants to own what it may write to.
        return torch.from_numpy(np.array(array, dtype=np.float32)).to(self._device)


def _not_finite(shard: StoredShard, rows: Tensor) -> LatentError:
    bad = torch.nonzero(~torch.isfinite(rows).flatten(1).all(1)).flatten().tolist()
    named = ", ".join(f"'{shard.keys[row]}'" for row in bad[:_MOST_KEYS_NAMED])
    more = len(bad) - _MOST_KEYS_NAMED
    return LatentError(
        "features are not finite",
        where=shard.path,
        found=f"{len(bad)} samples: {named}" + (f" and {more} more" if more > 0 else ""),
        expected="finite values of at most 65504 in size",
        fix="run the features stage again, which refuses such samples; or look at the teacher",
    )
