#!/usr/bin/env python3
"""K-means on Ray workers against faiss-cpu and scikit-learn, in one run.

    pip install -e '.[bench,dev]'
    python tools/bench_kmeans.py --json              1,000,000 x 128, K = 1,024 (four minutes)
    python tools/bench_kmeans.py --quick --json      under a minute
    python tools/bench_kmeans.py --large --json      10,000,000 x 64, K = 4,096, and no peer

The points are float16 on disk; peers get the same values in float32 and in memory. All sides start
from the same centroids and take turns, two threads each (two workers of one thread); times are
medians over rounds, ours with Ray and the driver included, faiss's by its own clock. `inertia` and
`faiss_inertia` are those after 20 rounds from each side's own seeding, measured alike.
`peak_bytes_over_features` is the sum over workers of peak resident memory less that after imports,
over the bytes of the float32 features (what lies on disk is half of that), the most of runs on 1, 2
and 4 workers. --large reports an iteration against the rate of this machine's matrix products.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from kmeans_bench.ours import cluster_points, parallel
from kmeans_bench.peers import faiss_rounds, sklearn_seconds
from kmeans_bench.points import read_points, write_points

from distpc.artifacts import Artifact
from distpc.latents.nearest import assign_points
from distpc.parallel.cluster import Cluster

THREADS = 2
MOST_WORKERS = 4
ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """A case: n points of width d in so many shards, k clusters."""

    n: int
    d: int
    k: int
    shards: int
    rounds: int
    turns: int


FULL = Size(1_000_000, 128, 1024, 40, 20, 3)
QUICK = Size(100_000, 64, 256, 20, 20, 1)
LARGE = Size(10_000_000, 64, 4096, 100, 2, 1)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a small case, under a minute")
    which.add_argument("--large", action="store_true", help="10 M points from disk, no peer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    size = QUICK if options.quick else LARGE if options.large else FULL
    with tempfile.TemporaryDirectory(prefix="bench-kmeans-") as temporary:
        folder = Path(temporary)
        features = write_points(folder / "features", size.n, size.d, size.k, size.shards)
        with Cluster.connect(parallel(MOST_WORKERS)) as cluster:
            run = large if options.large else compare
            facts = run(cluster, features, folder / "fit", size)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name:32} {value:.5g}" if isinstance(value, float) else f"{name:32} {value}")
    return 0


def compare(cluster: Cluster, features: Artifact, folder: Path, size: Size) -> dict[str, Any]:
    """Against both peers."""
    x = read_points(features)
    rng = np.random.default_rng(0)
    first = x[np.sort(rng.choice(len(x), size.k, replace=False))].copy()
    start = torch.from_numpy(first)
    times: dict[str, list[float]] = {"ours": [], "faiss": [], "sklearn": []}
    for _ in range(size.turns):
        two = cluster_points(cluster, features, folder, 2, size.k, ROUNDS, start)
        times["ours"] += two.seconds
        times["faiss"] += faiss_rounds(x, size.k, 4, first, THREADS)[1]
        times["sklearn"].append(sklearn_seconds(x, first, 2, THREADS))
        tell({side: round(median(values), 3) for side, values in times.items()})
    others = [
        cluster_points(cluster, features, folder, workers, size.k, ROUNDS, start)
        for workers in (1, 4)
    ]
    own = cluster_points(cluster, features, folder, 2, size.k, size.rounds)
    theirs, _ = faiss_rounds(x, size.k, size.rounds, None, THREADS)
    torch.set_num_threads(THREADS)
    theirs_squares = assign_points(torch.from_numpy(x), torch.from_numpy(theirs))[1]
    return {
        "n": size.n,
        "d": size.d,
        "k": size.k,
        "seconds_per_iteration": median(times["ours"]),
        "faiss_seconds_per_iteration": median(times["faiss"]),
        "sklearn_seconds_per_iteration": median(times["sklearn"]),
        "inertia": own.inertia[-1],
        "faiss_inertia": theirs_squares.double().sum().item(),
        "peak_bytes_over_features": max(sum(run.growth) for run in (own, *others)) / x.nbytes,
        "identical_for_workers": all(
            torch.equal(other.centroids, two.centroids) for other in others
        ),
    }


def large(cluster: Cluster, features: Artifact, folder: Path, size: Size) -> dict[str, Any]:
    """Alone, against this machine's matrix products."""
    before = matmul_rate()
    result = cluster_points(cluster, features, folder, 2, size.k, size.rounds, init="random")
    rate = max(before, matmul_rate())
    seconds = median(result.seconds)
    gflops = 2e-9 * size.n * size.d * size.k / seconds
    return {
        "n": size.n,
        "d": size.d,
        "k": size.k,
        "seconds_per_iteration": seconds,
        "gflops": gflops,
        "matmul_gflops": rate,
        "fraction_of_matmul": gflops / rate,
        "peak_bytes_a_worker": max(result.growth),
    }


def matmul_rate() -> float:
    """GFLOP/s of large float32 products on two threads, the best of several."""
    side = 2048
    torch.set_num_threads(THREADS)
    x, out = torch.randn(side, side), torch.empty(side, side)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(x, x, out=out)
        best = max(best, 2e-9 * side**3 / (time.perf_counter() - start))
    return best


def tell(facts: dict[str, Any]) -> None:
    """Progress, to standard error."""
    print(facts, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
