"""Ray workers that give features the index of their nearest centroid: of stored features, or of
features that are made on the way and not kept.

Shapes: N samples of a shard, Z latents of a sample, D feature width, K clusters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.errors import LatentError
from distpc.latents.encode import Encoder, EncoderSettings
from distpc.latents.kmeans import assign_points
from distpc.latents.store import read_centroids, read_shard, shard_path, write_shard


@dataclass(frozen=True)
class Codebook:
    """The centroids that latents are indices of, and where latents go.

    Attributes:
        path: file of the fit stage.
        features: fingerprint of the features stage that the centroids were fitted to.
        width: D.
        out: folder for latent shards.
        fingerprint: that they get.
        device: where distances are computed, `cpu` or `cuda`.
    """

    path: str
    features: str
    width: int
    out: str
    fingerprint: str
    device: str

    def read(self) -> Tensor:
        """(K, D) float32 on the device.

        Raises:
            LatentError: they were fitted to other features.
        """
        centroids = read_centroids(Path(self.path), features=self.features, width=self.width)
        return centroids.to(self.device)

    def write_latents(
        self,
        centroids: Tensor,
        name: str,
        features: Tensor,
        keys: Sequence[str],
        notes: dict[str, Any],
    ) -> None:
        """Write (N, Z) int32 latents of (N, Z, D) float16 features under their samples' keys.

        Raises:
            LatentError: the features have another width, or are not finite.
        """
        path = shard_path(Path(self.out), name)
        if features.ndim != 3 or features.shape[2] != len(centroids[0]):
            raise LatentError(
                "the features have another width than the centroids",
                where=path,
                found=f"features of shape {tuple(features.shape)}",
                expected=f"(samples, latents, {len(centroids[0])})",
                fix="run the features and fit stages again for this teacher",
            )
        labels, distances = assign_points(features.flatten(0, 1), centroids)
        inertia = float(distances.double().sum())
        if not np.isfinite(inertia):
            raise LatentError("features are not finite", where=path, found=f"inertia {inertia}")
        noted = {
            "fingerprint": self.fingerprint,
            "features": self.features,
            "num_clusters": len(centroids),
            "inertia": inertia,
            "grid": notes.get("grid"),
            "bad": notes.get("bad", {}),
        }
        rows = labels.to(torch.int32).reshape(features.shape[:2])
        write_shard(path, "latents", rows, keys, noted)


class Assigner:
    """Ray worker: latents of stored features.

    Args:
        features: folder of the features stage.
        codebook: what latents are indices of.
    """

    def __init__(self, features: str, codebook: Codebook) -> None:
        self._features = Path(features)
        self._codebook = codebook
        self._centroids = codebook.read()

    def __call__(self, name: str) -> float:
        """Write the latents of shard `name`; returns the seconds that took."""
        began = time.monotonic()
        path = shard_path(self._features, name)
        shard = read_shard(path, "features", fingerprint=self._codebook.features)
        self._codebook.write_latents(self._centroids, name, shard.rows, shard.keys, shard.metadata)
        return time.monotonic() - began


class FusedAssigner(Encoder):
    """Ray worker: latents of data, whose features are made and forgotten.

    Features are rounded to float16 as if they had been stored, so that for the same centroids the
    latents are the same.
    """

    def __init__(self, settings: EncoderSettings, codebook: Codebook) -> None:
        super().__init__(settings)
        self._codebook = codebook
        self._centroids = codebook.read()

    def write(
        self, name: str, features: Tensor, keys: Sequence[str], notes: dict[str, Any]
    ) -> None:
        """A latent shard."""
        self._codebook.write_latents(self._centroids, name, features, keys, notes)
