"""Samples out of indexed shards: whole shards, chosen rows, or a split from end to end.

Bytes of a shard are used only if they have the digest in the index: a value changed in place would
otherwise be learnt in silence. Whole shards are digested each time they are read, others once in a
process, and again if the file has been touched since.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distpc.data.codec import SampleCodec
from distpc.data.index import ShardEntry, ShardIndex
from distpc.data.plan import evaluation_ranges
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError
from distpc.parallel.stopwatch import part

_checked: set[tuple[int, int, int, str]] = set()
"""Device, inode, time of change and digest of the files that this process has digested."""


@dataclass(frozen=True)
class Shard:
    """A decoded shard.

    Attributes:
        name: for example train-000000.
        keys: of its N samples.
        x: (N, V) int16 or int32 with MISSING, or float32 with NaN where there are real columns.
    """

    name: str
    keys: list[str]
    x: np.ndarray


@part("read")
def read_shard(entry: ShardEntry, spec: DatasetSpec) -> Shard:
    """Decode a whole shard, after comparing its bytes with the index.

    Raises:
        DataError: it is missing or has changed since it was indexed.
    """
    try:
        with entry.local() as path:
            content = path.read_bytes()
    except OSError as error:
        raise _changed(entry, error) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry.sha256:
        raise _changed(entry, f"{len(content)} bytes with SHA-256 {digest}")
    table = entry.samples()
    files = [
        content[offset : offset + size]
        for offset, size in zip(table.offsets.tolist(), table.sizes.tolist(), strict=True)
    ]
    x = SampleCodec(spec).decode(files, table.keys, entry.where)
    return Shard(entry.name, table.keys, x)


def read_rows(entry: ShardEntry, codec: SampleCodec, rows: np.ndarray) -> np.ndarray:
    """(n, V) samples at the given rows of a shard, without decoding the others.

    Raises:
        DataError: the shard is missing or has changed since it was indexed.
    """
    table = entry.samples()
    try:
        with entry.local() as path:
            descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _changed(entry, error) from error
    try:
        _check_content(entry, descriptor)
        extents = zip(table.sizes[rows].tolist(), table.offsets[rows].tolist(), strict=True)
        files = [os.pread(descriptor, size, offset) for size, offset in extents]
    finally:
        os.close(descriptor)
    return codec.decode(files, [table.keys[row] for row in rows.tolist()], entry.where)


def iterate_split(
    index: ShardIndex,
    spec: DatasetSpec,
    split: str,
    batch_size: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[np.ndarray]:
    """Yield (b, V) samples of a split in order, every sample exactly once over all ranks.

    Args:
        index: of the shards.
        spec: of the data set.
        split: train, valid or test.
        batch_size: samples of a batch over all ranks; the last batch may be smaller.
        rank: whose share is wanted.
        num_ranks: ranks that share each batch. All make the same number of steps, so with several
            ranks a share of the last batch may be empty (0, V).

    Raises:
        DataError: a shard is missing or has changed since it was indexed.
    """
    codec = SampleCodec(spec)
    entries = index.shards(split)
    firsts = np.cumsum([0] + [entry.num_samples for entry in entries]).tolist()
    for start, stop in evaluation_ranges(firsts[-1], batch_size, rank, num_ranks):
        parts = [np.empty((0, spec.num_variables), codec.dtype)]
        for number in range(bisect_right(firsts, start) - 1, bisect_left(firsts, stop)):
            first, entry = firsts[number], entries[number]
            rows = np.arange(max(start - first, 0), min(stop - first, entry.num_samples))
            if len(rows):
                parts.append(read_rows(entry, codec, rows))
        yield np.concatenate(parts)


def _check_content(entry: ShardEntry, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if status.st_size != entry.bytes:
        raise _changed(entry, f"{status.st_size} bytes")
    file = (status.st_dev, status.st_ino, status.st_mtime_ns, entry.sha256)
    if file in _checked:
        return
    with os.fdopen(descriptor, "rb", closefd=False) as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != entry.sha256:
        raise _changed(entry, f"{status.st_size} bytes with SHA-256 {digest}")
    _checked.add(file)


def _changed(entry: ShardEntry, found: object) -> DataError:
    return DataError(
        "a shard is missing or has changed since it was indexed",
        where=entry.where,
        found=found,
        expected=f"{entry.bytes} bytes with SHA-256 {entry.sha256}",
        fix="remove the shards and index stages' folders and run the same command again",
    )
