"""What the workers of a stage did with their time: for its manifest, TensorBoard and Ray."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

from distpc.parallel.event_files import Curves
from distpc.parallel.gauges import Gauges
from distpc.parallel.meter import by_member
from distpc.parallel.stopwatch import PARTS, Work

SHOW_SECONDS = 5.0
"""Time between two points of the curves."""


class Tally:
    """Adds up the calls of all workers, and shows them while they work, as a context manager.

    Args:
        stage: that they work for.
        folder: of its event files; None: no curves. Those of an earlier attempt are removed.

    Attributes:
        curves: for what else the stage has to show; None outside of the context.
        calls: finished ones, by which curves are numbered.
        seconds: by part, over all workers.
        counts: of what all worked through.
        lost: workers that died.
    """

    def __init__(self, stage: str, folder: Path | None = None) -> None:
        self.stage = stage
        self.curves: Curves | None = None
        self.calls = 0
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.counts: Counter[str] = Counter()
        self.lost = 0
        self._folder = folder
        self._gauges: Gauges | None = None
        self._workers: dict[str, dict[str, float]] = {}
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._most = 0
        self._start = 0.0
        self._began: float | None = None
        self._ended = self._shown = 0.0

    def show_in(self, gauges: Gauges) -> None:
        """Show all in these from now on, too."""
        self._gauges = gauges

    def running(self, number: int, seconds: float) -> None:
        """Note how many workers run, and how long the first took to start."""
        self._most = max(self._most, number)
        if self._began is None:
            self._began = self._ended = time.monotonic()
            self._start = seconds

    def add(self, work: Work) -> None:
        """Note a finished call."""
        self.calls += 1
        self._ended = time.monotonic()
        self.counts.update(work.counts)
        own = self._workers.setdefault(work.worker, dict.fromkeys(map(_seconds, PARTS), 0.0))
        for name, value in work.seconds.items():
            self.seconds[name] += value
            own[_seconds(name)] += value
        self._counts[work.worker].update(work.counts)
        own |= _rates(self._counts[work.worker], work.age_seconds)
        own["peak_memory_bytes"] = float(work.peak_memory_bytes)
        if work.tflops is not None and work.device_peak_fraction is not None:
            own["tflops"] = work.tflops
            own["device_peak_fraction"] = work.device_peak_fraction
        if self._ended - self._shown >= SHOW_SECONDS:
            self._show()

    def to_json(self) -> dict[str, Any]:
        """Figures for the stage's metadata: seconds by part over all workers, seconds until the
        first worker ran and from there to the last result, rates by what was counted, workers side
        by side at most and those that died, and the most memory that one of them held."""
        peaks = [own["peak_memory_bytes"] for own in self._workers.values()]
        return {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "start_seconds": round(self._start, 3),
            "wall_seconds": round(self._wall, 3),
            **{name: round(value, 3) for name, value in self._rates().items()},
            "most_workers": self._most,
            "lost_workers": self.lost,
            "peak_memory_bytes": int(max(peaks, default=0)),
            **self._speeds(),
        }

    def _speeds(self) -> dict[str, float]:
        """Of the workers whose operations were counted, each at its last counted call."""
        counted = [own for own in self._workers.values() if "tflops" in own]
        if not counted:
            return {}
        fractions = [own["device_peak_fraction"] for own in counted]
        return {
            "tflops": round(sum(own["tflops"] for own in counted), 6),
            "device_peak_fraction": round(sum(fractions) / len(fractions), 4),
        }

    @property
    def _wall(self) -> float:
        return 0.0 if self._began is None else self._ended - self._began

    def _rates(self) -> dict[str, float]:
        return _rates(self.counts, self._wall)

    def _show(self) -> None:
        self._shown = self._ended
        figures, workers = self._rates(), list(self._workers.values())
        figures["lost"] = float(self.lost)
        if self.curves is not None and workers:
            self.curves.scalars(self.calls, {f"workers/{name}": v for name, v in figures.items()})
            self.curves.scalars(self.calls, by_member(workers, "workers"))
        if self._gauges is not None:
            for name, value in figures.items():
                self._gauges.set(f"workers_{name}", value)
            for worker, own in self._workers.items():
                for name, value in own.items():
                    self._gauges.set(f"worker_{name}", value, worker=worker)

    def __enter__(self) -> Tally:
        if self._folder is not None:
            for path in self._folder.glob("events.out.tfevents.*"):
                path.unlink()
            self.curves = Curves(self._folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show()
        if self.curves is not None:
            self.curves.close()
            self.curves = None


def _seconds(name: str) -> str:
    return f"{name}_seconds"


def _rates(counts: Counter[str], seconds: float) -> dict[str, float]:
    if seconds <= 0:
        return {}
    return {f"{name}_per_second": number / seconds for name, number in sorted(counts.items())}
