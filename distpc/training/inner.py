"""Values of the latents inside of leaves: clusters of what surrounds each variable of a patch.

Where only the clusters of whole patches are observed, the states inside of a patch's density stay
as random as they were drawn; here they are supervised as well, at a finer scale: the state of a
variable is the cluster of its own value, of the other channels of its pixel and of the pixels next
to it, each with a weight of its own. With every level observed the whole circuit is counted.
Legend: P patches, D variables of a patch, T tables, K states, F feature width, N samples, V, Z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distpc.data.index import ShardEntry
from distpc.latents.local import cluster_points
from distpc.latents.nearest import assign_points
from distpc.structures.patch_layout import PatchLayout
from distpc.training.samples import LatentSource

NUM_ROUNDS = 15
"""Lloyd rounds of a codebook; more change little in so few dimensions."""
_PATCHES_AT_ONCE = 16_384


@dataclass(frozen=True)
class Surroundings:
    """What the state of a variable is to say of the values around it.

    Attributes:
        size: side of a patch in pixels.
        channels: of a pixel; variables of a patch run (row, column, channel).
        pixel: weight of the pixel's other channels, against 1 of the variable's own value.
        near: weight of the mean, channel by channel, of the 3 x 3 pixels about it in the patch.
    """

    size: int
    channels: int
    pixel: float
    near: float

    def features(self, patches: np.ndarray) -> np.ndarray:
        """(P, D) values -> (P, D, 1 + 2 C) float32, C channels."""
        shape = len(patches), self.size, self.size, self.channels
        pixels = patches.reshape(shape).astype(np.float32)
        around = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        mean = np.zeros_like(pixels)
        for row in range(3):
            for column in range(3):
                mean += around[:, row : row + self.size, column : column + self.size]
        found = np.empty((*shape, 1 + 2 * self.channels), np.float32)
        for channel in range(self.channels):
            of_channel = found[..., channel, :]
            of_channel[..., 0] = pixels[..., channel]
            of_channel[..., 1 : 1 + self.channels] = self.pixel * pixels
            of_channel[..., 1 + channel] = 0.0
            of_channel[..., 1 + self.channels :] = self.near / 9 * mean
        return found.reshape(*patches.shape, -1)


@dataclass(frozen=True)
class InnerCodebook:
    """Centroids of the latents inside of a patch.

    Attributes:
        surroundings: that are clustered.
        tables: (D,) which centroids each variable's latent chooses from.
        centroids: (T, K, F) float32.
    """

    surroundings: Surroundings
    tables: tuple[int, ...]
    centroids: Tensor

    @classmethod
    def fit(
        cls,
        patches: np.ndarray,
        surroundings: Surroundings,
        tables: tuple[int, ...],
        num_states: int,
        seed: int,
    ) -> InnerCodebook:
        """Cluster the surroundings of the variables of each table.

        Args:
            patches: (P, D) values.
            tables: (D,), of `HcltLeaf`.
            num_states: K.
            seed: of the clusterings.
        """
        features = surroundings.features(patches)
        fitted = []
        for table in range(max(tables) + 1):
            own = [d for d, number in enumerate(tables) if number == table]
            points = torch.from_numpy(features[:, own].reshape(-1, features.shape[-1]))
            fitted.append(cluster_points(points, num_states, NUM_ROUNDS, [seed, table]))
        return cls(surroundings, tables, torch.stack(fitted))

    def assign(self, patches: np.ndarray) -> np.ndarray:
        """(P, D) values -> (P, D) int64 latents."""
        latents = np.empty(patches.shape, np.int64)
        for start in range(0, len(patches), _PATCHES_AT_ONCE):
            rows = slice(start, start + _PATCHES_AT_ONCE)
            features = torch.from_numpy(self.surroundings.features(patches[rows]))
            for d, table in enumerate(self.tables):
                found, _ = assign_points(features[:, d].contiguous(), self.centroids[table])
                latents[rows, d] = found.numpy()
        return latents


@dataclass(frozen=True, kw_only=True)
class InnerSource(LatentSource):
    """Training samples with the latents of all levels.

    Attributes:
        variables: (Z, D) of every patch.
        codebook: of the latents inside of patches.
    """

    variables: np.ndarray
    codebook: InnerCodebook

    @classmethod
    def around(
        cls, source: LatentSource, layout: PatchLayout, codebook: InnerCodebook
    ) -> InnerSource:
        """The same samples with more latents."""
        return cls(
            source.index,
            source.folder,
            source.num_patches,
            source.num_clusters,
            source.fingerprint,
            variables=layout.variables,
            codebook=codebook,
        )

    def read(self, entry: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        """(N, V) values and (N, Z + Z D) latents of one shard, numbered as in `patches`."""
        x, latents = super().read(entry)
        patches = x[:, self.variables].reshape(-1, self.variables.shape[1])
        inner = self.codebook.assign(patches).reshape(len(x), -1)
        return x, np.concatenate([latents, inner], axis=1)
