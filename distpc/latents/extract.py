"""Stage `features`: one data shard in, one shard of teacher features out, on Ray workers.

With `latents.keep_features: false` only the shards that k-means is fitted to are kept: some, spread
evenly over all. Images are put into shards by a random permutation, so that these are a uniform
sample; text stays in its documents, which are permuted, so that these are of many documents. The
stage `assign` then encodes all shards and keeps latents only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distpc.artifacts.manifest import Artifact
from distpc.artifacts.stage import StageContext
from distpc.config import RunConfig
from distpc.data.index import ShardEntry, ShardIndex
from distpc.data.patches import PatchGrid
from distpc.errors import LatentError
from distpc.latents.encode import Encoder, EncoderSettings
from distpc.latents.shard_work import BAD_SAMPLES, BadSamples, encode_shards, refuse_bad
from distpc.latents.store import (
    SUFFIX,
    StoredShard,
    read_shard,
    read_tensors,
    shard_path,
    write_shard,
)

WORKER = "distpc.latents.extract:Extractor"
SPLIT = "train"
FIT_POINTS_PER_CLUSTER = 1024
"""Four times what faiss draws for each cluster; a centroid's standard error is then 1/32 of its
cluster's spread."""


class Extractor(Encoder):
    """Ray worker: keeps features, (N, Z, D) float16 under the samples' keys."""

    def write(self, name: str, shard: StoredShard) -> None:
        """A feature shard."""
        write_shard(shard.path, "features", shard.rows, shard.keys, shard.metadata, shard.present)


def run(ctx: StageContext) -> None:
    """Encode the training split's first shards; finished ones of a killed attempt are kept.

    Raises:
        LatentError: more samples than latents.max_bad_samples cannot be encoded, or all features
            are alike.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    entries = ShardIndex.load(ctx.input("index").path).shards(SPLIT)
    latents = ctx.config.latents
    wanted = first_shards(entries, latents.max_samples)
    used = wanted if latents.keep_features else spread_shards(wanted, samples_to_fit(ctx))
    _remove_others(ctx.out, {entry.name for entry in used})
    missing = [e for e in used if not is_finished(ctx, e, "features")]
    kept = [entry for entry in used if entry not in missing]
    bad = bad_of_finished(ctx, kept, "features")
    workers = encode_shards(ctx, WORKER, settings(ctx), missing, bad, "features")
    _describe(ctx, used, wanted, len(kept), bad, workers)


def judge(config: RunConfig, features: Artifact) -> None:
    """Refuse finished features that lack more samples than are allowed now.

    Raises:
        LatentError: naming some of them.
    """
    bad = features.metadata.get("bad_samples", {})
    refuse_bad(bad, config.latents, features.path / BAD_SAMPLES)


def settings(ctx: StageContext) -> EncoderSettings:
    """What the encoders of a stage are told."""
    teacher, config = ctx.input("teacher"), ctx.config
    return EncoderSettings(
        index=str(ctx.input("index").path),
        teacher=str(teacher.path),
        teacher_fingerprint=teacher.fingerprint,
        out=str(ctx.out),
        fingerprint=ctx.fingerprint,
        patch_size=config.data.patch_size_pixels,
        batch_size=config.teacher.extraction_batch_size,
        device="cuda" if config.parallel.gpus_per_worker > 0 else "cpu",
        mixed=config.teacher.extraction_mixed_precision,
        max_bad=config.latents.max_bad_samples,
        cache_folder=config.artifacts.cache_folder,
        cache_bytes=config.artifacts.cache_bytes,
    )


def samples_to_fit(ctx: StageContext) -> int:
    """Samples that k-means is fitted to where features are not kept."""
    latents = ctx.config.latents
    if latents.fit_samples is not None:
        return latents.fit_samples
    spec = ShardIndex.load(ctx.input("index").path).spec
    per_sample = spec.num_variables
    if spec.kind != "text":
        per_sample = PatchGrid.of(spec, ctx.config.data.patch_size_pixels).num_patches
    return -(-latents.num_clusters * FIT_POINTS_PER_CLUSTER // per_sample)


def first_shards(entries: Sequence[ShardEntry], max_samples: int | None) -> list[ShardEntry]:
    """The leading shards with at most `max_samples` samples together, but at least one shard.

    Shards are taken whole, so that every latent shard matches a data shard sample by sample.
    """
    used: list[ShardEntry] = []
    samples = 0
    for entry in entries:
        samples += entry.num_samples
        if used and max_samples is not None and samples > max_samples:
            break
        used.append(entry)
    return used


def spread_shards(entries: Sequence[ShardEntry], max_samples: int) -> list[ShardEntry]:
    """Shards at even distances with about `max_samples` samples together, but at least one."""
    samples = sum(entry.num_samples for entry in entries)
    number = min(len(entries), max(1, max_samples * len(entries) // samples))
    return [entries[position * len(entries) // number] for position in range(number)]


def is_finished(ctx: StageContext, entry: ShardEntry, holds: str) -> bool:
    """Whether an interrupted attempt of this very stage left the whole shard."""
    path = shard_path(ctx.out, entry.name)
    try:
        found = read_shard(path, holds, fingerprint=ctx.fingerprint)
    except LatentError:
        return False
    left_out = found.metadata.get("bad", {})
    return found.keys == [key for key in entry.samples().keys if key not in left_out]


def bad_of_finished(ctx: StageContext, kept: Sequence[ShardEntry], holds: str) -> BadSamples:
    """The samples that finished shards lack.

    Raises:
        LatentError: there are more than allowed now.
    """
    (ctx.out / BAD_SAMPLES).unlink(missing_ok=True)
    bad = BadSamples(ctx)
    for entry in kept:
        _, noted = read_tensors(shard_path(ctx.out, entry.name), holds, ctx.fingerprint)
        bad.add(noted.get("bad", {}))
    return bad


def _describe(
    ctx: StageContext,
    used: Sequence[ShardEntry],
    wanted: Sequence[ShardEntry],
    num_kept: int,
    bad: BadSamples,
    workers: dict[str, Any],
) -> None:
    """Note in the metadata what was made.

    Raises:
        LatentError: the teacher gives every patch of every sample the same features.
    """
    first = read_shard(shard_path(ctx.out, used[0].name), "features")
    _, num_latents, width = first.rows.shape
    paths = [shard_path(ctx.out, entry.name) for entry in used]
    if not any(read_tensors(path, "features", None)[1]["spread"] for path in paths):
        raise LatentError(
            "the teacher's features have no variance: there is nothing to cluster",
            where=ctx.out,
            found="all features are alike",
            expected="features that differ from patch to patch, or token to token",
            fix="look at the teacher's loss curve, or try another teacher.pretrained.layer",
        )
    ctx.metadata.update(
        samples=sum(entry.num_samples for entry in used) - len(bad.reasons),
        shards=len(used),
        kept_shards=num_kept,
        latents_per_sample=num_latents,
        feature_width=width,
        grid=first.metadata["grid"],
        split=SPLIT,
        teacher=first.metadata["teacher"],
        bytes=sum(path.stat().st_size for path in paths),
        all_samples=sum(entry.num_samples for entry in wanted),
        bad_samples=dict(sorted(bad.reasons.items())),
        workers=workers,
    )


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove shards of an earlier configuration, lest they be taken for this one's."""
    for path in folder.glob(f"*{SUFFIX}"):
        if path.stem not in names:
            path.unlink()
