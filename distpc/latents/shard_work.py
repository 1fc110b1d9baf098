"""Encoding many shards on Ray workers: the bad-sample budget, and the samples that kill workers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.config.schema import LatentsConfig
from distpc.data.index import ShardEntry
from distpc.errors import LatentError, ResourceError
from distpc.latents.encode import EncoderSettings, ShardNote, ShardTask
from distpc.parallel.cluster import Cluster
from distpc.parallel.pool import Lost, Pool
from distpc.parallel.tally import Tally

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
        refuse_bad(self.reasons, self.ctx.config.latents, listed)


def refuse_bad(reasons: Mapping[str, str], config: LatentsConfig, listed: Path) -> None:
    """Stop the run where more samples than allowed are left out.

    Args:
        reasons: by key.
        listed: file that they are listed in.

    Raises:
        LatentError: naming some of them.
    """
    allowed = config.max_bad_samples
    if len(reasons) <= allowed:
        return
    named = [f"'{key}': {reason}" for key, reason in sorted(reasons.items())]
    more = len(named) - _MOST_KEYS_NAMED
    raise LatentError(
        "samples cannot be encoded",
        where=listed,
        found="; ".join(named[:_MOST_KEYS_NAMED]) + (f"; {more} more" if more > 0 else ""),
        expected=f"at most {allowed} such samples (latents.max_bad_samples)",
        fix="remove or mend them in the source, or raise latents.max_bad_samples to leave them "
        "out; where features are not finite, train the teacher with a smaller learning rate",
    )


def encode_shards(
    ctx: StageContext,
    worker: str,
    settings: EncoderSettings,
    entries: Sequence[ShardEntry],
    bad: BadSamples,
    stage: str,
    **kwargs: Any,
) -> dict[str, Any]:
    """Let workers encode shards and keep what they make of them.

    Args:
        ctx: of the stage.
        worker: `module:Class` of an `Encoder`.
        settings: of the encoders.
        entries: shards that are wanted.
        bad: samples left out of finished shards; more are added.
        stage: name for the progress bar, the curves and Ray's dashboard.
        kwargs: more arguments of the worker's constructor.

    Returns:
        where the time went, for the stage's metadata; see `Tally.to_json`.

    Raises:
        LatentError: more samples than allowed cannot be encoded, or kill their workers.
        ResourceError: the cluster is too small, or a shard kills its workers as a whole.
    """
    tally = Tally(stage, ctx.tensorboard / stage)
    if not entries:
        return tally.to_json()
    tasks = [ShardTask(entry) for entry in entries]
    ahead = ctx.config.parallel.prefetch_shards
    with (
        Cluster.connect(ctx.config.parallel) as cluster,
        tally,
        cluster.pool(worker, {"settings": settings, **kwargs}, ahead=ahead, tally=tally) as pool,
        contextlib.ExitStack() as last,
    ):
        last.callback(_show, bad, tally)
        deadly: list[ShardEntry] = []
        for number, note in pool.map(tasks, label=stage, release=True, lost="yield"):
            if isinstance(note, Lost):
                deadly.append(entries[number])
            else:
                bad.add(note.bad)
        for entry in deadly:
            bad.add(_without_killers(pool, entry, bad).bad)
    return tally.to_json()


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


def _show(bad: BadSamples, tally: Tally) -> None:
    """The samples left out, in TensorBoard."""
    if tally.curves is None:
        return
    name = f"{tally.stage}/bad_samples"
    tally.curves.scalars(tally.calls, {name: len(bad.reasons)})
    if bad.reasons:
        rows = [f"| {key} | {reason} |" for key, reason in sorted(bad.reasons.items())]
        tally.curves.text(name, "\n".join(["| sample | reason |", "|---|---|", *rows]), tally.calls)
