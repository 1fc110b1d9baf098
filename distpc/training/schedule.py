"""Step sizes as a function of how much data was seen, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSchedule:
    """Falls (or rises) linearly from `first` at 0 samples to `last` at `total_samples`.

    Counting samples instead of steps makes the schedule the same for every number of ranks and
    for a run that was resumed.

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
        if self.total_samples <= 0:
            return self.last
        fraction = min(1.0, samples_consumed / self.total_samples)
        return self.first * (1 - fraction) + self.last * fraction
