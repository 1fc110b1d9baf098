"""Stage `fit`: features -> centroids.safetensors and fit.json, by k-means on Ray workers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.latents.holder import ShardFacts
from distpc.latents.kmeans import grid_bits
from distpc.latents.lloyd import FitState, Lloyd, check_distinct
from distpc.latents.seeding import (
    PLUS_PLUS_POINTS_PER_CLUSTER,
    RANDOM_POINTS_PER_CLUSTER,
    SCALABLE_POINTS_PER_CLUSTER,
)
from distpc.latents.store import FORMAT_VERSION, feature_shards, write_centroids
from distpc.parallel.cluster import Cluster
from distpc.parallel.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WORKER = "distpc.latents.holder:FeatureHolder"
CENTROIDS = "centroids.safetensors"
CHECKPOINT = "checkpoint.safetensors"
_GROUPS_PER_WORKER = 4
"""Groups of shards whose sums a worker makes in a round: enough to share them out evenly."""


def run(ctx: StageContext) -> None:
    """Cluster the features of all shards; goes on from the last round of a killed attempt.

    Raises:
        LatentError: fewer different features than clusters, or features that cannot be read.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    features = ctx.input("features")
    names = feature_shards(features)
    config = ctx.config.latents
    state = FitState.load(ctx.out / CHECKPOINT, ctx.fingerprint)
    with Cluster.connect(ctx.config.parallel) as cluster:
        kwargs = {
            "folder": str(features.path),
            "fingerprint": features.fingerprint,
            "device": "cuda" if ctx.config.parallel.gpus_per_worker > 0 else "cpu",
        }
        pool = cluster.pool(WORKER, kwargs)

        def ask(method: str, items: Sequence[Any]) -> list[Any]:
            answers = dict(pool.map(items, method=method))
            return [answers[position] for position in range(len(items))]

        def hold(method: str, items: Sequence[Any]) -> list[tuple[Any, Any]]:
            answers = dict(pool.map(items, method=method, hold=True))
            return [answers[position] for position in range(len(items))]

        try:
            facts = ask("describe", [(name, config.num_clusters) for name in names])
            check_distinct([fact.distinct for fact in facts], config.num_clusters, features.path)
            with RoundLog(ctx, state) as log:
                job = Lloyd(
                    ask,
                    hold,
                    names,
                    [fact.points for fact in facts],
                    grid_bits(sum(f.points for f in facts), max(f.largest for f in facts)),
                    min(len(names), _GROUPS_PER_WORKER * ctx.config.parallel.num_workers),
                    config,
                    ctx.config.seed,
                    put=cluster.put,
                    keep=lambda state: state.save(ctx.out / CHECKPOINT, ctx.fingerprint),
                    log=log,
                )
                job.run(state)
        finally:
            pool.close()
    _write(ctx, state, facts)
    (ctx.out / CHECKPOINT).unlink(missing_ok=True)


class RoundLog:
    """Shows every round: a progress line, and a TensorBoard curve for each restart.

    Args:
        ctx: of the stage.
        state: of the fit; rounds of a killed attempt are written again, so no curve has holes.
    """

    def __init__(self, ctx: StageContext, state: FitState) -> None:
        self._folder = ctx.tensorboard / "fit"
        self._state = state
        self._writers: dict[int, SummaryWriter] = {}
        config = ctx.config.latents
        total = config.num_restarts * (config.num_rounds + 1)
        self._progress = Progress("k-means", total, "rounds")
        if not state.inertia:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RoundLog:
        return self

    def __exit__(self, *details: object) -> None:
        for writer in self._writers.values():
            writer.close()
        self._progress.close()

    def __call__(self, restart: int, number: int, inertia: float) -> None:
        """Note the inertia of round `number` of a restart."""
        writer = self._writers.get(restart)
        if writer is None:
            writer = self._writers[restart] = self._open(restart)
        writer.add_scalar("latents/inertia", inertia, number)
        self._progress.advance(1, restart=restart, inertia=inertia)

    def _open(self, restart: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder / f"restart-{restart}"
        shutil.rmtree(folder, ignore_errors=True)
        writer = SummaryWriter(folder, flush_secs=10)
        for number, inertia in enumerate(self._state.inertia[restart][:-1]):
            writer.add_scalar("latents/inertia", inertia, number)
        return writer


def _write(ctx: StageContext, state: FitState, facts: Sequence[ShardFacts]) -> None:
    if state.best is None:
        raise ValueError("no restart has finished")
    features = ctx.input("features")
    config = ctx.config.latents
    points = sum(fact.points for fact in facts)
    mean = np.sum([fact.sums for fact in facts], axis=0) / points
    variance = sum(fact.squares for fact in facts) / points - float(mean @ mean)
    inertia = state.inertia[state.best_restart][-1]
    per_cluster = {
        "k-means||": SCALABLE_POINTS_PER_CLUSTER,
        "k-means++": PLUS_PLUS_POINTS_PER_CLUSTER,
        "random": RANDOM_POINTS_PER_CLUSTER,
    }
    summary = {
        "num_clusters": config.num_clusters,
        "feature_width": int(state.best.shape[1]),
        "samples_used": sum(fact.samples for fact in facts),
        "points_used": points,
        "points_seeded_from": min(points, per_cluster[config.init] * config.num_clusters),
        "inertia": inertia,
        "mean_squared_distance": inertia / points,
        "feature_variance": variance,
        "best_restart": state.best_restart,
        "features": features.fingerprint,
    }
    restarts = [
        {"inertia": inertia, "refilled": refilled}
        for inertia, refilled in zip(state.inertia, state.refilled, strict=True)
    ]
    write_centroids(
        ctx.out / CENTROIDS,
        state.best,
        {"fingerprint": ctx.fingerprint, "features": features.fingerprint},
    )
    write_json(
        ctx.out / "fit.json",
        {
            "format_version": FORMAT_VERSION,
            **summary,
            "init": config.init,
            "seconds": round(state.seconds, 3),
            "restarts": restarts,
        },
    )
    ctx.metadata.update(summary)


def read_fit(folder: Path) -> dict[str, Any]:
    """The facts of fit.json in the fit stage's folder."""
    from distpc.artifacts.files import read_json

    facts: dict[str, Any] = read_json(folder / "fit.json")
    return facts
