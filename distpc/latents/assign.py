"""Stage `assign`: features and centroids -> one shard of latent values a data shard, on Ray."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.errors import LatentError
from distpc.latents.codebook import read_codebook
from distpc.latents.fit import CENTROIDS, read_fit
from distpc.latents.report import LatentReport, log_report, make_report, refuse_collapse
from distpc.latents.store import (
    FORMAT_VERSION,
    feature_shards,
    load_latents,
    read_shard,
    read_tensors,
    shard_path,
    write_shard,
)
from distpc.parallel.cluster import Cluster

WORKER = "distpc.latents.assign:Assigner"


class Assigner:
    """Ray worker: gives every feature of a shard the index of its nearest centroid.

    Args:
        features: folder of the features stage.
        features_fingerprint: that its shards must carry.
        centroids: file of the fit stage.
        shape: (Z, D) of the features.
        out: folder for latent shards.
        fingerprint: that they get.
        device: where distances are computed, `cpu` or `cuda`.
    """

    def __init__(
        self,
        features: str,
        features_fingerprint: str,
        centroids: str,
        shape: tuple[int, int],
        out: str,
        fingerprint: str,
        device: str,
    ) -> None:
        self._features = Path(features)
        self._features_fingerprint = features_fingerprint
        self._shape = shape
        self._codebook = read_codebook(
            Path(centroids), features=features_fingerprint, shape=shape
        ).to(device)
        self._out = Path(out)
        self._fingerprint = fingerprint

    def __call__(self, name: str) -> float:
        """Write (N, Z) int32 latents of shard `name` under its keys; returns the seconds."""
        began = time.monotonic()
        path = shard_path(self._features, name)
        shard = read_shard(path, "features", fingerprint=self._features_fingerprint)
        if tuple(shard.rows.shape[1:]) != self._shape:
            raise LatentError(
                "the features have another width than the centroids",
                where=path,
                found=f"features of shape {tuple(shard.rows.shape)}",
                expected=f"(samples, {self._shape[0]}, {self._shape[1]})",
                fix="run the features and fit stages again for this teacher",
            )
        latents, distances = self._codebook.assign(shard.rows)
        inertia = float(distances.double().sum())
        if not np.isfinite(inertia):
            raise LatentError("features are not finite", where=path, found=f"inertia {inertia}")
        write_shard(
            shard_path(self._out, name),
            "latents",
            latents,
            shard.keys,
            {
                "fingerprint": self._fingerprint,
                "features": self._features_fingerprint,
                "num_clusters": self._codebook.num_clusters,
                "inertia": inertia,
            },
        )
        return time.monotonic() - began


def run(ctx: StageContext) -> None:
    """Assign every shard, keep finished ones, then report and refuse a collapsed codebook.

    Raises:
        LatentError: centroids and features do not belong together, or the codebook collapsed.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    features, fit = ctx.input("features"), ctx.input("fit")
    names = feature_shards(features)
    shape = _feature_shape(shard_path(features.path, names[0]), features.fingerprint)
    read_codebook(fit.path / CENTROIDS, features=features.fingerprint, shape=shape)
    missing = [name for name in names if not _is_finished(shard_path(ctx.out, name), ctx)]
    kwargs = {
        "features": str(features.path),
        "features_fingerprint": features.fingerprint,
        "centroids": str(fit.path / CENTROIDS),
        "shape": shape,
        "out": str(ctx.out),
        "fingerprint": ctx.fingerprint,
        "device": "cuda" if ctx.config.parallel.gpus_per_worker > 0 else "cpu",
    }
    seconds = 0.0
    if missing:
        with Cluster.connect(ctx.config.parallel) as cluster:
            for _, spent in cluster.map(WORKER, kwargs, missing, label="assign"):
                seconds += spent
    report = _report(ctx, names)
    write_json(
        ctx.out / "report.json",
        {"format_version": FORMAT_VERSION, "features": features.fingerprint, **report.to_json()},
    )
    folder = ctx.tensorboard / "assign"
    shutil.rmtree(folder, ignore_errors=True)
    log_report(report, folder)
    refuse_collapse(report, ctx.config.latents, ctx.out / "report.json")
    ctx.metadata.update(
        {name: value for name, value in report.to_json().items() if name != "usage"},
        seconds=round(seconds, 3),
        shards=len(names),
    )


def _report(ctx: StageContext, names: list[str]) -> LatentReport:
    features, fit = ctx.input("features"), ctx.input("fit")
    inertia = 0.0
    for name in names:
        _, noted = read_tensors(shard_path(ctx.out, name), "latents", ctx.fingerprint)
        inertia += float(noted["inertia"])
    grid = features.metadata.get("grid")
    return make_report(
        (load_latents(ctx.out, name)[1] for name in names),
        ctx.config.latents.num_clusters,
        None if grid is None else (int(grid[0]), int(grid[1])),
        inertia,
        read_fit(fit.path)["feature_variance"],
    )


def _feature_shape(path: Path, fingerprint: str) -> tuple[int, int]:
    rows = read_shard(path, "features", fingerprint=fingerprint).rows
    return int(rows.shape[1]), int(rows.shape[2])


def _is_finished(path: Path, ctx: StageContext) -> bool:
    """Whether an interrupted attempt of this very stage left the whole shard."""
    try:
        read_shard(path, "latents", fingerprint=ctx.fingerprint)
    except LatentError:
        return False
    return True
