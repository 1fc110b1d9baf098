"""Pieces of distillation that share nothing, and the worker that makes one at a time.

With every patch latent observed a patch circuit falls apart: the tree over latents is pair counts;
product leaves are counts of values under each latent; every group of hidden Chow-Liu leaves is a
small circuit of its own. A piece is one file, whole or absent.
Legend: N samples, Z patches, K clusters, D variables of a patch, C categories.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.files import read_json
from distpc.artifacts.stage import StageContext
from distpc.errors import LatentError
from distpc.latents.store import read_tensors, write_tensors
from distpc.parallel.cluster import Cluster
from distpc.parallel.stopwatch import count
from distpc.parallel.tally import Tally
from distpc.structures.patch_layout import PatchLayout
from distpc.structures.region_graph import RegionGraph
from distpc.training.leaf import train_group
from distpc.training.samples import LatentSource
from distpc.training.structure import GRAPH

WORKER = "distpc.training.pieces:PieceWorker"

MAX_COUNT_BYTES = 2**30
"""Of the counts that all pieces of shards hold together, and of one piece of tables."""
COUNT_COST = 1e-7
"""Rough seconds a value, only to start the long pieces first."""
_MAX_COUNT_PIECES = 16
_LEAF_COST = 1e-8


@dataclass(frozen=True)
class Piece:
    """One unit of work.

    Attributes:
        name: of its file.
        kind: `top` (pair counts of latents), `counts` (under latents in some shards),
            `leaf` (one group of hidden Chow-Liu leaves), `codebook` (of latents inside leaves),
            `cluster` (a leaf circuit that grows) or `soft` (likelihoods under all leaf circuits).
        cost: rough seconds.
        shards: names of the shards to count (kinds counts, soft).
        group: number of the group (kind leaf), of the cluster (kind cluster), or of the part of the
            tables (kind counts; -1: all of them).
    """

    name: str
    kind: Literal["top", "counts", "leaf", "codebook", "cluster", "soft"]
    cost: float
    shards: tuple[str, ...] = ()
    group: int = -1

    def path(self, out: Path) -> Path:
        """Its file in the stage's folder."""
        return out / "pieces" / f"{self.name}.safetensors"

    def load(self, ctx: StageContext) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and notes of the finished piece.

        Raises:
            LatentError: absent, cut, or of another fingerprint.
        """
        return read_tensors(self.path(ctx.out), self.name, ctx.fingerprint)

    def is_finished(self, ctx: StageContext) -> bool:
        """Whether an interrupted attempt of this very stage left the whole piece."""
        try:
            self.load(ctx)
        except LatentError:
            return False
        return True


def load_graph(ctx: StageContext) -> RegionGraph:
    """The region graph that the structure stage wrote."""
    return RegionGraph.from_json(read_json(ctx.input("structure").path / GRAPH))


def plan_pieces(ctx: StageContext, layout: PatchLayout, source: LatentSource) -> list[Piece]:
    """All pieces, the longest first; the same ones for every number of workers.

    Raises:
        LatentError: latents of some shard do not belong to its data; found before any work.
    """
    shards = source.shards()
    usage = np.zeros(layout.num_clusters, dtype=np.int64)
    for entry in shards:
        usage += np.bincount(source.latents(entry).ravel(), minlength=len(usage))
    pieces = [Piece("top", "top", COUNT_COST * int(usage.sum()))]
    if layout.leaf is None:
        pieces += _count_pieces(layout, source)
    else:
        weights = layout.variables_per_patch * layout.leaf.num_states**2
        visit = _LEAF_COST * ctx.config.distill.leaf_epochs * weights
        for group, clusters in enumerate(layout.groups):
            cost = visit * int(usage[clusters.start : clusters.stop].sum())
            pieces.append(Piece(f"leaf-{group}", "leaf", cost, group=group))
    return sorted(pieces, key=lambda piece: -piece.cost)


def _count_pieces(layout: PatchLayout, source: LatentSource) -> list[Piece]:
    categories = patch_categories(layout, source.index.spec.num_categories)
    return shard_pieces(source, 8 * layout.num_clusters * sum(categories))


def shard_pieces(source: LatentSource, table_bytes: int) -> list[Piece]:
    """Consecutive shards of about equally many samples to count, in a bounded number of pieces.

    Args:
        source: of the shards.
        table_bytes: that the counts of one piece take.
    """
    shards = source.shards()
    number = min(len(shards), _MAX_COUNT_PIECES, max(1, MAX_COUNT_BYTES // table_bytes))
    sizes = np.array([entry.num_samples for entry in shards])
    owner = (np.cumsum(sizes) - sizes) * number // sizes.sum()
    pieces = []
    for piece in range(number):
        own = [entry for entry, part in zip(shards, owner, strict=True) if part == piece]
        if own:
            samples = sum(entry.num_samples for entry in own)
            names = tuple(entry.name for entry in own)
            cost = COUNT_COST * samples * source.index.spec.num_variables
            name = f"counts-{names[0]}" + (f"-to-{names[-1]}" if len(names) > 1 else "")
            pieces.append(Piece(name, "counts", cost, shards=names))
    return pieces


def patch_categories(layout: PatchLayout, num_categories: Sequence[int | None]) -> list[int]:
    """Categories of the D variables of a patch, the same in all patches."""
    table = np.array([count or 0 for count in num_categories])[layout.variables]
    if not (table == table[0]).all() or not table.all():
        raise ValueError("patches whose variables differ in their categories share no leaves")
    return [int(count) for count in table[0]]


class PieceMaker(ABC):
    """Makes pieces of a stage and writes their files; lives in a process of its own.

    Args:
        context: the stage's context as JSON.
    """

    def __init__(self, context: dict[str, Any]) -> None:
        self._ctx = StageContext.from_json(context)
        self._graph = load_graph(self._ctx)
        self._source = LatentSource.of(self._ctx, self._num_latents())
        self._entries = {entry.name: entry for entry in self._source.shards()}

    def _num_latents(self) -> int:
        """Latents that a sample has in the assign stage's files: all of the graph's."""
        return self._graph.num_latents

    def __call__(self, item: dict[str, Any]) -> None:
        """Make the piece that `describe` described."""
        piece = Piece(**{**item, "shards": tuple(item["shards"])})
        began = time.monotonic()
        tensors, notes = self.make(piece)
        seconds = time.monotonic() - began
        notes.update(fingerprint=self._ctx.fingerprint, holds=piece.name, seconds=f"{seconds:.3f}")
        write_tensors(piece.path(self._ctx.out), tensors, notes)
        count(pieces=1)

    @abstractmethod
    def make(self, piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of a piece's file, and notes beside them."""


