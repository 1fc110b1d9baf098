"""Stage `fit`: features -> centroids.safetensors and fit.json, by k-means on Ray workers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents.codebook import Codebook, write_codebook
from distpc.latents.holder import ShardFacts, View
from distpc.latents.positions import WORKER as POSITIONS_WORKER
from distpc.latents.positions import blocks, checkpoint, clustering, num_positions
from distpc.latents.principal import Projection, fit_projection
from distpc.latents.questions import Holders, shard_of
from distpc.latents.round_log import RoundLog
from distpc.latents.seeding import (
    PLUS_PLUS_POINTS_PER_CLUSTER,
    RANDOM_POINTS_PER_CLUSTER,
    SCALABLE_POINTS_PER_CLUSTER,
)
from distpc.latents.state import FitState
from distpc.latents.store import FORMAT_VERSION, SUFFIX, feature_shards
from distpc.parallel.cluster import Cluster
from distpc.parallel.tally import Tally

WORKER = "distpc.latents.holder:FeatureHolder"
CENTROIDS = "centroids.safetensors"
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINTS = "checkpoint*.safetensors"
_GROUPS_PER_WORKER = 4
"""Groups of shards that a worker is asked about in a round: enough to share them out evenly."""
_MANY_CLUSTERS = 16_384
"""From here on the sums of a group are so large that there is one a worker."""
_KEPT_SHARE = 1 + 1 / _GROUPS_PER_WORKER
"""A worker's share of what is kept, over an equal one: a group more for whoever came first."""
_VIEWS_AT_ONCE = 64
"""Shards whose different points are counted at once: most often the first few are enough."""


