"""Who reads which sample when: pure arithmetic over the shards' sizes.

Training reads one endless stream of samples: epoch after epoch, each a seeded order of the whole
split. Global batch b takes G consecutive positions of the stream and each rank a contiguous share
of them, so every rank makes the same number of steps, batches are always full (they straddle the
ends of epochs), and the state is a position: any number of ranks can go on from it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WINDOW_SHARDS = 16
"""Shards whose samples are shuffled together; bounds how far apart a batch's reads lie."""


@dataclass(frozen=True)
class LoaderState:
    """Where a training run is in its stream of samples; says nothing of ranks or batches.

    Attributes:
        epoch: whole passes made over the split.
        samples_consumed: samples taken of the current pass, always fewer than the split has.
    """

    epoch: int = 0
    samples_consumed: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain JSON values."""
        return {"epoch": self.epoch, "samples_consumed": self.samples_consumed}

    @classmethod
    def from_json(cls, value: dict[str, int]) -> LoaderState:
        """The inverse of `to_json`."""
        return cls(int(value["epoch"]), int(value["samples_consumed"]))


def seeded_permutation(count: int, *seed: int) -> np.ndarray:
    """(count,) int64: a random order of 0 .. count - 1 fixed by `seed` (non-negative integers).

    Sorts raw PCG64 output, a stream that numpy promises never to change; of its ready-made
    permutations it does not promise that.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(keys, kind="stable")


def rank_share(count: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """(start, stop) of a rank's contiguous share of `count` items; the first ranks get one more."""
    each, extra = divmod(count, num_ranks)
    start = rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def num_steps(num_samples_total: int, global_batch: int) -> int:
    """Full batches that cover `num_samples_total` positions of the stream."""
    return -(-num_samples_total // global_batch)


def evaluation_ranges(
    num_samples: int, batch_size: int, rank: int = 0, num_ranks: int = 1
) -> list[tuple[int, int]]:
    """A rank's (start, stop) of every evaluation batch, in order.

    Over all ranks each sample occurs exactly once. Every rank gets the same number of ranges (they
    meet in collectives), so in the last batch some may be empty.
    """
    ranges = []
    for first in range(0, num_samples, batch_size):
        start, stop = rank_share(min(batch_size, num_samples - first), rank, num_ranks)
        ranges.append((first + start, first + stop))
    return ranges


class SamplePlan:
    """The order of the stream: shards permuted, then samples within windows of shards.

    Args:
        shard_sizes: samples of every shard of the split.
        seed: fixes the order of every epoch.
        window_shards: shards shuffled together.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, window_shards: int = WINDOW_SHARDS
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.seed = seed
        self.window_shards = window_shards
        # A batch touches one window, two where it straddles their border.
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._window = lru_cache(maxsize=2)(self._shuffle_window)

    def position_of(self, state: LoaderState) -> int:
        """Position in the endless stream."""
        return state.epoch * self.num_samples + state.samples_consumed

    def state_at(self, position: int) -> LoaderState:
        """The inverse of `position_of`; the end of an epoch is the start of the next."""
        return LoaderState(*divmod(position, self.num_samples))

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row within it, each (stop - start,) int64, of stream positions."""
        shards, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            epoch, within = divmod(start, self.num_samples)
            firsts = self._epoch(epoch)[1]
            window = bisect_right(firsts, within) - 1
            window_shards, window_rows = self._window(epoch, window)
            offset = within - firsts[window]
            count = min(stop - start, len(window_rows) - offset)
            shards.append(window_shards[offset : offset + count])
            rows.append(window_rows[offset : offset + count])
            start += count
        return np.concatenate(shards), np.concatenate(rows)

    def _lay_out_epoch(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        order = seeded_permutation(len(self.shard_sizes), self.seed, epoch)
        order = order[self.shard_sizes[order] > 0]
        windows = [
            order[first : first + self.window_shards]
            for first in range(0, len(order), self.window_shards)
        ]
        sizes = [int(self.shard_sizes[window].sum()) for window in windows]
        return windows, np.cumsum([0, *sizes[:-1]]).tolist()

    def _shuffle_window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        members = self._epoch(epoch)[0][number]
        sizes = self.shard_sizes[members]
        shards = np.repeat(members, sizes)
        rows = np.concatenate([np.arange(size) for size in sizes])
        order = seeded_permutation(len(rows), self.seed, epoch, number + 1)
        return shards[order], rows[order]
