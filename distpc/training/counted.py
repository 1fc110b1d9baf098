"""Distillation of circuits all of whose latents are known: shards are counted, the sums are it.

A Ray worker counts some shards under all latents, one file a piece. Where the tables of a circuit
are too large for that, a piece is some of the tables, counted over all shards: a worker never holds
more than two sets of tables of `MAX_COUNT_BYTES`, of a shard and of all that it has counted.
Legend: N samples, V variables, K states, C categories.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.data.index import ShardEntry
from distpc.parallel.stopwatch import count
from distpc.structures.region_graph import RegionGraph
from distpc.training.counting import assemble_counted_, count_tables, table_names
from distpc.training.pieces import (
    COUNT_COST,
    MAX_COUNT_BYTES,
    Piece,
    PieceMaker,
    load_graph,
    make_pieces,
    shard_pieces,
)
from distpc.training.samples import LatentSource

WORKER = "distpc.training.counted:CountWorker"


def distil_tree(ctx: StageContext) -> tuple[Circuit, dict[str, Any], LatentSource]:
    """Count all training samples with latents under a hidden Chow-Liu tree, and build the circuit.

    Returns:
        the circuit, notes for the stage's metadata, and the source of the latents.

    Raises:
        LatentError: latents of other samples, of another grid, or of other clusters than states.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    graph = load_graph(ctx)
    source = LatentSource.of(ctx, graph.num_latents)
    sizes = {region.num_units for region in graph.regions if region.latent is not None}
    source.check_values(sizes, ctx.input("structure").path)
    circuit, tables, notes = distil_counted(ctx, graph, source, WORKER)
    inputs = {n for i, n in table_names(graph).items() if graph.regions[i].kind == "input"}
    empty = (int((tables[name].sum(-1) == 0).sum()) for name in inputs)
    return circuit, {**notes, "states_never_used": sum(empty)}, source


def distil_counted(
    ctx: StageContext, graph: RegionGraph, source: LatentSource, worker: str
) -> tuple[Circuit, dict[str, Tensor], dict[str, Any]]:
    """Let workers count all shards, and build the circuit of the sums.

    Args:
        graph: all of whose latents are known to the worker.
        source: of the shards.
        worker: `module:Class` of what makes pieces of `count_pieces`.

    Returns:
        the circuit, the counts of `count_tables` over all samples, and notes for the metadata.

    Raises:
        LatentError: latents of other samples than the data.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    spec = source.index.spec
    pieces = count_pieces(graph, source)
    missing, workers = make_pieces(ctx, worker, pieces)
    tables = summed(ctx, pieces)
    samples = int(tables.pop("num_samples"))
    circuit = Circuit(
        graph,
        spec.num_categories,
        seed=ctx.config.seed,
        max_fold_bytes=ctx.config.structure.max_fold_bytes,
    )
    assemble_counted_(circuit, tables, samples, ctx.config.distill, ctx.config.seed)
    notes = {
        "num_samples": samples,
        "pieces": {piece.name: {} for piece in pieces},
        "kept_pieces": len(pieces) - len(missing),
        "workers": workers,
    }
    return circuit, tables, notes


def count_pieces(graph: RegionGraph, source: LatentSource) -> list[Piece]:
    """Pieces of some shards each, or of some tables each where all of them are too large."""
    parts = table_parts(graph, source.index.spec.num_categories)
    if len(parts) == 1:
        return shard_pieces(source, parts[0][1])
    shards = source.shards()
    names = tuple(entry.name for entry in shards)
    values = source.index.spec.num_variables * sum(entry.num_samples for entry in shards)
    cost = COUNT_COST * values / len(parts)
    return [
        Piece(f"tables-{part:04d}", "counts", cost, shards=names, group=part)
        for part in range(len(parts))
    ]


def table_parts(
    graph: RegionGraph, num_categories: Sequence[int | None], most_bytes: int = MAX_COUNT_BYTES
) -> list[tuple[list[str], int]]:
    """Names of tables that are counted together, and the bytes of their counts.

    Args:
        graph: of the circuit.
        num_categories: C of every variable.
        most_bytes: of one part, unless it is a single table.
    """
    sizes: dict[str, int] = {}
    for index, name in table_names(graph).items():
        region = graph.regions[index]
        if region.variable is not None:
            width = num_categories[region.variable] or 0
        else:
            width = graph.fan_in(index)
        sizes[name] = 8 * region.num_units * width
    parts: list[tuple[list[str], int]] = [([], 0)]
    for name, size in sizes.items():
        names, total = parts[-1]
        if names and total + size > most_bytes:
            names, total = [], 0
            parts.append((names, total))
        names.append(name)
        parts[-1] = names, total + size
    return parts


def count_shards(
    graph: RegionGraph,
    source: LatentSource,
    entries: Sequence[ShardEntry],
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Counts of `count_tables` over shards, and how many samples they are as `num_samples`.

    Args:
        graph: of the circuit.
        source: of values and of the latents of all levels.
        entries: shards to count.
        names: of the tables to count; default: all.
    """
    categories = source.index.spec.num_categories
    total: dict[str, Tensor] = {}
    samples = 0
    for entry in entries:
        x, latents = source.read(entry)
        samples += len(x)
        count(patches=len(x) * source.num_patches)
        add_counts_(total, count_tables(graph, categories, x, latents, names))
    return {**total, "num_samples": torch.tensor([samples])}


def add_counts_(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add counts to those so far; the first ones are kept as they are, and written over later."""
    for name, table in more.items():
        if name in total:
            total[name] += table
        else:
            total[name] = table


def summed(ctx: StageContext, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The sum of all finished pieces, by name.

    Raises:
        LatentError: a piece is absent, cut, or of another fingerprint.
    """
    total: dict[str, Tensor] = {}
    for piece in pieces:
        for name, table in piece.load(ctx)[0].items():
            # Not in place: what was read is mapped from its file.
            total[name] = total[name] + table if name in total else table
    return total


class CountWorker(PieceMaker):
    """Counts shards, or some tables of all shards, under latents that are all in their files."""

    def make(self, piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece of kind counts."""
        return self.count(piece, self._source), {}

    def count(self, piece: Piece, source: LatentSource) -> dict[str, Tensor]:
        """The counts of a piece; those of other tables than the first part's have no
        `num_samples`, since they are of the same samples."""
        entries = [self._entries[name] for name in piece.shards]
        if piece.group < 0:
            return count_shards(self._graph, source, entries)
        parts = table_parts(self._graph, source.index.spec.num_categories)
        found = count_shards(self._graph, source, entries, parts[piece.group][0])
        if piece.group > 0:
            del found["num_samples"]
        return found
