"""Errors as JSON, so that what a rank raises can be raised again by the process that waits."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distpc import errors
from distpc.artifacts.files import read_json, write_json
from distpc.errors import DistpcError


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


def write_failure(path: Path, error: BaseException) -> None:
    """Write `error` to `path`, whole or not at all."""
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
    write_json(
        path,
        {
            "error": own,
            "summary": f"{type(error).__name__}: {error}",
            "trace": "".join(traceback.format_exception(error)),
            "time": time.time(),
        },
    )


def read_failure(path: Path) -> Failure | None:
    """What `write_failure` wrote, or None where there is no such file."""
    if not path.is_file():
        return None
    value = read_json(path)
    own = value["error"]
    return Failure(
        None if own is None else _own_error(own), value["summary"], value["trace"], value["time"]
    )


def _own_error(fields: dict[str, Any]) -> DistpcError:
    kind = getattr(errors, fields["kind"], DistpcError)
    details = {name: fields[name] for name in ("where", "found", "expected", "fix")}
    return kind(fields["what"], **details)
