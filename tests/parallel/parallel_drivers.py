"""Driver processes for the tests that kill: python parallel_drivers.py NAME ARGUMENTS.

They run anywhere, with the package on their own sys.path alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]


def ranks(out: str) -> None:
    """Two ranks that never end; the error that ends them goes to standard output."""
    from distpc.parallel.launch import run_ranks

    run_ranks(
        "parallel_targets:wait_for_ever",
        {"out": out},
        num_ranks=2,
        threads_per_rank=1,
        log_folder=Path(out, "logs"),
    )


def sleeping_cluster(out: str) -> None:
    """A cluster of its own, with one worker in the middle of an item."""
    import torch

    from distpc.config.schema import ParallelConfig
    from distpc.parallel.cluster import Cluster

    with Cluster.connect(ParallelConfig(num_workers=1)) as cluster:
        items = [{"value": 1, "mark": str(Path(out, "mark"))}]
        print(list(cluster.map("parallel_targets:Adder", {"base": torch.zeros(1)}, items)))


def mapping(num_workers: str) -> None:
    """Whatever cluster there is, used once and left."""
    import torch

    from distpc.config.schema import ParallelConfig
    from distpc.parallel.cluster import Cluster

    with Cluster.connect(ParallelConfig(num_workers=int(num_workers))) as cluster:
        items = [{"value": value} for value in range(4)]
        results = dict(cluster.map("parallel_targets:Adder", {"base": torch.ones(2)}, items))
    print(sorted(results.items()))


if __name__ == "__main__":
    from distpc.errors import DistpcError

    try:
        globals()[sys.argv[1]](*sys.argv[2:])
    except DistpcError as error:
        print(f"{type(error).__name__} {error}")
        sys.exit(3)
