"""The same clustering by faiss-cpu and scikit-learn, in this process.

Legend: P points, K clusters, D width.
"""

from __future__ import annotations

import time
import warnings

import numpy as np


def faiss_rounds(
    x: np.ndarray, num_clusters: int, num_rounds: int, first: np.ndarray | None, threads: int
) -> tuple[np.ndarray, list[float]]:
    """faiss's own loop: (K, D) centroids, and seconds of every round but the first.

    Args:
        x: (P, D) float32.
        first: (K, D) float32 centroids; default: its own seeding.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    job = faiss.Kmeans(
        x.shape[1],
        num_clusters,
        niter=num_rounds,
        seed=1,
        # Without this it would look at 256 points a cluster only.
        max_points_per_centroid=len(x),
        min_points_per_centroid=1,
    )
    job.train(x, init_centroids=None if first is None else first.copy())
    seconds = np.diff([stats["time"] for stats in job.iteration_stats]).tolist()
    return np.array(job.centroids), seconds


def sklearn_seconds(x: np.ndarray, first: np.ndarray, num_rounds: int, threads: int) -> float:
    """Seconds of one of scikit-learn's Lloyd rounds, without what it does once."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    taken = []
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)
        for rounds in (1, 1 + num_rounds):
            job = KMeans(
                len(first), init=first, n_init=1, max_iter=rounds, tol=0.0, algorithm="lloyd",
                copy_x=False,
            )  # fmt: skip
            start = time.perf_counter()
            job.fit(x)
            taken.append(time.perf_counter() - start)
    return (taken[1] - taken[0]) / num_rounds
