"""Encoding many shards on Ray workers: the bad-sample budget, and the samples that kill workers."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.data.index import ShardEntry
from distpc.errors import LatentError, ResourceError
from distpc.latents.encode import EncoderSettings, ShardNote, ShardTask
from distpc.parallel.cluster import Cluster
from distpc.parallel.pool import Lost, Pool

BAD_SAMPLES = "bad_samples.json"
_PARTS = 16
"""Into how many parts the rows are cut that hold a sample that kills workers: 4,096 samples take
three deaths."""
_MOST_KEYS_NAMED = 5


@dataclass
class BadSamples:
    """The samples left out so far, and how many may be.

    Attributes:
        ctx: of the stage, whose folder they are listed in.
        reasons: by key.
    """

    ctx: StageContext
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, reasons: dict[str, str]) -> None:
        """Note more of them.

        Raises:
            LatentError: there are more than latents.max_bad_samples.
        """
        if not reasons:
            return
        self.reasons.update(reasons)
        listed = self.ctx.out / BAD_SAMPLES
        write_json(listed, dict(sorted(self.reasons.items())))
        allowed = self.ctx.config.latents.max_bad_samples
        if len(self.reasons) <= allowed:
            return
        named = [f"'{key}': {reason}" for key, reason in sorted(self.reasons.items())]
        more = len(named) - _MOST_KEYS_NAMED
        raise LatentError(
            "samples cannot be encoded",
            where=listed,
            found="; ".join(named[:_MOST_KEYS_NAMED]) + (f"; {more} more" if more > 0 else ""),
            expected=f"at most {allowed} such samples (latents.max_bad_samples)",
            fix="remove or mend them in the source, or raise latents.max_bad_samples to leave them "
            "out; where features are not finite, train the teacher with a smaller learning rate",
        )


@dataclass
class Spent:
    """Where the time went.

    Attributes:
        seconds: over all workers: `read`, `wait` (for the teacher), `encode`, `write`.
        start: from the request to the first worker that has loaded the teacher.
        wall: from there to the last shard.
        samples: encoded.
        workers: that ran side by side, at most.
    """

    seconds: dict[str, float]
    start: float = 0.0
    wall: float = 0.0
    samples: int = 0
    workers: int = 0

    def to_json(self) -> dict[str, Any]:
        """Rounded values for the stage's metadata."""
        rate = self.samples / self.wall if self.wall else 0.0
        return {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "start_seconds": round(self.start, 3),
            "samples_per_second": round(rate, 3),
            "most_workers": self.workers,
        }


def encode_shards(
    ctx: StageContext,
    worker: str,
    settings: EncoderSettings,
    entries: Sequence[ShardEntry],
    bad: BadSamples,
    label: str,
    **kwargs: Any,
) -> Spent:
    """Let workers encode shards and keep what they make of them.

    Args:
        ctx: of the stage.
        worker: `module:Class` of an `Encoder`.
        settings: of the encoders.
        entries: shards that are wanted.
        bad: samples left out of finished shards; more are added.
        label: of the progress bar and the curves.
        kwargs: more arguments of the worker's constructor.

    Raises:
        LatentError: more samples than allowed cannot be encoded, or kill their workers.
        ResourceError: the cluster is too small, or a shard kills its workers as a whole.
    """
    spent = Spent(dict.fromkeys(("read", "wait", "encode", "write"), 0.0))
    if not entries:
        return spent
    tasks = [ShardTask(entry) for entry in entries]
    ahead = ctx.config.parallel.prefetch_shards
    with (
        Cluster.connect(ctx.config.parallel) as cluster,
        cluster.pool(worker, {"settings": settings, **kwargs}, ahead=ahead) as pool,
        _Curves(ctx, label, bad) as curves,
    ):
        began = time.monotonic()
        deadly: list[ShardEntry] = []
        for number, note in pool.map(tasks, label=label, release=True, lost="yield"):
            if isinstance(note, Lost):
                deadly.append(entries[number])
                continue
            _count(spent, note)
            spent.wall = time.monotonic() - began - (pool.ready_seconds or 0.0)
            curves(note, spent)
            bad.add(note.bad)
        for entry in deadly:
            note = _without_killers(pool, entry, bad)
            _count(spent, note)
            bad.add(note.bad)
        spent.start, spent.workers = pool.ready_seconds or 0.0, pool.most_workers
    return spent


