"""Training batches: the plan's positions, decoded once, kept in bounded memory, read ahead."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from distpc.data.codec import SampleCodec
from distpc.data.index import ShardEntry, ShardIndex
from distpc.data.plan import LoaderState, SamplePlan, num_steps, rank_share
from distpc.data.reader import read_rows
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        x: (b, V) int64 with MISSING, or float32 with NaN where there are real columns.
        global_size: samples of the batch over all ranks.
        state: of the loader once this batch has been used.
    """

    x: torch.Tensor
    global_size: int
    state: LoaderState


class SampleCache:
    """Decoded samples, shard by shard, least recently used shards dropped first.

    A shard's slab is filled row by row as samples are asked for: a rank that uses every R-th
    sample decodes no others, and where memory holds less than the split nothing is decoded twice
    within an epoch.

    Args:
        entries: the shards.
        spec: of the samples.
        max_bytes: bound on the slabs kept; a shard larger than that is not kept at all.
    """

    def __init__(self, entries: list[ShardEntry], spec: DatasetSpec, max_bytes: int) -> None:
        self.entries = entries
        self.codec = SampleCodec(spec)
        self.num_variables = spec.num_variables
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._slabs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def take(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n, V) samples at (shard number, row) pairs."""
        x = np.empty((len(shards), self.num_variables), self.codec.dtype)
        for number in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == number)
            x[chosen] = self._rows(number, rows[chosen])
        return x

    def _rows(self, number: int, rows: np.ndarray) -> np.ndarray:
        entry = self.entries[number]
        slab = self._slab(number)
        if slab is None:
            return read_rows(entry, self.codec, rows)
        values, is_filled = slab
        missing = np.unique(rows[~is_filled[rows]])
        if len(missing):
            values[missing] = read_rows(entry, self.codec, missing)
            is_filled[missing] = True
        return values[rows]

    def _slab(self, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(N, V) values and (N,) bool which of them are there; None if too large to keep."""
        if number in self._slabs:
            self._slabs.move_to_end(number)
            return self._slabs[number]
        size = self._bytes(number)
        if size > self.max_bytes:
            return None
        while self.used_bytes + size > self.max_bytes:
            oldest, _ = self._slabs.popitem(last=False)
            self.used_bytes -= self._bytes(oldest)
        count = self.entries[number].num_samples
        slab = np.empty((count, self.num_variables), self.codec.dtype), np.zeros(count, dtype=bool)
        self._slabs[number] = slab
        self.used_bytes += size
        return slab

    def _bytes(self, number: int) -> int:
        return self.entries[number].num_samples * (
            self.num_variables * self.codec.dtype.itemsize + 1
        )


class Loader:
    """One rank's training batches, from any state on.

    Args:
        index: of the shards.
        spec: of the data set.
        split: train, as a rule.
        global_batch: samples of a batch over all ranks; every batch is full.
        mesh_rank: this rank.
        num_ranks: ranks that share each batch.
        seed: of the order of samples.
        cache_bytes: memory for decoded shards.
        state: where to go on; None: at the start.
        prefetch: batches read ahead by a thread; 0 reads when asked.

    Attributes:
        num_samples: of the split.
        state: after the last batch given out.
        seconds_waiting: time that the taker of batches spent waiting for them.

    Raises:
        DataError: the split has fewer samples than a batch, or the state is of another data set.
    """

    def __init__(
        self,
        index: ShardIndex,
        spec: DatasetSpec,
        split: str,
        *,
        global_batch: int,
        mesh_rank: int = 0,
        num_ranks: int = 1,
        seed: int,
        cache_bytes: int = 2**30,
        state: LoaderState | None = None,
        prefetch: int = 2,
    ) -> None:
        entries = index.shards(split)
        self._plan = SamplePlan([entry.num_samples for entry in entries], seed)
        self._cache = SampleCache(entries, spec, cache_bytes)
        self._global_batch = global_batch
        self._share = rank_share(global_batch, mesh_rank, num_ranks)
        self._dtype = torch.int64 if spec.is_discrete else torch.float32
        self._prefetch = prefetch
        self.num_samples = self._plan.num_samples
        self.state = state or LoaderState()
        self.seconds_waiting = 0.0
        self._check(split, num_ranks)

    def _check(self, split: str, num_ranks: int) -> None:
        if self._global_batch > self.num_samples:
            raise DataError(
                "a split has fewer samples than one batch",
                where=f"split {split}",
                found=f"{self.num_samples} samples",
                expected=f"at least {self._global_batch}, the global batch",
                fix="lower the batch size of the stage, or give more data",
            )
        if self._global_batch < num_ranks:
            raise DataError(
                "a batch has fewer samples than there are ranks",
                where=f"split {split}",
                found=f"a global batch of {self._global_batch}",
                expected=f"at least {num_ranks}",
                fix="raise the batch size of the stage or lower parallel.num_ranks",
            )
        if not 0 <= self.state.samples_consumed < self.num_samples or self.state.epoch < 0:
            raise DataError(
                "a loader state does not fit the split",
                where=f"split {split}",
                found=f"{self.state.samples_consumed} samples consumed of an epoch",
                expected=f"fewer than its {self.num_samples} samples",
                fix="resume with the data that the checkpoint was made on",
            )

    def batches(self, num_samples_total: int) -> Iterator[Batch]:
        """Yield full batches until `num_samples_total` samples have been taken in all.

        Args:
            num_samples_total: of the whole run over all ranks, counted from the very start (not
                from `state`), for example num_epochs * num_samples; rounded up to whole batches
                from where this loader stands.
        """
        start = self._plan.position_of(self.state)
        steps = max(0, num_steps(num_samples_total - start, self._global_batch))
        made = (self._make(start + step * self._global_batch) for step in range(steps))
        source = _read_ahead(made, self._prefetch) if self._prefetch else made
        try:
            while True:
                asked = time.monotonic()
                batch = next(source, None)
                self.seconds_waiting += time.monotonic() - asked
                if batch is None:
                    return
                self.state = batch.state
                yield batch
        finally:
            source.close()

    def _make(self, position: int) -> Batch:
        first, last = self._share
        x = self._cache.take(*self._plan.take(position + first, position + last))
        return Batch(
            torch.from_numpy(x).to(self._dtype),
            self._global_batch,
            self._plan.state_at(position + self._global_batch),
        )


def _read_ahead(made: Iterator[Batch], depth: int) -> Generator[Batch]:
    """The batches of `made`, computed by a thread up to `depth` ahead; its errors come through."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in made:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="distpc-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
