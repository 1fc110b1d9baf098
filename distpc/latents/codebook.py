"""What gives features their latent values: centroids, and what may go with them; and their file.

Legend: N samples of a shard, Z latents of a sample, D feature width, d width after the projection,
K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpc.errors import LatentError
from distpc.latents.nearest import assign_points
from distpc.latents.principal import Projection
from distpc.latents.store import NO_LATENT, REDO, read_tensors, write_tensors


@dataclass(frozen=True)
class Codebook:
    """Centroids of one codebook for all positions, or of one for each.

    Attributes:
        centroids: (K, d) or (Z, K, d) float32.
        projection: that features go through first.
    """

    centroids: Tensor
    projection: Projection | None = None

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.centroids.shape[-2]

    def assign(self, rows: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, Z, D) features -> (N, Z) int32 latents and (N, Z) float32 squared distances.

        Args:
            present: (N, Z) bool, the features that there are; the others' latents are NO_LATENT,
                at no distance. Default: all.
        """
        if present is not None:
            return self._assign_present(rows, present)
        points = rows.flatten(0, 1)
        if self.projection is not None:
            points = self.projection(points)
        if self.centroids.ndim == 2:
            labels, distances = assign_points(points, self.centroids)
            return labels.int().view(rows.shape[:2]), distances.view(rows.shape[:2])
        projected = points.view(*rows.shape[:2], -1)
        pairs = [
            assign_points(projected[:, position], self.centroids[position])
            for position in range(rows.shape[1])
        ]
        return (
            torch.stack([labels for labels, _ in pairs], 1).int(),
            torch.stack([distances for _, distances in pairs], 1),
        )

    def _assign_present(self, rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        latents = torch.full(present.shape, NO_LATENT, dtype=torch.int32)
        distances = torch.zeros(present.shape)
        if self.centroids.ndim == 2:
            # One column of those that there are: nobody else is looked at.
            found = self.assign(rows[present][:, None])
            latents[present], distances[present] = (part[:, 0] for part in found)
            return latents, distances
        for position, centroids in enumerate(self.centroids):
            there = present[:, position]
            column = Codebook(centroids, self.projection)
            found = column.assign(rows[there, position : position + 1])
            latents[there, position], distances[there, position] = (part[:, 0] for part in found)
        return latents, distances

    def to(self, device: torch.device | str) -> Codebook:
        """The same on the device that is to do the work."""
        return Codebook(
            self.centroids.to(device),
            None if self.projection is None else self.projection.to(device),
        )


def write_codebook(path: Path, codebook: Codebook, metadata: Mapping[str, Any]) -> None:
    """Write a codebook, whole or not at all; `features` in `metadata` names what it was fitted
    to."""
    tensors = {"centroids": codebook.centroids.float().contiguous()}
    if codebook.projection is not None:
        tensors["mean"] = codebook.projection.mean.contiguous()
        tensors["basis"] = codebook.projection.basis.contiguous()
    write_tensors(path, tensors, {**metadata, "holds": "centroids"})


def read_codebook(path: Path, *, features: str, shape: tuple[int, int]) -> Codebook:
    """Read a codebook for features of Z latents and D columns.

    Args:
        features: fingerprint of the features that it must have been fitted to.
        shape: (Z, D) of those features.

    Raises:
        LatentError: missing, cut, not finite, or fitted to other features.
    """
    tensors, metadata = read_tensors(path, "centroids", None)
    if metadata.get("features") != features:
        raise LatentError(
            "the centroids were fitted to other features",
            where=path,
            found=f"centroids of features {metadata.get('features')}",
            expected=f"centroids of features {features}",
            fix="run the fit stage again for these features (same teacher, split and data)",
        )
    # Cloned: the file that they are mapped from may be replaced.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    _check_shapes(path, tensors, shape)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise LatentError("the centroids are not finite", where=path, fix=REDO)
    projection = Projection(tensors["mean"], tensors["basis"]) if "basis" in tensors else None
    return Codebook(tensors["centroids"], projection)


def _check_shapes(path: Path, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
    num_latents, width = shape
    centroids = tensors["centroids"]
    basis = tensors.get("basis")
    columns = centroids.shape[-1] if basis is None else basis.shape[0]
    inner = centroids.ndim >= 2 and (basis is None or basis.shape[1] == centroids.shape[-1])
    positions = centroids.ndim == 2 or (centroids.ndim == 3 and len(centroids) == num_latents)
    if columns != width or not inner or not positions:
        raise LatentError(
            "the centroids have another width than the features, or are of other positions",
            where=path,
            found=f"centroids of shape {tuple(centroids.shape)}, for {columns} columns",
            expected=f"(K, d), or (Z, K, d) with Z = {num_latents}, for {width} columns",
            fix="run the fit stage again for the features of this teacher",
        )
