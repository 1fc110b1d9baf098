"""Time on a GPU: device events, interleaved rounds, a bound on what may hang, peak memory."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch

Work = Callable[[], object]


class TooSlow(Exception):
    """What was tried took longer than it was given."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` inside once the time is over; a running kernel ends first. May be nested."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"not done within {seconds:.0f} s")

    begun = time.perf_counter()
    before = signal.signal(signal.SIGALRM, give_up)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, min(seconds, _left()))
    try:
        yield
    finally:
        left = max(0.01, outer - (time.perf_counter() - begun)) if outer else 0.0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def _left() -> float:
    """Seconds until an outer limit is reached."""
    return signal.getitimer(signal.ITIMER_REAL)[0] or float("1e9")


def seconds(work: Work, device: str) -> float:
    """Time of one call: between two events on a GPU, by the clock on a CPU."""
    if device == "cpu":
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def medians(
    works: Mapping[str, Work], device: str, rounds: int, budget: float
) -> dict[str, tuple[float, float]]:
    """Median seconds of each work over interleaved rounds, and the spread (largest - least).

    Args:
        works: calls by name; they have warmed up already.
        device: where they run.
        rounds: at least 3 are run, more until `rounds` or the budget is used up.
        budget: seconds in all.
    """
    begun = time.perf_counter()
    taken: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    for number in range(rounds):
        for name, work in works.items():
            taken[name].append(seconds(work, device))
        if number >= 2 and time.perf_counter() - begun > budget:
            break
    return {name: (statistics.median(t), max(t) - min(t)) for name, t in taken.items()}


def free(device: str) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def held(device: str) -> int:
    """Bytes that tensors hold on the device."""
    if device == "cpu":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    start_peak(device)
    return torch.cuda.memory_allocated()


def start_peak(device: str) -> None:
    """Let the high-water mark start anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    """The high-water mark since `held` or `start_peak`."""
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a size did not fit, whoever says so."""
    words = str(error).lower()
    return (
        isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
        or "out of memory" in words
        or "can't allocate memory" in words
    )
