"""Distillation of hidden Markov models: with every state observed, all parameters are counts.

The state of a token is the cluster of its teacher feature; the token that ends a document has a
state of its own, the last one. Missing tokens have none. A Ray worker counts some shards, one file
a piece; the sums are the circuit.
Legend: N chunks, V steps, K states, C tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.config.distillation import DistillConfig
from distpc.data.index import ShardEntry
from distpc.data.spec import MISSING
from distpc.errors import LatentError
from distpc.parallel.stopwatch import count
from distpc.structures.chain_layout import ChainLayout
from distpc.training.assembly import mix_rows, random_emissions, random_transitions
from distpc.training.counted import add_counts_, summed
from distpc.training.pieces import Piece, PieceMaker, load_graph, make_pieces
from distpc.training.samples import LatentSource, num_states

WORKER = "distpc.training.chain:ChainWorker"

_MAX_PIECES = 16
_MAX_PIECE_BYTES = 2**30
_SECONDS_A_TOKEN = 1e-7
"""Rough, only to start the long pieces first."""


def distil_chain(ctx: StageContext) -> tuple[Circuit, dict[str, Any], LatentSource]:
    """Count all training chunks with latents and build the circuit.

    Returns:
        the circuit, notes for the stage's metadata, and the source of the latents.

    Raises:
        LatentError: latents of other chunks, or of another number of clusters than the states.
    """
    graph = load_graph(ctx)
    layout = ChainLayout.of(graph)
    source = LatentSource.of(ctx, layout.length)
    spec = source.index.spec
    if num_states(source.num_clusters, spec) != layout.num_states:
        raise LatentError(
            "the hidden Markov model was made for other latents",
            where=ctx.input("structure").path,
            found=f"{layout.num_states} states",
            expected=f"{num_states(source.num_clusters, spec)}: the clusters, and a state for the "
            "token that ends a document where there is one",
            fix="run the structure stage again",
        )
    pieces = _plan(source, layout)
    missing, workers = make_pieces(ctx, WORKER, pieces)
    counts = summed(ctx, pieces)
    circuit = Circuit(graph, spec.num_categories, seed=ctx.config.seed)
    assemble_chain_(circuit, counts, ctx.config.distill, ctx.config.seed)
    notes = {
        "num_samples": int(counts["num_samples"]),
        "states_never_used": int((counts["emission"].sum((0, 2)) == 0).sum()),
        "pieces": {piece.name: {} for piece in pieces},
        "kept_pieces": len(pieces) - len(missing),
        "workers": workers,
    }
    return circuit, notes, source


def count_chain(
    x: np.ndarray, latents: np.ndarray, size: int, num_categories: int, is_tied: bool
) -> dict[str, Tensor]:
    """Counts of chunks whose states are known.

    Args:
        x: (N, V) tokens, -1 where missing.
        latents: (N, V) states 0 .. K - 1; those of missing tokens are not used.
        size: K.
        num_categories: C.
        is_tied: whether all steps are counted together.

    Returns:
        `start` (K,) states of step 0; `transitions` (S, K, K) pairs of a step's state and the
        next one's, `emission` (S', K, C) states and their tokens, both int64, with S = S' = 1 if
        tied, else one table a step; `num_samples`.
    """
    present, z = x != MISSING, latents.astype(np.int64)
    steps = x.shape[1]
    step = np.zeros(steps, np.int64) if is_tied else np.arange(steps)
    start = np.bincount(z[present[:, 0], 0], minlength=size)
    num_pairs, num_tokens = (1, 1) if is_tied else (max(1, steps - 1), steps)
    both = present[:, 1:] & present[:, :-1]
    cells = (step[:-1] * size + z[:, :-1]) * size + z[:, 1:]
    pairs = np.bincount(cells[both], minlength=num_pairs * size * size)
    cells = (step * size + z) * num_categories + x
    tokens = np.bincount(cells[present], minlength=num_tokens * size * num_categories)
    return {
        "start": torch.from_numpy(start),
        "transitions": torch.from_numpy(pairs).view(num_pairs, size, size),
        "emission": torch.from_numpy(tokens).view(num_tokens, size, num_categories),
        "num_samples": torch.tensor([len(x)]),
    }


@torch.no_grad()
def assemble_chain_(
    circuit: Circuit, counts: dict[str, Tensor], settings: DistillConfig, seed: int
) -> None:
    """Overwrite the statistics of a hidden Markov model with counts (see `count_chain`).

    Rows are on the scale of flows: counts are divided by chunks. A share of every row is random,
    which keeps later EM able to move; rows of states that no token has are random with a small
    weight. Block-diagonal (Monarch) transitions have no counts and keep their random rows.
    """
    layout = ChainLayout.of(circuit.graph)
    generator = torch.Generator().manual_seed(seed)
    samples = int(counts["num_samples"])
    noise = settings.transition_noise
    floor = max(1.0 / samples, noise / layout.num_states)
    start = counts["start"][None].double() / samples
    circuit.statistics_of(layout.start).copy_(
        mix_rows(start, random_transitions(start, generator), noise, floor)
    )
    uses = layout.length if layout.is_tied else 1
    if all(len(between) == 1 for between in layout.transitions):
        for table, between in zip(counts["transitions"], layout.transitions, strict=False):
            rows = table.double() / samples
            random = random_transitions(rows, generator)
            circuit.statistics_of(between[0]).copy_(mix_rows(rows, random, noise, floor * uses))
    for table, region in zip(counts["emission"], layout.emissions, strict=False):
        rows = table.double()
        # One token's worth over the vocabulary, so that no token is impossible.
        histogram = rows.sum(0) + 1.0 / rows.shape[1]
        random = random_emissions(histogram, len(rows), generator)
        rows = mix_rows(rows / samples, random, settings.emission_noise, floor * uses)
        circuit.statistics_of(region).copy_(rows)
    circuit.set_smoothing(settings.pseudocount, settings.pseudocount, samples)


class ChainWorker(PieceMaker):
    """Counts some shards."""

    @cached_property
    def _layout(self) -> ChainLayout:
        return ChainLayout.of(self._graph)

    def make(self, piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece of kind counts."""
        total: dict[str, Tensor] = {}
        for name in piece.shards:
            add_counts_(total, self._count(self._entries[name]))
        return total, {}

    def _count(self, entry: ShardEntry) -> dict[str, Tensor]:
        x, latents = self._source.read(entry)
        count(tokens=x.size)
        categories = int(self._source.index.spec.num_categories[0] or 0)
        return count_chain(x, latents, self._layout.num_states, categories, self._layout.is_tied)


def _plan(source: LatentSource, layout: ChainLayout) -> list[Piece]:
    """Consecutive shards of about equally many chunks, in a bounded number of pieces."""
    shards = source.shards()
    categories = int(source.index.spec.num_categories[0] or 0)
    tables = 1 if layout.is_tied else layout.length
    size = 8 * tables * layout.num_states * (layout.num_states + categories)
    number = min(len(shards), _MAX_PIECES, max(1, _MAX_PIECE_BYTES // size))
    samples = np.array([entry.num_samples for entry in shards])
    owner = (np.cumsum(samples) - samples) * number // samples.sum()
    pieces = []
    for part in range(number):
        own = [entry for entry, one in zip(shards, owner, strict=True) if one == part]
        if own:
            cost = _SECONDS_A_TOKEN * layout.length * sum(entry.num_samples for entry in own)
            names = tuple(entry.name for entry in own)
            pieces.append(Piece(f"chain-{names[0]}", "counts", cost, shards=names))
    return sorted(pieces, key=lambda piece: -piece.cost)