def run(ctx: StageContext) -> None:
    """Cluster the features of all shards; goes on from the last round of a killed attempt.

    Raises:
        LatentError: fewer different features than clusters, or features that cannot be read.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    features = ctx.input("features")
    names = feature_shards(features)
    config = ctx.config.latents
    tally = Tally("fit", ctx.tensorboard / "fit")
    with Cluster.connect(ctx.config.parallel) as cluster, tally:
        projection = None
        if config.projection != "none":
            with holders_of(cluster, ctx, tally=tally) as holders:
                projection = principal_directions(holders, names, config, features.path)
        with holders_of(cluster, ctx, projection, tally) as holders:
            facts = holders.each("describe", names)
            if config.codebook == "shared":
                views = [View(name) for name in names]
                check_distinct(holders, views, config.num_clusters, features.path)
                states = [_cluster(ctx, holders, views, facts)]
        if config.codebook == "per_position":
            states = _cluster_positions(ctx, cluster, projection, facts, tally)
    _write(ctx, states, facts, projection)
    ctx.metadata["workers"] = tally.to_json()
    for path in ctx.out.glob(CHECKPOINTS):
        path.unlink()


@contextlib.contextmanager
def holders_of(
    cluster: Cluster,
    ctx: StageContext,
    projection: Projection | None = None,
    tally: Tally | None = None,
) -> Iterator[Holders]:
    """Workers that hold the shards of the features stage; they end with the block."""
    folder = ctx.input("features").path
    kwargs = {
        **_holding(ctx, projection),
        "in_memory": ctx.config.latents.feature_memory == "held",
        "most_bytes": _share(folder, projection, ctx.config.parallel.num_workers),
    }
    with cluster.pool(WORKER, kwargs, tally=tally) as pool:

        def ask(method: str, items: Sequence[Any], hold: bool = False) -> list[Any]:
            needs = [shard_of(method, item) for item in items]
            answers = dict(pool.map(items, method=method, hold=hold, needs=needs))
            return [answers[position] for position in range(len(items))]

        few = ctx.config.latents.num_clusters < _MANY_CLUSTERS
        groups = ctx.config.parallel.num_workers * (_GROUPS_PER_WORKER if few else 1)
        yield Holders(ask, partial(ask, hold=True), cluster.put, groups)


def _holding(ctx: StageContext, projection: Projection | None) -> dict[str, Any]:
    """Arguments of every `FeatureHolder` of the features stage."""
    features = ctx.input("features")
    return {
        "folder": str(features.path),
        "fingerprint": features.fingerprint,
        "device": "cuda" if ctx.config.parallel.gpus_per_worker > 0 else "cpu",
        "projection": None
        if projection is None
        else (projection.mean.numpy(), projection.basis.numpy()),
    }


def _share(folder: Path, projection: Projection | None, num_workers: int) -> int:
    """Bytes of features that a worker may keep, so that all keep little more than there are."""
    total = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
    if projection is not None:
        total = total * projection.basis.shape[1] // projection.basis.shape[0]
    return math.ceil(_KEPT_SHARE * total / num_workers)


def principal_directions(
    holders: Holders, names: Sequence[str], config: LatentsConfig, where: Path
) -> Projection:
    """The map that features go through before they are clustered.

    Raises:
        LatentError: features do not vary, or in fewer directions than asked for.
    """
    # Not finite features are named by their samples there.
    holders.each("describe", names)
    _, moments = holders.sum_in_order("moments", names)
    whiten = config.projection == "whiten"
    return fit_projection(moments, config.projection_width, whiten, where)


def check_distinct(holders: Holders, views: Sequence[View], num_clusters: int, where: Path) -> None:
    """Refuse points too alike to be clustered.

    Raises:
        LatentError: fewer different points than clusters.
    """
    found = np.zeros(0, dtype=np.uint64)
    for start in range(0, len(views), _VIEWS_AT_ONCE):
        items = [(view, num_clusters) for view in views[start : start + _VIEWS_AT_ONCE]]
        found = np.unique(np.concatenate([found, *holders.each("distinct", items)]))
        if len(found) >= num_clusters:
            return
    raise LatentError(
        "there are fewer different features than clusters",
        where=where,
        found=f"{len(found)} different feature vectors",
        expected=f"at least latents.num_clusters = {num_clusters}",
        fix="set fewer latents.num_clusters, raise latents.max_samples, or look at the "
        "teacher: one that gives all patches or tokens the same features has not learnt to tell "
        "them apart",
    )


def _cluster(
    ctx: StageContext, holders: Holders, views: Sequence[View], facts: Sequence[ShardFacts]
) -> FitState:
    """The codebook of all positions, from where a killed attempt left it."""
    path = ctx.out / CHECKPOINT
    state = FitState.load(path, ctx.fingerprint)
    with RoundLog(ctx, state) as log:
        job = clustering(holders, views, facts, ctx.config.latents, ctx.config.seed)
        job = replace(job, keep=lambda state: state.save(path, ctx.fingerprint), log=log)
        return job.run(state)


def _cluster_positions(
    ctx: StageContext,
    cluster: Cluster,
    projection: Projection | None,
    facts: Sequence[ShardFacts],
    tally: Tally,
) -> list[FitState]:
    """A codebook for each position; what a killed attempt has finished is kept."""
    features = ctx.input("features")
    number = num_positions(facts, features.path)
    kwargs = {
        "context": ctx.to_json(),
        "holder": _holding(ctx, projection),
        "facts": cluster.put(list(facts)),
        "names": feature_shards(features),
    }
    parts = blocks(facts, len(facts[0].sums), ctx.config.parallel.num_workers)
    for _ in cluster.map(POSITIONS_WORKER, kwargs, parts, label="k-means", tally=tally):
        pass
    paths = [checkpoint(ctx.out, position) for position in range(number)]
    return [FitState.load(path, ctx.fingerprint) for path in paths]


def _write(
    ctx: StageContext,
    states: Sequence[FitState],
    facts: Sequence[ShardFacts],
    projection: Projection | None,
) -> None:
    features = ctx.input("features")
    config = ctx.config.latents
    codebook = _codebook(states, projection, config.codebook == "per_position")
    points = sum(fact.points for fact in facts)
    mean = np.sum([fact.sums for fact in facts], axis=0) / points
    variance = sum(fact.squares for fact in facts) / points - float(mean @ mean)
    inertia = sum(state.inertia[state.best_restart][-1] for state in states)
    per_cluster = {
        "k-means||": SCALABLE_POINTS_PER_CLUSTER,
        "k-means++": PLUS_PLUS_POINTS_PER_CLUSTER,
        "random": RANDOM_POINTS_PER_CLUSTER,
    }
    seeded_from = per_cluster[config.init] * config.num_clusters * len(states)
    summary = {
        "num_clusters": config.num_clusters,
        "num_codebooks": len(states),
        "feature_width": int(codebook.centroids.shape[-1]),
        "samples_used": sum(fact.samples for fact in facts),
        "points_used": points,
        "points_seeded_from": min(points, seeded_from),
        "inertia": inertia,
        "mean_squared_distance": inertia / points,
        "feature_variance": variance,
        "features": features.fingerprint,
    }
    marks = {"fingerprint": ctx.fingerprint, "features": features.fingerprint}
    write_codebook(ctx.out / CENTROIDS, codebook, marks)
    histories = [_history(state) for state in states]
    write_json(
        ctx.out / "fit.json",
        {
            "format_version": FORMAT_VERSION,
            **summary,
            "algorithm": config.algorithm,
            "init": config.init,
            "balanced": config.balanced,
            "projection": config.projection,
            "seconds": round(sum(state.seconds for state in states), 3),
            **(histories[0] if config.codebook == "shared" else {"positions": histories}),
        },
    )
    ctx.metadata.update(summary)


def _codebook(
    states: Sequence[FitState], projection: Projection | None, per_position: bool
) -> Codebook:
    centroids = [state.best for state in states if state.best is not None]
    if len(centroids) < len(states):
        raise ValueError("no restart has finished")
    return Codebook(torch.stack(centroids) if per_position else centroids[0], projection)


def _history(state: FitState) -> dict[str, Any]:
    return {
        "best_restart": state.best_restart,
        "restarts": [
            {"inertia": inertia, "refilled": refilled}
            for inertia, refilled in zip(state.inertia, state.refilled, strict=True)
        ],
    }


def read_fit(folder: Path) -> dict[str, Any]:
    """The facts of fit.json in the fit stage's folder."""
    from distpc.artifacts.files import read_json

    facts: dict[str, Any] = read_json(folder / "fit.json")
    return facts
