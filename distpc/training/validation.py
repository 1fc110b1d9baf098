"""The validation figure: every sample once, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from distpc.data.index import ShardIndex
from distpc.data.reader import iterate_split
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
        self.batch_size = batch_size
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
                figures = tally(log_likelihood(x), x, self.spec.counted)
                # Ranks of a node axis see the same samples: one of them counts.
                totals += figures if self.mesh.node_rank == 0 else 0.0
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
        """(B, V) batches of this rank; as many on every rank, the last one may be empty."""
        ranks, rank = self.mesh.data_parallel, self.mesh.data_rank
        yield from iterate_split(
            self.index, self.spec, self.split, self.batch_size * ranks, rank, ranks
        )
