"""Codebooks of single positions: a Ray worker fits those of some positions, and asks nobody.

The features of one position are few, whatever there are of all: asking other workers about them,
question by question, takes many times as long as the answers. What comes out is the same.
Legend: N samples, Z positions of a sample, D feature width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distpc.artifacts.stage import StageContext
from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents.holder import FeatureHolder, ShardFacts, View
from distpc.latents.kmeans import grid_bits
from distpc.latents.lloyd import Lloyd
from distpc.latents.questions import Holders
from distpc.latents.state import FitState

WORKER = "distpc.latents.positions:PositionFitter"

_BLOCK_BYTES = 2**26
"""Features that a worker copies into its memory at once."""
_BLOCKS_PER_WORKER = 8
"""At least, to share them out evenly, and to see that it goes on."""

Positions = tuple[int, int]
"""The first, and the one behind the last."""


def num_positions(facts: Sequence[ShardFacts], where: Path) -> int:
    """Z, of shards that `facts` are of.

    Raises:
        LatentError: shards differ in it, or no sample has a feature at some position.
    """
    found = {fact.positions for fact in facts}
    if len(found) != 1:
        raise LatentError(
            "shards have features of different numbers of positions",
            where=where,
            found=sorted(found),
            expected="one number of latents a sample, where latents.codebook is per_position",
        )
    empty = np.flatnonzero(np.sum([fact.at_positions for fact in facts], axis=0) == 0)
    if len(empty):
        raise LatentError(
            "a position has no features, and so no codebook",
            where=where,
            found=f"no sample reaches position {empty[0]}",
            expected="a feature of every position, where latents.codebook is per_position",
            fix="set latents.codebook=shared, or a data.source.chunk_length_tokens that documents "
            "reach",
        )
    return found.pop()


def blocks(facts: Sequence[ShardFacts], width: int, num_workers: int) -> list[Positions]:
    """Neighbouring positions that one worker fits behind each other.

    Args:
        facts: of all shards.
        width: D of what is clustered.
        num_workers: that there are.
    """
    total = facts[0].positions
    of_position = 2 * width * sum(fact.samples for fact in facts)
    size = min(_BLOCK_BYTES // max(1, of_position), total // (_BLOCKS_PER_WORKER * num_workers))
    number = math.ceil(total / max(1, size))
    ends = [total * block // number for block in range(number + 1)]
    return list(itertools.pairwise(ends))


def clustering(
    holders: Holders,
    views: Sequence[View],
    facts: Sequence[ShardFacts],
    config: LatentsConfig,
    seed: int,
    position: int | None = None,
) -> Lloyd:
    """The clustering of `views`, all of one position or of all.

    Args:
        holders: who answer for the views.
        facts: of their shards, whole.
        config: of the clustering.
        seed: of the run.
        position: theirs in a sample, by whatever number the views call it; None for all.
    """
    sizes = [fact.size(position) for fact in facts]
    bits = grid_bits(sum(sizes), max(fact.largest for fact in facts))
    return Lloyd(holders, views, sizes, bits, config, seed + (position or 0))


def checkpoint(out: Path, position: int) -> Path:
    """Where a position's finished fit is kept until all are."""
    return out / f"checkpoint-{position:04d}.safetensors"


class PositionFitter:
    """Fits codebooks of some positions and writes their states; lives in a process of its own.

    Args:
        context: the stage's context as JSON.
        holder: keyword arguments of `FeatureHolder`.
        facts: of all shards.
        names: of the shards.
    """

    def __init__(
        self,
        context: dict[str, Any],
        holder: dict[str, Any],
        facts: Sequence[ShardFacts],
        names: Sequence[str],
    ) -> None:
        self._ctx = StageContext.from_json(context)
        self._holder = holder
        self._facts = facts
        self._names = names

    def __call__(self, positions: Positions) -> None:
        """Finish the fits of these positions; those of a killed attempt are kept."""
        config = self._ctx.config
        left = [p for p in range(*positions) if not self._is_finished(p)]
        if not left:
            return
        # All that is asked about is here, in memory.
        holder = FeatureHolder(**self._holder, positions=positions)

        def ask(method: str, items: Sequence[Any]) -> list[Any]:
            return [getattr(holder, method)(item) for item in items]

        holders = Holders(ask, ask, num_groups=1)
        for position in left:
            views = [View(name, position - positions[0]) for name in self._names]
            job = clustering(holders, views, self._facts, config.latents, config.seed, position)
            state = job.run(FitState())
            state.save(checkpoint(self._ctx.out, position), self._ctx.fingerprint)

    def _is_finished(self, position: int) -> bool:
        path = checkpoint(self._ctx.out, position)
        state = FitState.load(path, self._ctx.fingerprint)
        return state.restart >= self._ctx.config.latents.num_restarts
