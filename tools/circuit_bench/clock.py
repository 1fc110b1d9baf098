"""Time several things in turn, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from distpc.parallel.heap import steady

Work = Callable[[], object]


def seconds(work: Work, device: str) -> float:
    """Wall time of one call, the device's queue included."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def medians(works: Mapping[str, Work], device: str, rounds: int, budget: float) -> dict[str, float]:
    """Median seconds of each work over interleaved rounds, after one call of each to warm up.

    Args:
        works: calls by name.
        device: whose queue to wait for.
        rounds: at least 3 are run, more until `rounds` or the budget is used up.
        budget: seconds in all.
    """
    begun = time.perf_counter()
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    # What training does for itself serves all sides.
    with steady():
        for number in range(rounds):
            for name, work in works.items():
                taken[name].append(seconds(work, device))
            if number >= 2 and time.perf_counter() - begun > budget:
                break
    return {name: statistics.median(values) for name, values in taken.items()}
