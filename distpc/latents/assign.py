"""Stage `assign`: one shard of latent values a data shard, on Ray, and a report of their use.

Latents are made of the stored features, or, with `latents.keep_features: false`, of the data: each
shard is encoded, its features are replaced by the indices of their centroids, and forgotten.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distpc.artifacts.files import read_json, write_json
from distpc.artifacts.manifest import Artifact
from distpc.artifacts.stage import StageContext
from distpc.config import RunConfig
from distpc.data.index import ShardEntry, ShardIndex
from distpc.errors import LatentError
from distpc.latents.assigners import Assignment
from distpc.latents.codebook import read_codebook
from distpc.latents.extract import (
    SPLIT,
    bad_of_finished,
    first_shards,
    is_finished,
    settings,
)
from distpc.latents.fit import CENTROIDS, read_fit
from distpc.latents.looks import log_looks
from distpc.latents.report import LatentReport, log_report, make_report, refuse_collapse
from distpc.latents.shard_work import BAD_SAMPLES, encode_shards, refuse_bad
from distpc.latents.store import (
    FORMAT_VERSION,
    feature_shards,
    load_latents,
    read_shard,
    read_tensors,
    shard_path,
)
from distpc.parallel.cluster import Cluster
from distpc.parallel.progress import in_bytes
from distpc.parallel.tally import Tally

WORKER = "distpc.latents.assigners:Assigner"
REPORT = "report.json"
FUSED_WORKER = "distpc.latents.assigners:FusedAssigner"


def run(ctx: StageContext) -> None:
    """Assign every shard, keep finished ones, then report and refuse a collapsed codebook.

    Raises:
        LatentError: centroids and features do not belong together, or the codebook collapsed.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    assignment = _assignment(ctx)
    folder = ctx.tensorboard / "assign"
    shutil.rmtree(folder, ignore_errors=True)
    if ctx.config.latents.keep_features:
        names, facts = _of_stored(ctx, assignment)
    else:
        names, facts = _of_data(ctx, assignment)
    report = _report(ctx, names)
    write_json(
        ctx.out / REPORT,
        {
            "format_version": FORMAT_VERSION,
            "features": ctx.input("features").fingerprint,
            **report.to_json(),
        },
    )
    log_report(report, folder)
    log_looks(ctx, names, report.usage, folder)
    refuse_collapse(report, ctx.config.latents, ctx.out / REPORT)
    if "feature_bytes_saved" in facts:
        saved = in_bytes(facts["feature_bytes_saved"])
        print(f"assign: features not kept, {saved} of disk saved", file=sys.stderr, flush=True)
    ctx.metadata.update(
        {name: value for name, value in report.to_json().items() if name != "usage"},
        shards=len(names),
        **facts,
    )


def judge(config: RunConfig, assigned: Artifact) -> None:
    """Refuse finished latents that lack more samples than are allowed now, or whose codebook is
    used less than is asked for now.

    Raises:
        LatentError: with the figures and what to change.
    """
    bad = assigned.metadata.get("bad_samples", {})
    refuse_bad(bad, config.latents, assigned.path / BAD_SAMPLES)
    path = assigned.path / REPORT
    refuse_collapse(LatentReport.from_json(read_json(path)), config.latents, path)


def _assignment(ctx: StageContext) -> Assignment:
    """Centroids that are known to belong to the features."""
    features, path = ctx.input("features"), ctx.input("fit").path / CENTROIDS
    first = shard_path(features.path, feature_shards(features)[0])
    rows = read_shard(first, "features", fingerprint=features.fingerprint).rows
    shape = int(rows.shape[1]), int(rows.shape[2])
    read_codebook(path, features=features.fingerprint, shape=shape)
    return Assignment(
        path=str(path),
        features=features.fingerprint,
        shape=shape,
        out=str(ctx.out),
        fingerprint=ctx.fingerprint,
        device="cuda" if ctx.config.parallel.gpus_per_worker > 0 else "cpu",
    )


def _of_stored(ctx: StageContext, assignment: Assignment) -> tuple[list[str], dict[str, Any]]:
    """Latents of all shards of features; their names, and facts for the metadata."""
    features = ctx.input("features")
    names = feature_shards(features)
    missing = [name for name in names if not _is_whole(shard_path(ctx.out, name), ctx)]
    tally = Tally("assign", ctx.tensorboard / "assign")
    if missing:
        kwargs = {"features": str(features.path), "assignment": assignment}
        with Cluster.connect(ctx.config.parallel) as cluster, tally:
            for _ in cluster.map(WORKER, kwargs, missing, label="assign", tally=tally):
                pass
    return names, {"workers": tally.to_json()}


def _of_data(ctx: StageContext, assignment: Assignment) -> tuple[list[str], dict[str, Any]]:
    """Latents of all shards of data; their names, and facts for the metadata."""
    index = ShardIndex.load(ctx.input("index").path)
    entries = first_shards(index.shards(SPLIT), ctx.config.latents.max_samples)
    missing = [entry for entry in entries if not is_finished(ctx, entry, "latents")]
    kept = [entry for entry in entries if entry not in missing]
    bad = bad_of_finished(ctx, kept, "latents")
    workers = encode_shards(
        ctx, FUSED_WORKER, settings(ctx), missing, bad, "assign", assignment=assignment
    )
    return [entry.name for entry in entries], {
        "bad_samples": dict(sorted(bad.reasons.items())),
        "feature_bytes_saved": _bytes_saved(ctx, entries),
        "workers": workers,
    }


def _bytes_saved(ctx: StageContext, entries: Sequence[ShardEntry]) -> int:
    """Bytes of disk that keeping all features would have taken beyond those that are kept."""
    kept = ctx.input("features").metadata
    all_samples = sum(entry.num_samples for entry in entries)
    return round(kept["bytes"] / kept["samples"] * (all_samples - kept["samples"]))


def _report(ctx: StageContext, names: list[str]) -> LatentReport:
    inertia = 0.0
    for name in names:
        _, noted = read_tensors(shard_path(ctx.out, name), "latents", ctx.fingerprint)
        inertia += float(noted["inertia"])
    grid = ctx.input("features").metadata.get("grid")
    return make_report(
        (load_latents(ctx.out, name)[1] for name in names),
        ctx.config.latents.num_clusters,
        None if grid is None else (int(grid[0]), int(grid[1])),
        inertia,
        read_fit(ctx.input("fit").path)["feature_variance"],
        ctx.config.latents.codebook == "per_position",
    )


def _is_whole(path: Path, ctx: StageContext) -> bool:
    """Whether an interrupted attempt of this very stage left the whole shard."""
    try:
        read_shard(path, "latents", fingerprint=ctx.fingerprint)
    except LatentError:
        return False
    return True
