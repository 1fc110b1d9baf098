"""Ray workers that give features the index of their nearest centroid: of stored features, or of
features that are made on the way and not kept.

Shapes: N samples of a shard, Z latents of a sample, D feature width, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distpc.errors import LatentError
from distpc.latents.codebook import Codebook, read_codebook
from distpc.latents.encode import Encoder, EncoderSettings
from distpc.latents.store import StoredShard, read_shard, shard_path, write_shard
from distpc.parallel.stopwatch import count


@dataclass(frozen=True)
class Assignment:
    """The codebook that latents are indices into, and where latents go.

    Attributes:
        path: file of the fit stage.
        features: fingerprint of the features stage that the centroids were fitted to.
        shape: (Z, D) of those features.
        out: folder for latent shards.
        fingerprint: that they get.
        device: where distances are computed, `cpu` or `cuda`.
    """

    path: str
    features: str
    shape: tuple[int, int]
    out: str
    fingerprint: str
    device: str

    def read(self) -> Codebook:
        """The codebook, on the device.

        Raises:
            LatentError: it was fitted to other features.
        """
        codebook = read_codebook(Path(self.path), features=self.features, shape=self.shape)
        return codebook.to(self.device)

    def write_latents(self, codebook: Codebook, name: str, shard: StoredShard) -> None:
        """Write (N, Z) int32 latents of a shard of features, under their samples' keys.

        Raises:
            LatentError: the features have another width, or are not finite.
        """
        path = shard_path(Path(self.out), name)
        if tuple(shard.rows.shape[1:]) != self.shape:
            raise LatentError(
                "the features have another width than the centroids",
                where=path,
                found=f"features of shape {tuple(shard.rows.shape)}",
                expected=f"(samples, {self.shape[0]}, {self.shape[1]})",
                fix="run the features and fit stages again for this teacher",
            )
        latents, distances = codebook.assign(shard.rows, shard.present)
        inertia = float(distances.double().sum())
        if not np.isfinite(inertia):
            raise LatentError("features are not finite", where=path, found=f"inertia {inertia}")
        noted = {
            "fingerprint": self.fingerprint,
            "features": self.features,
            "num_clusters": codebook.num_clusters,
            "inertia": inertia,
            "grid": shard.metadata.get("grid"),
            "bad": shard.metadata.get("bad", {}),
        }
        if shard.present is not None:
            noted["missing"] = int((~shard.present).sum())
        write_shard(path, "latents", latents, shard.keys, noted)


class Assigner:
    """Ray worker: latents of stored features.

    Args:
        features: folder of the features stage.
        assignment: what latents are indices of.
    """

    def __init__(self, features: str, assignment: Assignment) -> None:
        self._features = Path(features)
        self._assignment = assignment
        self._codebook = assignment.read()

    def __call__(self, name: str) -> None:
        """Write the latents of shard `name`."""
        path = shard_path(self._features, name)
        shard = read_shard(path, "features", fingerprint=self._assignment.features)
        self._assignment.write_latents(self._codebook, name, shard)
        count(samples=len(shard.keys), shards=1)


class FusedAssigner(Encoder):
    """Ray worker: latents of data, whose features are made and forgotten.

    Features are rounded to float16 as if they had been stored, so that for the same centroids the
    latents are the same.
    """

    def __init__(self, settings: EncoderSettings, assignment: Assignment) -> None:
        super().__init__(settings)
        self._assignment = assignment
        self._codebook = assignment.read()

    def write(self, name: str, shard: StoredShard) -> None:
        """A latent shard."""
        self._assignment.write_latents(self._codebook, name, shard)
