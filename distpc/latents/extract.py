"""Stage `features`: one data shard in, one shard of teacher features out, on Ray workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from distpc.artifacts.stage import StageContext
from distpc.data.index import ShardEntry, ShardIndex
from distpc.data.reader import read_shard as read_data_shard
from distpc.errors import LatentError
from distpc.latents.store import SUFFIX, read_shard, shard_path, write_shard
from distpc.parallel.cluster import Cluster
from distpc.teachers import load_teacher

WORKER = "distpc.latents.extract:Extractor"
SPLIT = "train"
_MOST_KEYS_NAMED = 5


class Extractor:
    """Ray worker: loads the teacher once, then encodes one shard after the other.

    Args:
        index: folder of the index stage.
        teacher: folder of the teacher stage.
        out: folder for feature shards.
        fingerprint: that they get.
        teacher_fingerprint: of the teacher stage, noted in every shard.
        patch_size: side of a patch in pixels that latents are to have.
        batch_size: samples encoded at once.
        device: where the teacher runs, `cpu` or `cuda`.
    """

    def __init__(
        self,
        index: str,
        teacher: str,
        out: str,
        fingerprint: str,
        teacher_fingerprint: str,
        patch_size: int,
        batch_size: int,
        device: str,
    ) -> None:
        self._spec = ShardIndex.load(Path(index)).spec
        self._teacher = load_teacher(Path(teacher), device=device)
        self._teacher.check_data(self._spec, patch_size)
        self._teacher_fingerprint = teacher_fingerprint
        self._out = Path(out)
        self._fingerprint = fingerprint
        self._batch_size = batch_size

    def __call__(self, entry: ShardEntry) -> dict[str, float]:
        """Write a data shard's features: (N, Z, D) float16 under the samples' keys.

        Returns:
            seconds spent on reading, encoding and writing.
        """
        began = time.monotonic()
        shard = read_data_shard(entry, self._spec)
        read = time.monotonic()
        features = self._encode(torch.from_numpy(shard.x).long())
        _refuse_not_finite(features, shard.keys, entry.name)
        encoded = time.monotonic()
        grid = self._teacher.grid
        write_shard(
            shard_path(self._out, entry.name),
            "features",
            features,
            shard.keys,
            {
                "fingerprint": self._fingerprint,
                "teacher": self._teacher_fingerprint,
                "split": SPLIT,
                "grid": [grid.rows, grid.columns],
            },
        )
        written = time.monotonic()
        return {"read": read - began, "encode": encoded - read, "write": written - encoded}

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """(N, V) integers -> (N, Z, D) float16."""
        parts = [
            self._teacher.encode(batch).to("cpu", torch.float16)
            for batch in x.split(self._batch_size)
        ]
        return torch.cat(parts)


def run(ctx: StageContext) -> None:
    """Encode the training split's first shards; finished ones of a killed attempt are kept.

    Raises:
        LatentError: the teacher gave features that are not finite.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    index, teacher = ctx.input("index"), ctx.input("teacher")
    entries = ShardIndex.load(index.path).shards(SPLIT)
    used = first_shards(entries, ctx.config.latents.max_samples)
    _remove_others(ctx.out, {entry.name for entry in used})
    missing = [entry for entry in used if not _is_finished(ctx, entry)]
    kwargs = {
        "index": str(index.path),
        "teacher": str(teacher.path),
        "out": str(ctx.out),
        "fingerprint": ctx.fingerprint,
        "teacher_fingerprint": teacher.fingerprint,
        "patch_size": ctx.config.data.patch_size_pixels,
        "batch_size": ctx.config.teacher.extraction_batch_size,
        "device": "cuda" if ctx.config.parallel.gpus_per_worker > 0 else "cpu",
    }
    seconds = {"read": 0.0, "encode": 0.0, "write": 0.0}
    if missing:
        with Cluster.connect(ctx.config.parallel) as cluster:
            for _, spent in cluster.map(WORKER, kwargs, missing, label="features"):
                for name, value in spent.items():
                    seconds[name] += value
    _describe(ctx, used, len(used) - len(missing), seconds)


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


def _describe(
    ctx: StageContext, used: Sequence[ShardEntry], kept: int, seconds: dict[str, float]
) -> None:
    """Note in the metadata what was made."""
    first = read_shard(shard_path(ctx.out, used[0].name), "features")
    _, num_latents, width = first.rows.shape
    ctx.metadata.update(
        samples=sum(entry.num_samples for entry in used),
        shards=len(used),
        kept_shards=kept,
        latents_per_sample=num_latents,
        feature_width=width,
        grid=first.metadata["grid"],
        split=SPLIT,
        teacher=first.metadata["teacher"],
        bytes=sum(shard_path(ctx.out, entry.name).stat().st_size for entry in used),
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _is_finished(ctx: StageContext, entry: ShardEntry) -> bool:
    """Whether an interrupted attempt of this very stage left the whole shard."""
    path = shard_path(ctx.out, entry.name)
    try:
        read_shard(path, "features", fingerprint=ctx.fingerprint, keys=entry.samples().keys)
    except LatentError:
        return False
    return True


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove shards of an earlier configuration, lest they be taken for this one's."""
    for path in folder.glob(f"*{SUFFIX}"):
        if path.stem not in names:
            path.unlink()


def _refuse_not_finite(features: torch.Tensor, keys: Sequence[str], name: str) -> None:
    bad = torch.nonzero(~torch.isfinite(features).flatten(1).all(1)).flatten().tolist()
    if not bad:
        return
    named = ", ".join(f"'{keys[row]}'" for row in bad[:_MOST_KEYS_NAMED])
    more = len(bad) - _MOST_KEYS_NAMED
    raise LatentError(
        "the teacher gave features that are not finite in float16",
        where=f"data shard {name}",
        found=f"{len(bad)} samples: {named}" + (f" and {more} more" if more > 0 else ""),
        expected="finite values of at most 65504 in size",
        fix="train the teacher again with a smaller learning rate; see its loss curve",
    )
