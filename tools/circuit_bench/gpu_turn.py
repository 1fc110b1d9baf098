"""Turns on one GPU among processes that measure at the same time: who holds the lock computes.

Compiling a peer keeps a core busy for half a minute and computes nothing on the GPU: it is done
before a turn, while other processes measure. The lock is the file named by CIRCUIT_BENCH_LOCK;
without it there is nothing to wait for.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

_lock: IO[str] | None = None


def take() -> None:
    """Wait for the GPU, and keep it until the process ends or `give` gives it away."""
    global _lock
    path = os.environ.get("CIRCUIT_BENCH_LOCK")
    if path and _lock is None:
        _lock = Path(path).open("w")  # noqa: SIM115
    if _lock is not None:
        fcntl.flock(_lock, fcntl.LOCK_EX)


def give() -> None:
    """Leave the GPU to others."""
    if _lock is not None:
        fcntl.flock(_lock, fcntl.LOCK_UN)
