"""Jobs of progressive growing: a global cluster's leaf circuit, and soft likelihoods of a shard.

A cluster's job leaves a folder for every round, so that one that was interrupted goes on after the
last round that it finished. Legend: N samples, Z patches, P patches of a cluster, K heads.
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
from distpc.circuits.io import load_model, save_model
from distpc.data.index import ShardEntry
from distpc.errors import LatentError
from distpc.latents.extract import first_shards
from distpc.latents.store import read_shard, read_tensors, shard_path, write_tensors
from distpc.parallel.stopwatch import count
from distpc.structures.patch_layout import PatchLayout
from distpc.training.growing import Grower, Growth
from distpc.training.pieces import PatchPieceMaker, Piece, patch_categories
from distpc.training.refinement import head_likelihoods
from distpc.training.samples import LatentSource

WORKER = "distpc.training.cluster_jobs:ClusterWorker"

_LEAF_COST = 1e-8
_SOFT_BATCH = 1024
_MAX_POOL_BYTES = 2**30
"""Memory for a cluster's patches and features; more patches are drawn from by the seed."""


def cluster_piece(ctx: StageContext, layout: PatchLayout, cluster: int, patches: int) -> Piece:
    """The job of a global cluster with so many patches."""
    weights = layout.variables_per_patch * ctx.config.structure.leaf_num_states**2
    cost = _LEAF_COST * ctx.config.distill.growing.epochs * weights * patches
    return Piece(f"cluster-{cluster:04d}", "cluster", cost, group=cluster)


def soft_shards(ctx: StageContext, source: LatentSource) -> list[ShardEntry]:
    """The shards whose samples the top level sees."""
    return first_shards(source.shards(), ctx.config.distill.growing.top_samples)


def soft_piece(entry: ShardEntry) -> Piece:
    """The job of a shard's soft likelihoods."""
    return Piece(f"soft-{entry.name}", "soft", float(entry.num_samples), shards=(entry.name,))


def leaf_folder(ctx: StageContext, cluster: int) -> Path:
    """Where a cluster's finished circuit lies."""
    return ctx.out / "leaves" / f"{cluster:04d}"


class ClusterWorker(PatchPieceMaker):
    """Grows leaf circuits of clusters, and computes soft likelihoods under all of them."""

    def __init__(self, context: dict[str, Any]) -> None:
        super().__init__(context)
        self._leaves: list[Circuit] = []

    def __call__(self, item: dict[str, Any]) -> None:
        """Make the piece that `describe` described; its rounds go once it is there."""
        super().__call__(item)
        if item["kind"] == "cluster":
            for folder in self._round_folders(item["group"]):
                shutil.rmtree(folder)

    def make(self, piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece of kind cluster or soft."""
        if piece.kind == "cluster":
            return self._grow(piece.group), {}
        return self._soften(self._entries[piece.shards[0]]), {}

    def _grow(self, cluster: int) -> dict[str, Tensor]:
        """Grow a cluster's circuit and save it; returns its centroids."""
        config = self._ctx.config
        patches, features = self._pool(cluster)
        grower = Grower(
            patches=patches,
            features=features,
            num_categories=patch_categories(self._layout, self._source.index.spec.num_categories),
            num_states=config.structure.leaf_num_states,
            settings=config.distill.growing,
            pseudocount=config.distill.pseudocount,
            seed=(config.seed, cluster),
            keep=lambda growth: self._keep(cluster, growth),
        )
        growth = grower.run(self._found(cluster))
        _save(growth, leaf_folder(self._ctx, cluster))
        return {"centroids": growth.centroids.contiguous()}

    def _soften(self, entry: ShardEntry) -> dict[str, Tensor]:
        """`soft` (N, Z, K): likelihoods of a shard's patches under all heads, in nats."""
        if not self._leaves:
            # Every cluster that has patches was finished before any shard.
            folders = sorted((self._ctx.out / "leaves").glob("[0-9]*"))
            self._leaves = [load_model(folder) for folder in folders]
        x, _ = self._source.read(entry)
        patches = torch.from_numpy(x[:, self._layout.variables])
        flat = patches.reshape(-1, patches.shape[2])
        soft = [head_likelihoods(leaf, flat, _SOFT_BATCH) for leaf in self._leaves]
        count(patches=len(flat))
        return {"soft": torch.cat(soft, dim=1).view(*patches.shape[:2], -1).contiguous()}

    def _pool(self, cluster: int) -> tuple[Tensor, Tensor]:
        """(P, D) int16 patches of a cluster and (P, F) float32 features, drawn where they are more
        than memory is meant for.

        Raises:
            LatentError: features of other samples.
        """
        features = self._ctx.input("features")
        rng = np.random.default_rng([self._ctx.config.seed, cluster])
        masks = {e.name: self._source.latents(e) == cluster for e in self._entries.values()}
        total = sum(int(mask.sum()) for mask in masks.values())
        pools, of_pools = [], []
        for entry in self._entries.values():
            mask = masks[entry.name]
            if not mask.any():
                continue
            path = shard_path(features.path, entry.name)
            rows = read_shard(path, "features", fingerprint=features.fingerprint).rows
            if rows.shape[:2] != mask.shape:
                raise LatentError(
                    "features are of other samples than latents",
                    where=path,
                    found=tuple(rows.shape[:2]),
                    expected=mask.shape,
                    fix="remove the features, fit and assign folders and run the command again",
                )
            room = _MAX_POOL_BYTES // (2 * self._layout.variables_per_patch + 4 * rows.shape[2])
            if total > room:
                mask = mask & (rng.random(mask.shape) < room / total)
            x, _ = self._source.read(entry)
            pools.append(x[:, self._layout.variables][mask].astype(np.int16))
            of_pools.append(rows[torch.from_numpy(mask)].float())
        return torch.from_numpy(np.concatenate(pools)), torch.cat(of_pools)

    def _round_folders(self, cluster: int) -> list[Path]:
        """Folders of a cluster's finished rounds, in order."""
        return sorted((self._ctx.out / "rounds").glob(f"{cluster:04d}-*"))

    def _keep(self, cluster: int, growth: Growth) -> None:
        """Save a round, then remove the one before; its state is written last."""
        before = self._round_folders(cluster)
        folder = self._ctx.out / "rounds" / f"{cluster:04d}-{len(growth.rounds):03d}"
        _save(growth, folder)
        state = {"heads": growth.heads, "centroids": growth.centroids.contiguous()}
        notes = {"fingerprint": self._ctx.fingerprint, "holds": "round"}
        write_tensors(folder / "state.safetensors", state, notes)
        for other in before:
            if other != folder:
                shutil.rmtree(other)

    def _found(self, cluster: int) -> Growth | None:
        """The last whole round of an interrupted attempt of this very stage."""
        for folder in reversed(self._round_folders(cluster)):
            path = folder / "state.safetensors"
            try:
                state, _ = read_tensors(path, "round", self._ctx.fingerprint)
            except LatentError:
                continue
            circuit = load_model(folder)
            rounds = circuit.training_facts["rounds"]
            return Growth(circuit, state["heads"].clone(), state["centroids"].clone(), rounds)
        return None


def _save(growth: Growth, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(growth.circuit, folder, dataset={}, training={"rounds": growth.rounds})