class PatchPieceMaker(PieceMaker):
    """Makes pieces of a patch circuit, whose patches have latents."""

    @cached_property
    def _layout(self) -> PatchLayout:
        return PatchLayout.of(self._graph)

    def _num_latents(self) -> int:
        return self._layout.num_patches


class PieceWorker(PatchPieceMaker):
    """Counts the tree over latents and values under them, and trains groups of leaves."""

    def make(self, piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece of kind top, counts or leaf."""
        if piece.kind == "top":
            return self._count_top(), {}
        if piece.kind == "counts":
            return self._count_values(piece.shards), {}
        return train_group(self._ctx, self._layout, self._source, piece.group)

    def _count_top(self) -> dict[str, Tensor]:
        """`usage` (Z, K), and `transitions` (Z, K, K): pairs of a parent's and a patch's value."""
        size = self._layout.num_clusters
        latents = np.concatenate([self._source.latents(entry) for entry in self._entries.values()])
        count(patches=latents.size)
        columns = np.ascontiguousarray(latents.T)
        usage = np.stack([np.bincount(column, minlength=size) for column in columns])
        transitions = np.zeros((len(columns), size, size), dtype=np.int32)
        for parent, child in self._layout.tree.edges().tolist():
            cells = columns[parent].astype(np.int64) * size + columns[child]
            transitions[child] = np.bincount(cells, minlength=size * size).reshape(size, size)
        return {
            "usage": torch.from_numpy(usage),
            "transitions": torch.from_numpy(transitions),
            "num_samples": torch.tensor([len(latents)]),
        }

    def _count_values(self, shards: Sequence[str]) -> dict[str, Tensor]:
        """For every variable d of a patch `leaf/d` (K, C): how often value c came with latent k."""
        categories = patch_categories(self._layout, self._source.index.spec.num_categories)
        size = self._layout.num_clusters
        tables = [np.zeros(size * count, dtype=np.int64) for count in categories]
        for name in shards:
            x, latents = self._source.read(self._entries[name])
            count(patches=latents.size)
            for d, table in enumerate(tables):
                values = x[:, self._layout.variables[:, d]]
                known = values >= 0
                cells = latents[known].astype(np.int64) * categories[d] + values[known]
                table += np.bincount(cells, minlength=len(table))
        return {
            f"leaf/{d}": torch.from_numpy(table.reshape(size, -1)) for d, table in enumerate(tables)
        }


def make_pieces(
    ctx: StageContext, worker: str, pieces: Sequence[Piece]
) -> tuple[list[Piece], dict[str, Any]]:
    """Let workers make the pieces that an interrupted attempt has not left.

    Args:
        worker: `module:Class` of what makes a piece that `describe` described.

    Returns:
        the pieces that were made, and where the time went; see `Tally.to_json`.

    Raises:
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    missing = [piece for piece in pieces if not piece.is_finished(ctx)]
    tally = Tally("distill", ctx.tensorboard / "distill")
    if missing:
        kwargs, items = {"context": ctx.to_json()}, list(map(describe, missing))
        with Cluster.connect(ctx.config.parallel) as cluster, tally:
            for _ in cluster.map(worker, kwargs, items, label="distill", tally=tally):
                pass
    return missing, tally.to_json()


def describe(piece: Piece) -> dict[str, Any]:
    """The piece as plain values, for a worker."""
    return asdict(piece)