def _count(spent: Spent, note: ShardNote) -> None:
    for name, value in note.seconds.items():
        spent.seconds[name] += value
    spent.samples += note.samples


def _without_killers(pool: Pool, entry: ShardEntry, bad: BadSamples) -> ShardNote:
    """Encode a shard over which every worker died, without the samples that kill."""
    killers = _killers(pool, entry, bad)
    task = ShardTask(entry, killers)
    # Where no sample kills by itself, it may have been the memory that all took together.
    ((_, note),) = pool.map([task], label=f"{entry.name} again", lost="yield", ahead=0)
    if isinstance(note, Lost):
        raise ResourceError(
            "every worker that was given a shard died, and no single sample of it is to blame",
            where=f"data shard {entry.name}, {entry.num_samples} samples",
            found=note.cause,
            expected="a worker that lives to finish it",
            fix="most often memory: lower parallel.num_workers, parallel.prefetch_shards, "
            "teacher.extraction_batch_size or data.samples_per_shard, then run the same command "
            "again: finished shards are kept",
        )
    assert isinstance(note, ShardNote)
    return note


def _killers(pool: Pool, entry: ShardEntry, bad: BadSamples) -> dict[str, str]:
    """The samples of a shard that kill a worker by themselves, found by trying smaller parts.

    Raises:
        LatentError: there are more of them than allowed.
    """
    keys = entry.samples().keys
    parts = _cut(0, len(keys))
    found: dict[str, str] = {}
    while parts:
        tasks = [ShardTask(entry, rows=part) for part in parts]
        smaller: list[tuple[int, int]] = []
        label = f"looking for what kills workers in {entry.name}"
        for number, outcome in pool.map(
            tasks, method="try_rows", label=label, retries=0, lost="yield", ahead=0
        ):
            start, stop = parts[number]
            if not isinstance(outcome, Lost):
                continue
            if stop - start > 1:
                smaller += _cut(start, stop)
                continue
            found[keys[start]] = f"every worker that encodes it dies: {outcome.cause}"
            bad.add({keys[start]: found[keys[start]]})
        parts = sorted(smaller)
    return found


def _cut(start: int, stop: int) -> list[tuple[int, int]]:
    """Rows start .. stop - 1 as up to 16 parts, none empty."""
    size = stop - start
    parts = min(_PARTS, size)
    bounds = [start + size * number // parts for number in range(parts + 1)]
    return list(itertools.pairwise(bounds))


class _Curves:
    """TensorBoard: rate and times after every shard, and in the end the samples left out."""

    def __init__(self, ctx: StageContext, label: str, bad: BadSamples) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = ctx.tensorboard / label
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(folder, flush_secs=10)
        self._label = label
        self._bad = bad
        self._shards = 0

    def __enter__(self) -> _Curves:
        return self

    def __call__(self, note: ShardNote, spent: Spent) -> None:
        """Note a finished shard."""
        self._shards += 1
        for name, value in note.seconds.items():
            self._writer.add_scalar(f"{self._label}/{name}_seconds", value, self._shards)
        if spent.wall > 0:
            rate = spent.samples / spent.wall
            self._writer.add_scalar(f"{self._label}/samples_per_second", rate, self._shards)

    def __exit__(self, *details: object) -> None:
        reasons = self._bad.reasons
        self._writer.add_scalar(f"{self._label}/bad_samples", len(reasons), self._shards)
        if reasons:
            rows = [f"| {key} | {reason} |" for key, reason in sorted(reasons.items())]
            table = "\n".join(["| sample | reason |", "|---|---|", *rows])
            self._writer.add_text(f"{self._label}/bad_samples", table, self._shards)
        self._writer.close()
