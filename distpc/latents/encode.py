"""What a worker does with a data shard: read it, encode it with the teacher, hand the features on.

A worker is called from several threads at a time (`Cluster.pool(ahead=)`): while one encodes, which
is done by one at a time, another reads and decodes the next shard or writes the last one. A worker
holds no more decoded shards than it has threads, so that slow encoding stops reading.
Shapes: N samples of a shard, V variables, Z latents of a sample, D feature width.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.cache import Cache, use
from distpc.data.index import ShardEntry, ShardIndex
from distpc.data.reader import read_shard
from distpc.errors import ResourceError
from distpc.latents.store import StoredShard, shard_path
from distpc.parallel.stopwatch import count, holding
from distpc.teachers import load_teacher

NOT_FINITE = "features are not finite in float16 (largest size 65504)"


@dataclass(frozen=True)
class ShardTask:
    """A shard to encode, or some rows of it to try.

    Attributes:
        entry: the data shard.
        bad: reasons by key of samples that are known to be bad: left out without trying.
        rows: first and last + 1 row to try (`Encoder.try_rows`).
    """

    entry: ShardEntry
    bad: dict[str, str] = field(default_factory=dict)
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class ShardNote:
    """What became of a shard.

    Attributes:
        name: of the shard.
        samples: that were encoded.
        bad: reasons by key of the samples that were not.
        written: whether the shard is finished; not when it has more bad samples than allowed.
    """

    name: str
    samples: int
    bad: dict[str, str]
    written: bool


@dataclass(frozen=True)
class EncoderSettings:
    """What every encoder is told.

    Attributes:
        index: folder of the index stage.
        teacher: folder of the teacher stage.
        teacher_fingerprint: of the teacher stage, noted in every shard.
        out: folder for what is made.
        fingerprint: that it gets.
        patch_size: side of a patch in pixels that latents are to have.
        batch_size: samples encoded at once.
        device: where the teacher runs, `cpu` or `cuda`.
        mixed: multiply matrices in bfloat16 on GPUs.
        max_bad: samples that may be left out.
        cache_folder, cache_bytes: where copies of shards from an object store are kept.
    """

    index: str
    teacher: str
    teacher_fingerprint: str
    out: str
    fingerprint: str
    patch_size: int
    batch_size: int
    device: str
    mixed: bool = True
    max_bad: int = 0
    cache_folder: str | None = None
    cache_bytes: int = 10 * 2**30


class Encoder(ABC):
    """Ray worker: loads the teacher once, then encodes one shard after the other."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        use(Cache(settings.cache_folder, settings.cache_bytes))
        self._spec = ShardIndex.load(Path(settings.index)).spec
        self._teacher = load_teacher(Path(settings.teacher), device=settings.device)
        self._teacher.check_data(self._spec, settings.patch_size)
        self._out = Path(settings.out)
        self._encoding = threading.Lock()

    @abstractmethod
    def write(self, name: str, shard: StoredShard) -> None:
        """Keep what is wanted of a shard's features, whole or not at all.

        Args:
            name: of the shard.
            shard: finite float16 features (N, Z, D), not stored yet; `path` is the file for what
                is made of them.
        """

    def __call__(self, task: ShardTask) -> ShardNote:
        """Encode a shard and keep what is wanted of it.

        Raises:
            DataError: the shard is missing or has changed.
            DistpcError: no sample at all can be encoded, with the teacher's reason.
        """
        shard = read_shard(task.entry, self._spec)
        with holding(self._encoding):
            features, bad = self._encode(shard.x, shard.keys, task.bad)
        allowed = len(bad) <= self._settings.max_bad
        rows = [row for row, key in enumerate(shard.keys) if key not in bad]
        keys = [shard.keys[row] for row in rows]
        if allowed and keys:
            present = self._teacher.present(torch.from_numpy(shard.x[rows]))
            notes = self._notes(features, present, bad)
            path = shard_path(self._out, shard.name)
            self.write(shard.name, StoredShard(path, features, keys, notes, present))
        count(samples=len(keys), shards=1)
        return ShardNote(shard.name, len(keys), bad, allowed and bool(keys))

    def try_rows(self, task: ShardTask) -> dict[str, str]:
        """Encode some rows and keep nothing; the reasons by key of the bad ones among them."""
        assert task.rows is not None
        rows = slice(*task.rows)
        shard = read_shard(task.entry, self._spec)
        with holding(self._encoding):
            return self._encode(shard.x[rows], shard.keys[rows], {})[1]

    def _notes(
        self, features: Tensor, present: Tensor | None, bad: dict[str, str]
    ) -> dict[str, Any]:
        grid = self._teacher.grid
        points = features.flatten(0, 1) if present is None else features[present]
        spread = points.amax(0).float() - points.amin(0).float()
        return {
            "fingerprint": self._settings.fingerprint,
            "teacher": self._settings.teacher_fingerprint,
            "split": "train",
            "grid": [grid.rows, grid.columns],
            "spread": float(spread.max()),
            "bad": bad,
        }

    def _encode(
        self, x: np.ndarray, keys: Sequence[str], known: dict[str, str]
    ) -> tuple[Tensor, dict[str, str]]:
        """(N, V) values -> (N - bad, Z, D) float16 features, and the bad ones' reasons by key."""
        bad = dict(known)
        good = [row for row, key in enumerate(keys) if key not in bad]
        shape = (self._teacher.num_latents, self._teacher.feature_width)
        parts = [torch.empty(0, *shape, dtype=torch.float16)]
        size = self._settings.batch_size
        for first in range(0, len(good), size):
            rows = good[first : first + size]
            batch = torch.from_numpy(x[rows]).long()
            parts.append(self._encode_batch(batch, [keys[row] for row in rows], bad))
        return torch.cat(parts), bad

    def _encode_batch(self, x: Tensor, keys: Sequence[str], bad: dict[str, str]) -> Tensor:
        """(B, V) -> (B - bad, Z, D) float16; bad ones are noted."""
        try:
            features = self._run(x)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "a GPU has too little memory for a batch of the teacher",
                where="teacher.extraction_batch_size",
                found=str(error).splitlines()[0],
                fix=f"lower it from {self._settings.batch_size}, or share the GPU among fewer "
                "workers (parallel.gpus_per_worker)",
            ) from error
        except Exception as error:
            if len(x) == 1:
                raise
            return self._one_by_one(x, keys, bad, error)
        finite = torch.isfinite(features).flatten(1).all(1)
        for row in torch.nonzero(~finite).flatten().tolist():
            bad[keys[row]] = NOT_FINITE
        return features[finite]

    def _one_by_one(
        self, x: Tensor, keys: Sequence[str], bad: dict[str, str], error: Exception
    ) -> Tensor:
        """Encode a batch that raised `error` sample by sample, to learn which are to blame.

        Raises:
            `error`, where all of them raise: then it is not the samples.
        """
        parts = []
        for row, key in zip(x, keys, strict=True):
            try:
                parts.append(self._encode_batch(row[None], [key], bad))
            except Exception as cause:
                bad[key] = f"{type(cause).__name__}: {cause}".splitlines()[0]
        if not parts:
            raise error
        return torch.cat(parts)

    def _run(self, x: Tensor) -> Tensor:
        """(B, V) -> (B, Z, D) float16 on the CPU."""
        mixed = self._settings.mixed and self._settings.device != "cpu"
        with torch.autocast(self._settings.device, torch.bfloat16, enabled=mixed):
            return self._teacher.encode(x).to("cpu", torch.float16)
