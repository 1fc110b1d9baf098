"""The few best rows of many shards, found in a tree: what each shard offers is merged in pairs.

Keys decide, then the shard, then the row: a total order, so that pairs may be merged in any order.
Legend: n entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Entries:
    """Rows of shards, the best (least key) first.

    Attributes:
        keys: (n,) float64.
        shards: (n,) int32 positions of the shards.
        rows: (n,) int64 rows in them.
        limit: how many are kept when two are merged.
    """

    keys: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    limit: int

    @classmethod
    def of(cls, shard: int, keys: np.ndarray, rows: np.ndarray, limit: int) -> Entries:
        """The best of one shard."""
        order = np.lexsort((rows, keys))[:limit]
        numbers = np.full(len(order), shard, dtype=np.int32)
        return cls(keys[order].astype(np.float64), numbers, rows[order].astype(np.int64), limit)

    @classmethod
    def at(cls, places: np.ndarray, sizes: Sequence[int]) -> Entries:
        """Rows at (n,) places of all shards' rows one after the other."""
        ends = np.cumsum(sizes)
        shards = np.searchsorted(ends, places, side="right").astype(np.int32)
        rows = places - (ends - sizes)[shards]
        return cls(np.zeros(len(places)), shards, rows, len(places))

    def __add__(self, other: Entries) -> Entries:
        keys = np.concatenate([self.keys, other.keys])
        shards = np.concatenate([self.shards, other.shards])
        rows = np.concatenate([self.rows, other.rows])
        order = np.lexsort((rows, shards, keys))[: self.limit]
        return Entries(keys[order], shards[order], rows[order], self.limit)
