"""Step sizes as a function of how much data was seen, whatever the number of ranks.

Counting samples instead of steps makes a schedule the same for every number of ranks and for a run
that was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distpc.errors import ConfigError

Schedule = Callable[[int], float]
"""Samples consumed before a batch -> step size for that batch."""

SCHEDULES = ("constant", "linear", "cosine", "piecewise")
WARMUP_START = 0.1
"""Share of the step size at which a warm-up begins."""


@dataclass(frozen=True)
class ConstantSchedule:
    """The same value throughout."""

    value: float

    def __call__(self, samples_consumed: int) -> float:
        """The value for a batch that starts after `samples_consumed` samples."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule:
    """Falls (or rises) linearly from `first` at 0 samples to `last` at `total_samples`.

    Attributes:
        first: value before any sample was consumed.
        last: value once `total_samples` were consumed, and from there on.
        total_samples: samples of the whole training.
    """

    first: float
    last: float
    total_samples: int

    def __call__(self, samples_consumed: int) -> float:
        """The value for a batch that starts after `samples_consumed` samples."""
        fraction = _fraction(samples_consumed, self.total_samples)
        return self.first * (1 - fraction) + self.last * fraction


@dataclass(frozen=True)
class CosineSchedule:
    """Falls along half a cosine from `first` to `last`; attributes as of `LinearSchedule`."""

    first: float
    last: float
    total_samples: int

    def __call__(self, samples_consumed: int) -> float:
        """The value for a batch that starts after `samples_consumed` samples."""
        fraction = _fraction(samples_consumed, self.total_samples)
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * fraction)) / 2


@dataclass(frozen=True)
class PiecewiseSchedule:
    """Linear between milestones, constant outside: PyJuice's `multi_linear`.

    Its benchmarks fall from 0.9 over 0.1 to 0.05 at steps 0, 20,000 and 100,000 (`papers.md` C.3),
    which at a batch of 256 is `PiecewiseSchedule([(0, .9), (5_120_000, .1), (25_600_000, .05)])`.

    Attributes:
        milestones: (samples, value), by rising samples; two of the same samples make a jump.
    """

    milestones: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        samples = [place for place, _ in self.milestones]
        if not samples or samples != sorted(samples):
            raise ConfigError(
                "a schedule's milestones are not in order",
                where="milestones",
                found=list(self.milestones),
                expected="at least one pair (samples, step size), by rising samples",
            )

    def __call__(self, samples_consumed: int) -> float:
        """The value for a batch that starts after `samples_consumed` samples."""
        before = [pair for pair in self.milestones if pair[0] <= samples_consumed]
        after = [pair for pair in self.milestones if pair[0] > samples_consumed]
        if not before or not after:
            return (before or after)[-1 if before else 0][1]
        (start, first), (end, last) = before[-1], after[0]
        return first + (last - first) * (samples_consumed - start) / (end - start)


@dataclass(frozen=True)
class WarmUp:
    """Another schedule, times a factor that rises linearly from 0.1 to 1.

    Attributes:
        schedule: the other one.
        samples: how long the factor rises.
    """

    schedule: Schedule
    samples: int

    def __call__(self, samples_consumed: int) -> float:
        """The value for a batch that starts after `samples_consumed` samples."""
        fraction = _fraction(samples_consumed, self.samples)
        return self.schedule(samples_consumed) * (WARMUP_START + (1 - WARMUP_START) * fraction)


def make_schedule(
    kind: str,
    first: float,
    last: float,
    total_samples: int,
    *,
    warmup_samples: int = 0,
    milestones: Sequence[tuple[int, float]] = (),
) -> Schedule:
    """A schedule by its name.

    Args:
        kind: one of `SCHEDULES`.
        first, last: values at both ends; constant: `first` alone; piecewise: not used.
        total_samples: samples of the whole training.
        warmup_samples: see `WarmUp`; 0 for none.
        milestones: of a piecewise schedule.

    Raises:
        ConfigError: an unknown kind, or milestones that are not in order.
    """
    made: dict[str, Callable[[], Schedule]] = {
        "constant": lambda: ConstantSchedule(first),
        "linear": lambda: LinearSchedule(first, last, total_samples),
        "cosine": lambda: CosineSchedule(first, last, total_samples),
        "piecewise": lambda: PiecewiseSchedule(milestones),
    }
    if kind not in made:
        raise ConfigError(
            "there is no such schedule",
            where="schedule",
            found=kind,
            expected=", ".join(SCHEDULES),
        )
    schedule = made[kind]()
    return WarmUp(schedule, warmup_samples) if warmup_samples else schedule


def _fraction(samples: int, total: int) -> float:
    return 1.0 if total <= 0 else min(1.0, samples / total)
