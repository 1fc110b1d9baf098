"""Training samples and their patch latents, matched by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distpc.artifacts.stage import StageContext
from distpc.data.index import ShardEntry, ShardIndex
from distpc.data.reader import iterate_split, read_shard
from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import LatentError
from distpc.latents import load_latents
from distpc.latents.store import NO_LATENT, left_out_keys, shard_path


@dataclass(frozen=True)
class LatentSource:
    """The training shards that have latents.

    Attributes:
        index: of the data.
        folder: of the latent shards.
        num_patches: Z, latents that every sample must have.
        num_clusters: K; latents are 0 .. K - 1.
        fingerprint: of the assign stage that must have written the latents.
    """

    index: ShardIndex
    folder: Path
    num_patches: int
    num_clusters: int
    fingerprint: str | None = None

    @classmethod
    def of(cls, ctx: StageContext, num_patches: int) -> LatentSource:
        """The source that a stage's inputs describe."""
        index = ShardIndex.load(ctx.input("index").path)
        clusters = ctx.config.latents.num_clusters
        assign = ctx.input("assign")
        return cls(index, assign.path, num_patches, clusters, assign.fingerprint)

    def shards(self) -> list[ShardEntry]:
        """Training shards with latents, in order.

        Raises:
            LatentError: there are none.
        """
        found = [e for e in self.index.shards("train") if shard_path(self.folder, e.name).is_file()]
        if not found:
            raise LatentError(
                "there are no latents of training shards",
                where=self.folder,
                expected=[entry.name for entry in self.index.shards("train")][:3],
                fix="run the assign stage for these shards",
            )
        return found

    def latents(self, entry: ShardEntry) -> np.ndarray:
        """(N, Z) latents of one shard, without the samples that could not be encoded.

        Raises:
            LatentError: they are of other samples, of another grid, or of more clusters.
        """
        keys, latents = load_latents(self.folder, entry.name, self.fingerprint)
        expected = self._keys(entry)
        if list(keys) != list(expected):
            raise self._strange(entry, _first_difference(keys, expected))
        if latents.shape != (len(keys), self.num_patches):
            raise self._strange(
                entry, (f"latents of shape {latents.shape}", f"(N, {self.num_patches})")
            )
        if latents.size and int(latents.max()) >= self.num_clusters:
            raise self._strange(
                entry, (f"cluster {latents.max()}", f"0 .. {self.num_clusters - 1}")
            )
        return latents

    def read(self, entry: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        """(N, V) values and (N, Z) latents of one shard, without the samples that could not be
        encoded.

        Of text, missing tokens have no latent, NO_LATENT, and the token that ends a document has a
        state of its own behind the clusters.

        Raises:
            LatentError: as `latents`, or a token that is there has none.
        """
        shard, latents = read_shard(entry, self.index.spec), self.latents(entry)
        x = shard.x
        if len(latents) != len(shard.keys):
            kept = set(self._keys(entry))
            x = x[[key in kept for key in shard.keys]]
        if self.index.spec.kind == "text":
            self._check_tokens(entry, x, latents)
            latents = np.where(x == MISSING, NO_LATENT, latents.astype(np.int64))
            if self.index.spec.end_token is not None:
                latents[x == self.index.spec.end_token] = self.num_clusters
        return x, latents

    def check_values(self, sizes: set[int], where: Path) -> None:
        """Refuse a region graph whose latents have other values than these.

        Args:
            sizes: numbers of values that the graph's latents have.
            where: the graph is.

        Raises:
            LatentError: they are not all `num_clusters`.
        """
        if sizes != {self.num_clusters}:
            raise LatentError(
                "the region graph was made for other latents",
                where=where,
                found=f"{sorted(sizes)} values of a latent",
                expected=f"{self.num_clusters} (latents.num_clusters)",
                fix="run the structure stage again",
            )

    def _check_tokens(self, entry: ShardEntry, x: np.ndarray, latents: np.ndarray) -> None:
        lacking = np.argwhere((latents == NO_LATENT) & (x != MISSING))
        if len(lacking):
            row, place = lacking[0].tolist()
            found = f"no latent of token {place} of sample '{self._keys(entry)[row]}'"
            raise self._strange(entry, (found, "a latent of every token that is there"))

    def _keys(self, entry: ShardEntry) -> list[str]:
        left_out = left_out_keys(self.folder, entry.name)
        return [key for key in entry.samples().keys if key not in left_out]

    def _strange(self, entry: ShardEntry, difference: tuple[str, str]) -> LatentError:
        return LatentError(
            "latents do not belong to the data",
            where=shard_path(self.folder, entry.name),
            found=difference[0],
            expected=difference[1],
            fix="remove the features, fit and assign folders and run the same command again",
        )


def num_states(num_clusters: int, spec: DatasetSpec) -> int:
    """States of a hidden Markov model that is distilled from clusters of these data's tokens."""
    return num_clusters + (spec.end_token is not None)


def take_rows(
    index: ShardIndex, split: str, max_samples: int, batch_size: int = 1024
) -> Iterator[np.ndarray]:
    """Yield batches (b, V) of the first samples of a split, `max_samples` in all.

    Splits are drawn by a permutation, so that the first samples are as good as any.
    """
    taken = 0
    for batch in iterate_split(index, index.spec, split, min(batch_size, max_samples)):
        yield batch[: max_samples - taken]
        taken += len(batch)
        if taken >= max_samples:
            return


def _first_difference(found: list[str], expected: list[str]) -> tuple[str, str]:
    for position, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return f"key '{one}' at {position}", f"key '{other}'"
    return f"{len(found)} keys", f"{len(expected)} keys"
