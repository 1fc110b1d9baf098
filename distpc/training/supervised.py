"""Distillation of patch circuits whose latents are supervised at every level: all of it is counts.

The codebook of the latents inside of patches is one piece of work; the counts of some shards under
all latents are the others. A piece is one file, whole or absent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.data.patches import PatchGrid
from distpc.structures.patch_layout import PatchLayout
from distpc.structures.region_graph import RegionGraph
from distpc.training.counted import CountWorker, distil_counted
from distpc.training.inner import InnerCodebook, InnerSource, Surroundings
from distpc.training.pieces import PatchPieceMaker, Piece, make_pieces
from distpc.training.samples import LatentSource

WORKER = "distpc.training.supervised:SupervisedWorker"
CODEBOOK = Piece("codebook", "codebook", 0.0)

CODEBOOK_PATCHES = 40_000
"""Patches that the codebook of the latents inside of patches is fitted to, over all shards."""


def distil_supervised(
    ctx: StageContext, graph: RegionGraph, layout: PatchLayout, source: LatentSource
) -> tuple[Circuit, dict[str, Any], LatentSource]:
    """Fit the inner codebook, count all training samples with latents, and build the circuit.

    Returns:
        the circuit, notes for the stage's metadata, and the source of the latents of all levels.

    Raises:
        LatentError: latents of other samples than the data.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    kept = CODEBOOK.is_finished(ctx)
    make_pieces(ctx, WORKER, [CODEBOOK])
    circuit, tables, notes = distil_counted(ctx, graph, source, WORKER)
    notes["pieces"] = {CODEBOOK.name: {}, **notes["pieces"]}
    notes["kept_pieces"] += kept
    notes["states_never_used"] = _never_used(layout, tables)
    return circuit, notes, InnerSource.around(source, layout, read_codebook(ctx, layout))


def surroundings(ctx: StageContext, source: LatentSource) -> Surroundings:
    """What the configured codebook clusters."""
    grid = PatchGrid.of(source.index.spec, ctx.config.data.patch_size_pixels)
    settings = ctx.config.distill
    return Surroundings(grid.size, grid.channels, settings.inner_pixel, settings.inner_near)


def read_codebook(ctx: StageContext, layout: PatchLayout) -> InnerCodebook:
    """The codebook that a worker fitted.

    Raises:
        LatentError: absent, cut, or of another fingerprint.
    """
    assert layout.leaf is not None
    tensors, _ = CODEBOOK.load(ctx)
    source = LatentSource.of(ctx, layout.num_patches)
    return InnerCodebook(
        surroundings(ctx, source), layout.leaf.tables, tensors["centroids"].clone()
    )


class SupervisedWorker(PatchPieceMaker, CountWorker):
    """Fits the codebook of latents inside of patches, and counts under latents of all levels."""

    def make(self, piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece of kind codebook or counts."""
        if piece.kind == "codebook":
            return {"centroids": self._fit_codebook()}, {}
        codebook = read_codebook(self._ctx, self._layout)
        return self.count(piece, InnerSource.around(self._source, self._layout, codebook)), {}

    def _fit_codebook(self) -> Tensor:
        """(T, K, F) centroids, of patches that are drawn from every shard."""
        leaf = self._layout.leaf
        assert leaf is not None
        rng = np.random.default_rng(self._ctx.config.seed)
        share = -(-CODEBOOK_PATCHES // len(self._entries))
        drawn = []
        for entry in self._entries.values():
            x, _ = self._source.read(entry)
            patches = x[:, self._layout.variables].reshape(-1, self._layout.variables_per_patch)
            drawn.append(patches[rng.permutation(len(patches))[:share]])
        codebook = InnerCodebook.fit(
            np.concatenate(drawn),
            surroundings(self._ctx, self._source),
            leaf.tables,
            leaf.num_states,
            self._ctx.config.seed,
        )
        return codebook.centroids


def _never_used(layout: PatchLayout, tables: dict[str, Tensor]) -> int:
    """Patch values that no sample has: rows of the heads that stayed empty."""
    heads = [tables[f"leaf/{group}/heads"].sum(-1) for group in range(len(layout.groups))]
    return int((torch.cat(heads) == 0).sum())
