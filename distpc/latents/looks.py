"""What a run's clusters look like, gathered from its stages: members, and features in a plane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from distpc.artifacts.manifest import Artifact
from distpc.artifacts.stage import StageContext
from distpc.data.codec import SampleCodec
from distpc.data.index import ShardIndex
from distpc.data.reader import read_rows
from distpc.data.tokenizers import tokenizer_of
from distpc.latents.codebook import Codebook, read_codebook
from distpc.latents.fit import CENTROIDS
from distpc.latents.members import Member, draw_members, spread_clusters
from distpc.latents.montage import patch_montage, snippet
from distpc.latents.projection import Projection, project, scatter_picture
from distpc.latents.store import (
    NO_LATENT,
    feature_shards,
    load_latents,
    read_shard,
    shard_path,
)

CLUSTERS = 8
MEMBERS = 12
POINTS = 8192
"""Features that are drawn into the plane."""
SHARDS = 64
"""Shards that they are taken from, at most."""
PER_SHARD = 2
"""Members of a cluster that one shard gives, while there are other shards."""


@dataclass(frozen=True)
class Looks:
    """The clusters of one run.

    Attributes:
        inputs: artifacts of the stages index, features and fit.
        folder: of the latent shards.
        names: of the shards.
        usage: how often each cluster occurs, K of every codebook.
        patch_size: side of a patch in pixels.
        num_clusters: K. Where every position has a codebook, its clusters are numbered
            position * K + value.
    """

    inputs: Mapping[str, Artifact]
    folder: Path
    names: list[str]
    usage: np.ndarray
    patch_size: int
    num_clusters: int

    @cached_property
    def index(self) -> ShardIndex:
        """Of the data."""
        return ShardIndex.load(self.inputs["index"].path)

    def members(
        self, num_clusters: int = CLUSTERS, per_cluster: int = MEMBERS, seed: int = 0
    ) -> dict[int, list[Member]]:
        """Some members of some clusters; see `members`."""
        clusters = spread_clusters(self.usage, num_clusters)
        per_shard = max(PER_SHARD, -(-per_cluster // len(self.names)))
        return draw_members(self._latents(), clusters, per_cluster, per_shard, seed)

    def samples(self, members: dict[int, list[Member]]) -> dict[int, np.ndarray]:
        """(M, V) samples that the members of each cluster belong to."""
        codec = SampleCodec(self.index.spec)
        entries = {entry.name: entry for entry in self.index.entries}

        def read(member: Member) -> np.ndarray:
            entry = entries[member.shard]
            # A sample that could not be encoded has no row among the latents.
            row = entry.samples().keys.index(member.key)
            return read_rows(entry, codec, np.array([row]))[0]

        return {
            cluster: np.stack([read(member) for member in found])
            for cluster, found in members.items()
        }

    def montage(self, members: dict[int, list[Member]]) -> np.ndarray:
        """(height, width, 3) uint8: patches of each cluster, in rows (images only)."""
        units = {cluster: [m.unit for m in found] for cluster, found in members.items()}
        return patch_montage(self.samples(members), units, self.index.spec, self.patch_size)

    def snippets(self, members: dict[int, list[Member]]) -> dict[int, list[str]]:
        """Tokens of each cluster, in their text.

        Raises:
            DataError: the data's tokenizer is missing, or another one.
        """
        tokenizer = tokenizer_of(self.index.spec, self.index.folder)
        end_token = self.index.spec.end_token
        return {
            cluster: [
                snippet(row, member.unit, tokenizer, end_token)
                for row, member in zip(rows, members[cluster], strict=True)
            ]
            for cluster, rows in self.samples(members).items()
        }

    def snippet_table(self, members: dict[int, list[Member]]) -> str:
        """Markdown: one section a cluster, one line a member."""
        lines: list[str] = []
        for cluster, found in self.snippets(members).items():
            title = f"**cluster {self.name(cluster)}**"
            lines += [title, "", *(f"    {text}" for text in found), ""]
        return "\n".join(lines)

    def name(self, cluster: int) -> str:
        """Of a cluster, for people."""
        position, value = divmod(cluster, self.num_clusters)
        return f"{value} of position {position}" if self._has_positions else str(value)

    def features(self, num_points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
        """(P, D) float32 features as they were clustered, and their (P,) clusters, of whole
        samples from shards far apart."""
        artifact = self.inputs["features"]
        names = _spread(feature_shards(artifact), SHARDS)
        points: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for name in names:
            shard = read_shard(shard_path(artifact.path, name), "features")
            latents = self._clusters(name)[1]
            wanted = -(-num_points // (len(names) * latents.shape[1]))
            found = latents[:wanted].ravel()
            there = found != NO_LATENT
            rows = shard.rows[:wanted].flatten(0, 1)[torch.from_numpy(there)].float()
            if self._codebook.projection is not None:
                rows = self._codebook.projection(rows).float()
            points.append(rows.numpy())
            labels.append(found[there])
        return np.concatenate(points)[:num_points], np.concatenate(labels)[:num_points]

    def projection(self) -> Projection:
        """Features and centroids in the plane of the features' principal components."""
        features, labels = self.features()
        return project(features, labels, self._codebook.centroids.flatten(0, -2).numpy())

    @cached_property
    def _codebook(self) -> Codebook:
        artifact = self.inputs["features"]
        path = self.inputs["fit"].path / CENTROIDS
        first = shard_path(artifact.path, feature_shards(artifact)[0])
        shape = read_shard(first, "features").rows.shape
        return read_codebook(
            path, features=artifact.fingerprint, shape=(int(shape[1]), int(shape[2]))
        )

    @property
    def _has_positions(self) -> bool:
        return len(self.usage) > self.num_clusters

    def _clusters(self, name: str) -> tuple[list[str], np.ndarray]:
        """Keys, and (N, Z) clusters of a shard, NO_LATENT where a token is missing."""
        keys, latents = load_latents(self.folder, name)
        if self._has_positions:
            first = self.num_clusters * np.arange(latents.shape[1])
            latents = np.where(latents == NO_LATENT, NO_LATENT, latents + first)
        return keys, latents

    def _latents(self) -> Iterator[tuple[str, list[str], np.ndarray]]:
        # In an order in which neighbours are far apart: shards of text hold few documents each.
        for name in np.random.default_rng(0).permutation(self.names).tolist():
            yield name, *self._clusters(name)


def log_looks(ctx: StageContext, names: list[str], usage: list[int], folder: Path) -> None:
    """Write montage or snippets, and the plane of features, for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    config = ctx.config
    size, num_clusters = config.data.patch_size_pixels, config.latents.num_clusters
    looks = Looks(ctx.inputs, ctx.out, names, np.asarray(usage), size, num_clusters)
    members = looks.members(seed=ctx.config.seed)
    with SummaryWriter(folder) as writer:
        if looks.index.spec.kind == "image":
            writer.add_image("latents/members", looks.montage(members), 0, dataformats="HWC")
        else:
            writer.add_text("latents/members", looks.snippet_table(members), 0)
        picture = scatter_picture(looks.projection())
        writer.add_image("latents/projection", picture, 0, dataformats="HWC")


def _spread(names: list[str], most: int) -> list[str]:
    number = min(len(names), most)
    return [names[position * len(names) // number] for position in range(number)]
