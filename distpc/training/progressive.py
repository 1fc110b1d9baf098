"""Distillation by progressive growing: leaf circuits, soft likelihoods, the top level, the whole.

Global clusters share nothing: each is a job of its own on Ray, the one with the most patches first,
and goes on after its last finished round. What they make is put under a top level over all of their
heads; fine-tuning then trains leaves and top together, on whole images.
Legend: N samples, Z patches, K heads of all leaf circuits together.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.circuits.io import load_model
from distpc.parallel.event_files import Curves
from distpc.parallel.progress import Progress
from distpc.structures.patch_layout import PatchLayout
from distpc.training.cluster_jobs import (
    WORKER,
    cluster_piece,
    leaf_folder,
    soft_piece,
    soft_shards,
)
from distpc.training.composition import compose
from distpc.training.pieces import Piece, make_pieces
from distpc.training.samples import LatentSource
from distpc.training.soft_top import counted_top, fit_top


def distil_progressive(
    ctx: StageContext, layout: PatchLayout, source: LatentSource
) -> tuple[Circuit, dict[str, Any], LatentSource]:
    """Grow the leaf circuits of all global clusters and put the patch circuit together.

    Returns:
        the circuit, notes for the stage's metadata, and the source of the latents.

    Raises:
        LatentError: latents or features of other samples than the data.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    usage = _usage(layout, source)
    pieces = [cluster_piece(ctx, layout, cluster, number) for cluster, number in usage.items()]
    pieces.sort(key=lambda piece: -piece.cost)
    kept = sum(piece.is_finished(ctx) for piece in pieces)
    _, workers = make_pieces(ctx, WORKER, pieces)
    leaves = [load_model(leaf_folder(ctx, cluster)) for cluster in usage]
    rounds = {
        cluster: leaf.training_facts["rounds"] for cluster, leaf in zip(usage, leaves, strict=True)
    }
    soft = [soft_piece(entry) for entry in soft_shards(ctx, source)]
    kept += sum(piece.is_finished(ctx) for piece in soft)
    make_pieces(ctx, WORKER, soft)
    shares = torch.cat(
        [
            number * leaf.weights_of(leaf.graph.root)[0]
            for number, leaf in zip(usage.values(), leaves, strict=True)
        ]
    )
    top, curve = _train_top(ctx, layout, soft, shares / shares.sum())
    _draw(ctx, rounds)
    circuit = compose(
        layout.variables,
        layout.tree,
        leaves,
        top,
        source.index.spec.num_categories,
        ctx.config.structure.max_fold_bytes,
    )
    facts = {
        "num_samples": sum(len(source.latents(entry)) for entry in source.shards()),
        "states_never_used": layout.num_clusters - len(usage),
        "num_heads": len(shares),
        "clusters": {
            str(cluster): {"patches": usage[cluster], "rounds": rounds[cluster]}
            for cluster in usage
        },
        "top_nats_by_epoch": curve,
        "pieces": {piece.name: {} for piece in [*pieces, *soft]},
        "kept_pieces": kept,
        "workers": workers,
    }
    return circuit, facts, source


def _usage(layout: PatchLayout, source: LatentSource) -> dict[int, int]:
    """How many patches each global cluster has, those without left out.

    Raises:
        LatentError: latents of some shard do not belong to its data; found before any work.
    """
    usage = np.zeros(layout.num_clusters, dtype=np.int64)
    for entry in source.shards():
        usage += np.bincount(source.latents(entry).ravel(), minlength=len(usage))
    return {int(cluster): int(usage[cluster]) for cluster in np.flatnonzero(usage)}


def _train_top(
    ctx: StageContext, layout: PatchLayout, pieces: list[Piece], shares: Tensor
) -> tuple[Circuit, list[float]]:
    settings, seed = ctx.config.distill, ctx.config.seed
    blocks = [piece.load(ctx)[0]["soft"] for piece in pieces]
    top = counted_top(layout.tree, blocks, shares, settings, seed)
    epochs = settings.growing.top_epochs
    with (
        Curves(_fresh(ctx, "top")) as curves,
        Progress("distill top", epochs, "epochs") as bar,
    ):

        def log(epoch: int, nats: float) -> None:
            curves.scalars(epoch, {"top/nats_per_sample": nats})
            bar.advance(1, nats=nats)

        curve = fit_top(top, blocks, settings, seed, log)
    return top, curve


def _draw(ctx: StageContext, rounds: dict[int, list[dict[str, Any]]]) -> None:
    """The clusters' curves: nats a patch over the epochs of all rounds, sizes over the rounds."""
    with Curves(_fresh(ctx, "growing")) as curves:
        for cluster, of_cluster in rounds.items():
            step = 0
            for number, facts in enumerate(of_cluster, start=1):
                sizes = {f"cluster_{cluster:04d}/{name}": float(facts[name])
                         for name in ("heads", "states", "edges")}  # fmt: skip
                curves.scalars(number, sizes)
                for nats in facts["nats_by_epoch"]:
                    step += 1
                    curves.scalars(step, {f"cluster_{cluster:04d}/nats_per_patch": nats})


def _fresh(ctx: StageContext, name: str) -> Path:
    """A folder for curves, without those of an earlier attempt."""
    folder = ctx.tensorboard / "distill" / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder
