"""Errors as JSON, so that what a rank raises can be raised again by the process that waits."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distpc import errors
from distpc.artifacts.files import read_json, write_json
from distpc.errors import DistpcError, TrainingError

_SHOWN_LINES = 15

DISK_FULL = 28
"""Exit status of a rank that found no room to write its error: the number of ENOSPC."""


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank.

    Attributes:
        error: the error itself where it is one of distpc's own, else None.
        summary: its type and message.
        trace: the whole traceback.
        time: seconds since the epoch when it was caught; the earliest is the cause of the rest.
    """

    error: DistpcError | None
    summary: str
    trace: str
    time: float


def to_json(error: BaseException) -> dict[str, Any]:
    """`error`, caught now, as JSON values."""
    own: dict[str, Any] | None = None
    if isinstance(error, DistpcError):
        own = {
            "kind": type(error).__name__,
            "what": error.what,
            "where": error.where,
            "found": error.found,
            "expected": error.expected,
            "fix": error.fix,
        }
    return {
        "error": own,
        "summary": f"{type(error).__name__}: {error}",
        "trace": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }


def from_json(value: dict[str, Any]) -> Failure:
    """The failure that `to_json` described."""
    own = value["error"]
    return Failure(
        None if own is None else _own_error(own), value["summary"], value["trace"], value["time"]
    )


def write_failure(path: Path, error: BaseException) -> None:
    """Write `error` to `path`, whole or not at all."""
    write_json(path, to_json(error))


def read_failure(path: Path) -> Failure | None:
    """What `write_failure` wrote, or None where there is no such file."""
    return from_json(read_json(path)) if path.is_file() else None


def first_own(failures: dict[int, Failure]) -> DistpcError | None:
    """The earliest of distpc's own errors: what came later is what it did to the others."""
    for failure in sorted(failures.values(), key=lambda failure: failure.time):
        if failure.error is not None:
            return failure.error
    return None


def first_rank(failures: dict[int, Failure]) -> int | None:
    """The rank whose failure was the earliest."""
    return min(failures, key=lambda rank: failures[rank].time, default=None)


def rank_failed(rank: int, num_ranks: int, how: str, shown: str, where: Any) -> TrainingError:
    """The error to raise for a rank that ended in an unforeseen way.

    Args:
        rank: its number.
        num_ranks: how many there were.
        how: what it did, as a predicate.
        shown: its traceback or last words, of which the last lines are kept.
        where: its log, or its machine.
    """
    return TrainingError(
        f"training rank {rank} of {num_ranks} {how}",
        where=where,
        found="\n".join(["", *shown.strip().splitlines()[-_SHOWN_LINES:]]) or None,
        expected="every rank to end without an error",
        fix="mend the cause, then run the same command again: finished work is kept",
    )


def _own_error(fields: dict[str, Any]) -> DistpcError:
    kind = getattr(errors, fields["kind"], DistpcError)
    details = {name: fields[name] for name in ("where", "found", "expected", "fix")}
    return kind(fields["what"], **details)
