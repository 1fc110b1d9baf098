"""How many workers fit on the machines of a cluster."""

from __future__ import annotations

from distpc.config.schema import ParallelConfig

# Forgives rounding: 0.3 / 0.1 is less than 3.
_ROUNDING = 1e-6


def count_places(parallel: ParallelConfig, nodes: list[dict[str, float]]) -> int:
    """Workers that fit on machines with "CPU" and "GPU"; each fits on one machine or none."""
    cpus, gpus = parallel.cpus_per_worker, parallel.gpus_per_worker
    places = 0
    for node in nodes:
        by_cpu = node.get("CPU", 0) / cpus
        by_gpu = node.get("GPU", 0) / gpus if gpus else by_cpu
        places += int(min(by_cpu, by_gpu) + _ROUNDING)
    return places
