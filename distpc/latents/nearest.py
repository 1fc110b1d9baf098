"""The nearest centroid of every point: the one loop over points that k-means spends its time in.

Legend: P points, D width, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

CHUNK_ROWS = 2048
"""Points that simple operations are done on at once on a CPU: enough to make calls cheap."""

BLOCK_ROWS = 256
"""Points whose scores are in memory at once on a CPU. Measured for K = 1024, D = 128: the search
for the nearest costs 3 % of the product while scores stay in the cache, and much more outside."""

TILE_COLUMNS = 1024
"""Centroids that a block is scored against at once on a CPU, for the same reason."""

_GPU_ROWS = 16_384
_GPU_COLUMNS = 8_192


def assign_points(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every point.

    Args:
        points: (P, D) of any float type, on the CPU.
        centroids: (K, D) float32, on the device that is to do the work.

    Returns:
        (P,) int64 indices and (P,) float32 squared distances, both on the CPU. Of equal
        centroids of one tile the first is taken.
    """
    labels = torch.empty(len(points), dtype=torch.int64)
    distances = torch.empty(len(points), dtype=torch.float32)
    for rows, chunk, chunk_labels in chunks(points, centroids):
        labels[rows] = chunk_labels.cpu()
        # Taken anew from the difference: exact for points that lie on their centroid.
        difference = centroids.index_select(0, chunk_labels).sub_(chunk)
        distances[rows] = difference.square_().sum(1).cpu()
    return labels, distances


def chunks(points: Tensor, centroids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows, float32 points and labels of one chunk after the other.

    Points are read once; scores live in one buffer that is used again.
    """
    # |x - c|^2 = |x|^2 - 2xc + |c|^2 loses digits when all points lie far from the origin.
    centre = centroids.mean(0)
    centred = centroids - centre
    is_far = bool(centre.square().sum() > centred.square().sum(1).mean())
    search = _Search(centred if is_far else centroids)
    for start in range(0, len(points), search.chunk_rows):
        rows = slice(start, start + search.chunk_rows)
        chunk = points[rows].to(centroids.device).float()
        yield rows, chunk, search(chunk - centre if is_far else chunk)


class _Search:
    """Finds the centroid of the least score |c|^2 - 2 x c of every point."""

    def __init__(self, centroids: Tensor) -> None:
        self._on_cpu = centroids.device.type == "cpu"
        self._rows = BLOCK_ROWS if self._on_cpu else _GPU_ROWS
        self.chunk_rows = CHUNK_ROWS if self._on_cpu else _GPU_ROWS
        most = TILE_COLUMNS if self._on_cpu else _GPU_COLUMNS
        # Tiles of about one width: a last one of a few columns would be slow.
        columns = math.ceil(len(centroids) / math.ceil(len(centroids) / most))
        weights, norms = -2 * centroids, centroids.square().sum(1)
        self._tiles = list(
            zip(
                range(0, len(centroids), columns),
                weights.split(columns),
                norms.split(columns),
                strict=True,
            )
        )
        self._fused = self._on_cpu and _has_onednn()
        # Allocating it anew for every block costs an eighth of the product.
        size = 0 if self._fused else self._rows * columns
        self._buffer = torch.empty(size, device=centroids.device)

    def __call__(self, points: Tensor) -> Tensor:
        """(P, D) float32 -> (P,) int64."""
        return torch.cat([self._of_block(block) for block in points.split(self._rows)])

    def _of_block(self, block: Tensor) -> Tensor:
        best: Tensor | None = None
        for start, part, norm in self._tiles:
            scores = self._scores(block, part, norm)
            found = self._argmin(scores)
            if len(self._tiles) == 1:
                return found
            least = scores.gather(1, found[:, None])[:, 0]
            if best is None:
                best, labels = least, found
                continue
            better = least < best
            labels = torch.where(better, found + start, labels)
            best = torch.where(better, least, best)
        return labels

    def _scores(self, block: Tensor, weights: Tensor, norms: Tensor) -> Tensor:
        if self._fused:
            return torch.ops.mkldnn._linear_pointwise(block, weights, norms, "none", [], "")
        scores = self._buffer[: len(block) * len(norms)].view(len(block), len(norms))
        return torch.addmm(norms, block, weights.T, out=scores)

    def _argmin(self, scores: Tensor) -> Tensor:
        # On the CPU numpy's is ten times as fast as torch's.
        return torch.from_numpy(scores.numpy().argmin(1)) if self._on_cpu else scores.argmin(1)


@cache
def _has_onednn() -> bool:
    """Whether oneDNN's product with the norms added on the way is there: 8 % faster than addmm."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
