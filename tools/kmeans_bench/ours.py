"""distpc's k-means on a Ray cluster of this machine: rounds, their times, the workers' memory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from distpc.artifacts import Artifact, StageContext
from distpc.config import RunConfig
from distpc.config.schema import ParallelConfig
from distpc.latents.fit import holders_of
from distpc.latents.holder import Draw, View
from distpc.latents.positions import clustering
from distpc.latents.questions import Holders
from distpc.latents.state import FitState
from distpc.latents.store import feature_shards
from distpc.parallel.cluster import Cluster

WORKER = "ray::_Host"


@dataclass(frozen=True)
class Result:
    """What a clustering gave and took.

    Attributes:
        centroids: (K, D) float32 of the last round.
        inertia: of each round's centroids, the first ones included.
        seconds: of every round but the first, which also reads the files.
        growth: each worker's peak resident bytes above those after its imports.
    """

    centroids: torch.Tensor
    inertia: list[float]
    seconds: list[float]
    growth: list[int]


def parallel(num_workers: int) -> ParallelConfig:
    """Workers of one thread, of which four fit two cores."""
    return ParallelConfig(num_workers=num_workers, cpus_per_worker=0.5)


def cluster_points(
    cluster: Cluster,
    features: Artifact,
    folder: Path,
    num_workers: int,
    num_clusters: int,
    num_rounds: int,
    first: torch.Tensor | None = None,
    init: str = "k-means||",
) -> Result:
    """So many rounds, from (K, D) centroids or from seeding by `init`."""
    cluster.parallel = parallel(num_workers)
    config = RunConfig.model_validate(
        {
            "name": "bench",
            "data": {"source": {"kind": "digits"}},
            "latents": {
                "num_clusters": num_clusters,
                "num_rounds": num_rounds,
                "tolerance": 0.0,
                "init": init,
            },
            "parallel": cluster.parallel.model_dump(),
        }
    )
    ctx = StageContext(config, folder, {"features": features}, "bench", folder / "tb")
    state = FitState()
    if first is not None:
        state = FitState(centroids=first.clone(), inertia=[[]], refilled=[[]])
    moments: list[float] = []
    with holders_of(cluster, ctx) as holders:
        names = feature_shards(features)
        _let_all_begin(holders, features, num_workers)
        before = _worker_bytes("VmRSS")
        facts = holders.each("describe", names)
        views = [View(name) for name in names]
        job = clustering(holders, views, facts, config.latents, config.seed)
        job = replace(job, log=lambda *_: moments.append(time.perf_counter()))
        job.run(state)
        after = _worker_bytes("VmHWM")
    assert state.best is not None
    growth = [after[worker] - before[worker] for worker in after]
    return Result(state.best, state.inertia[0], np.diff(moments).tolist(), growth)


def _let_all_begin(holders: Holders, features: Artifact, num_workers: int) -> None:
    """Every worker opens a file and reads none of its rows; some start later than others."""
    items = [Draw(View(name), 0, (0,)) for name in feature_shards(features)[:num_workers]]
    while True:
        holders.ask("draw", items)
        # While one starts, its title goes on.
        titles = [title.split("\0")[0].strip() for title in _of_workers("cmdline").values()]
        if titles.count(WORKER) == num_workers:
            # All have come, so that each is given one of these.
            holders.ask("draw", items)
            return
        time.sleep(0.1)


def _worker_bytes(field: str) -> dict[int, int]:
    """A field of the status of every worker process, by process."""
    found = {}
    for process, status in _of_workers("status").items():
        # A process that is ending has no memory any more.
        lines = [line for line in status.splitlines() if line.startswith(f"{field}:")]
        if lines:
            found[process] = int(lines[0].split()[1]) * 1024
    return found


def _of_workers(name: str) -> dict[int, str]:
    """What the system tells in one of its files about every worker process, by process."""
    found = {}
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(WORKER):
                found[process.pid] = Path(f"/proc/{process.pid}/{name}").read_text()
        except (psutil.Error, OSError):
            continue
    return found
