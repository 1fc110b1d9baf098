"""The validation figure: every sample once, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from distpc.data.index import ShardIndex
from distpc.data.plan import evaluation_ranges
from distpc.data.reader import read_shard
from distpc.data.spec import MISSING, DatasetSpec
from distpc.parallel.collectives import sum_across
from distpc.parallel.mesh import Mesh
from distpc.training.figures import Figures, tally

NUM_EXAMPLES = 16


class Validation:
    """Evaluates one split with all ranks.

    Args:
        index: of the shards.
        spec: of the data.
        split: name of the split.
        mesh: this process among the ranks.
        batch_size: samples of a rank at once.
        cache_bytes: the split stays in memory if this rank's share takes no more than this.
    """

    def __init__(
        self,
        index: ShardIndex,
        spec: DatasetSpec,
        split: str,
        mesh: Mesh,
        *,
        batch_size: int,
        cache_bytes: int,
    ) -> None:
        self.index = index
        self.spec = spec
        self.split = split
        self.mesh = mesh
        self.cache_bytes = cache_bytes
        self.ranges = evaluation_ranges(
            index.num_samples(split), batch_size * mesh.world_size, mesh.rank, mesh.world_size
        )
        self._cache: list[np.ndarray] | None = None

    @torch.no_grad()
    def evaluate(self, log_likelihood: Callable[[Tensor], Tensor]) -> Figures:
        """Sums over the whole split, equal on every rank; a collective.

        Args:
            log_likelihood: (B, V) -> (B,) nats; called equally often on every rank, because under
                ZeRO-3 its passes are collectives themselves.
        """
        totals = torch.zeros(len(Figures.NAMES), dtype=torch.float64, device=self.mesh.device)
        for values in self._batches():
            x = torch.from_numpy(values)
            x = (x if x.is_floating_point() else x.long()).to(self.mesh.device)
            if len(x):
                totals += tally(log_likelihood(x), x)
            else:
                missing = float("nan") if x.is_floating_point() else MISSING
                log_likelihood(x.new_full((1, x.shape[1]), missing))
        return Figures.of(sum_across(totals, self.mesh))

    def examples(self) -> np.ndarray:
        """(n, V) the first samples of this rank's share, for pictures."""
        return next(self._batches())[:NUM_EXAMPLES]

    def _batches(self) -> Iterator[np.ndarray]:
        if self._cache is not None:
            yield from self._cache
            return
        kept: list[np.ndarray] | None = []
        for values in self._read():
            if kept is not None:
                kept.append(values)
                if sum(batch.nbytes for batch in kept) > self.cache_bytes:
                    kept = None
            yield values
        self._cache = kept

    def _read(self) -> Iterator[np.ndarray]:
        """(B, V) batches of this rank's ranges; shards are decoded as they are needed."""
        shards = self.index.shards(self.split)
        stops = np.cumsum([shard.num_samples for shard in shards])
        decoded: dict[int, np.ndarray] = {}
        for start, stop in self.ranges:
            first = int(np.searchsorted(stops, start, side="right"))
            parts = []
            for number in range(first, len(shards)):
                offset = int(stops[number]) - shards[number].num_samples
                if offset >= stop and parts:
                    break
                if number not in decoded:
                    decoded = {n: x for n, x in decoded.items() if n >= first}
                    decoded[number] = read_shard(self.index, shards[number], self.spec).x
                parts.append(decoded[number][max(0, start - offset) : max(0, stop - offset)])
                if int(stops[number]) >= stop:
                    break
            yield np.concatenate(parts) if parts else decoded[len(shards) - 1][:0]
