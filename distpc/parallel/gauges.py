"""Figures in Ray's dashboard, set by the process that started the ranks or workers of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distpc.artifacts.files import read_json

PREFIX = "distpc_"


class Gauges:
    """One gauge a figure, with the stage as a tag.

    Args:
        gauge: the class `ray.util.metrics.Gauge`.
        stage: that is worked for.
    """

    def __init__(self, gauge: Any, stage: str) -> None:
        self._gauge = gauge
        self._stage = stage
        self._gauges: dict[str, Any] = {}

    def set(self, name: str, value: float, **tags: str) -> None:
        """Show a figure; one name has the same tags in all calls of a process."""
        if name not in self._gauges:
            whose = " and ".join(("stage", *tags))
            description = f"{name.replace('_', ' ')} by {whose}"
            keys = ("stage", *tags)
            self._gauges[name] = self._gauge(PREFIX + name, description, tag_keys=keys)
        self._gauges[name].set(value, {"stage": self._stage, **tags})


class RankGauges(Gauges):
    """Figures of training ranks, with the rank as a tag.

    Ranks are plain processes that know nothing of Ray: rank 0 leaves what all of them measured in
    a file (see `meter`), which this process reads now and then.

    Args:
        gauge: the class `ray.util.metrics.Gauge`.
        path: the file that rank 0 writes; it may not be there yet.
        stage: that the ranks work for.
    """

    def __init__(self, gauge: Any, path: Path, stage: str) -> None:
        super().__init__(gauge, stage)
        self._path = path
        self._read = 0.0

    def pass_on(self) -> None:
        """Set the gauges if the file is new."""
        changed = self._path.stat().st_mtime if self._path.is_file() else 0.0
        if changed == self._read:
            return
        self._read = changed
        for rank, figures in enumerate(read_json(self._path)["ranks"]):
            for name, value in figures.items():
                self.set(name, value, rank=str(rank))

    def lost(self, ranks: list[int]) -> None:
        """Say which ranks failed."""
        for rank in ranks:
            self.set("rank_lost", 1.0, rank=str(rank))
