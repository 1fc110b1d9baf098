"""Threads by which ranks see that another one is lost, whatever they wait for themselves."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from distpc.errors import DistpcError, TrainingError
from distpc.parallel.processes import launcher_chain, leave_for_launcher, still_holds

_GRACE_SECONDS = 5.0
_CHECK_SECONDS = 0.25
FAILURES = "failures"


class Watch:
    """Gives signs of life, looks for those of others, and ends this process when one is lost.

    Rank 0 watches all others, they watch rank 0. A rank that waits in a collective operation can
    be told nothing, so the end is an exit, not an exception. One thread speaks to the store,
    which may hang when a machine is cut off; the other only reads clocks.

    Args:
        store: a connection of its own to the ranks' store.
        prefix: of all keys.
        rank: of this process.
        world_size: number of ranks.
        lost_seconds: silence after which a rank is lost.
        reason: gives the error that the ranks have told of, if any.
    """

    def __init__(
        self,
        store: dist.Store,
        prefix: str,
        rank: int,
        world_size: int,
        lost_seconds: float,
        reason: Callable[[dist.Store], DistpcError | None],
    ) -> None:
        self._store = dist.PrefixStore(prefix, store)
        self._rank = rank
        self._watched = [0] if rank else list(range(1, world_size))
        self._num_ranks = world_size
        self._lost_seconds = lost_seconds
        self._reason = reason
        self._chain = launcher_chain()
        self._stop = threading.Event()
        now = time.monotonic()
        self._seen = dict.fromkeys(self._watched, now)
        self._failed: tuple[float, DistpcError | None] | None = None
        self._cut: tuple[float, str] | None = None
        self._threads = [
            threading.Thread(target=run, daemon=True) for run in (self._speak, self._look)
        ]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch no longer: from now on ranks may leave. Idempotent."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=1.0)

    def _speak(self) -> None:
        interval = min(2.0, self._lost_seconds / 8)
        values: dict[int, bytes] = {}
        beat = 0
        while not self._stop.wait(interval):
            beat += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beat))
                keys = [f"beat/{rank}" for rank in self._watched]
                found = self._store.multi_get(keys) if keys else []
                failed = self._store.add(FAILURES, 0) > 0
                if failed and self._failed is None:
                    self._failed = time.monotonic(), self._reason(self._store)
            except (RuntimeError, OSError) as error:
                self._cut = time.monotonic(), " ".join(str(error).split())[:200]
                return
            now = time.monotonic()
            for rank, value in zip(self._watched, found, strict=True):
                if values.get(rank) != value:
                    values[rank] = value
                    self._seen[rank] = now

    def _look(self) -> None:
        while not self._stop.wait(_CHECK_SECONDS):
            now = time.monotonic()
            if not still_holds(self._chain):
                os._exit(1)
            if self._failed is not None and now - self._failed[0] > _GRACE_SECONDS:
                # Whoever failed is gone; rank 0 tells it, the others only end, later.
                if self._rank == 0:
                    self._end(self._failed[1])
                if now - self._failed[0] > 2 * _GRACE_SECONDS:
                    self._end(None)
            if self._cut is not None and now - self._cut[0] > _GRACE_SECONDS:
                self._end(self._lost(0, f"the ranks' store does not answer: {self._cut[1]}"))
            silent = [r for r, seen in self._seen.items() if now - seen > self._lost_seconds]
            if silent:
                age = f"no sign of life for {self._lost_seconds:g} s (parallel.lost_seconds)"
                self._end(self._lost(silent[0], age))

    def _lost(self, rank: int, found: str) -> TrainingError:
        return TrainingError(
            f"rank {rank} of {self._num_ranks} is lost",
            where=f"seen from rank {self._rank}",
            found=found,
            expected="every rank alive and reachable",
            fix="start the ranks again with the same command, without the lost machine if need "
            "be: finished work is kept",
        )

    def _end(self, error: DistpcError | None) -> None:
        if self._stop.is_set():
            return
        if error is not None:
            print(f"distpc: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            leave_for_launcher(error)
        os._exit(2)
