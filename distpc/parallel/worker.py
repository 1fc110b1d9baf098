"""What runs in a worker process of the cluster: one object, and an answer for its errors."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass, replace
from typing import Any

import torch

from distpc.errors import DistpcError, ResourceError
from distpc.parallel.rank import import_target
from distpc.parallel.stopwatch import Stopwatch, Work

_SHOWN_CHARACTERS = 300
_SHOWN_LINES = 15


@dataclass(frozen=True)
class Placeholder:
    """Stands where a handle was, until the worker has its value."""

    position: int


@dataclass(frozen=True)
class Outcome:
    """What became of an item: a value and the time it took, or the error to raise in the driver."""

    value: Any = None
    error: DistpcError | None = None
    work: Work | None = None


class WorkerHost:
    """Constructs `Class(**kwargs)` once and calls its methods, one item at a time.

    Errors are returned, not raised: the driver must tell a failing item from a dying worker.
    """

    def __init__(
        self, worker: str, kwargs: dict[str, Any], num_threads: int, num_gpus: float, *values: Any
    ) -> None:
        self._worker: Any = None
        self._failure: Outcome | None = None
        torch.set_num_threads(num_threads)
        try:
            if num_gpus > 0:
                take_gpu(self.gpu_ids())
            self._worker = import_target(worker)(**fill(kwargs, values))
        except Exception as error:
            self._failure = Outcome(
                error=as_own_error(error, f"{worker}, constructed with", kwargs)
            )
        self._stopwatch = Stopwatch(torch.device("cuda" if num_gpus > 0 else "cpu"))

    def gpu_ids(self) -> list[Any]:
        """The GPUs that the cluster reserved for this process."""
        return []

    def ready(self) -> bool:
        """Answers once the process runs."""
        return True

    def run(self, method: str, item: Any, *values: Any) -> Outcome:
        """Call `method` of the worker with `item`, its placeholders replaced by `values`."""
        if self._failure is not None:
            return self._failure
        try:
            with self._stopwatch.call() as work:
                value = getattr(self._worker, method)(fill(item, values))
            return Outcome(value, work=work)
        except Exception as error:
            return Outcome(
                error=as_own_error(error, f"{type(self._worker).__name__}.{method}", item)
            )

    def run_and_hold(self, method: str, item: Any, *values: Any) -> tuple[Outcome, Any]:
        """As `run` of a method that returns a pair: its first as the outcome, and its second."""
        outcome = self.run(method, item, *values)
        if outcome.error is not None:
            return outcome, None
        note, held = outcome.value
        return replace(outcome, value=note), held


def take_gpu(gpu_ids: list[Any]) -> None:
    """Compute on the first of the GPUs reserved for this process.

    Raises:
        ResourceError: none is reserved, or torch sees none; a silent CPU, or GPU 0 for all, would
            be far worse.
    """
    if not gpu_ids or not torch.cuda.is_available():
        raise ResourceError(
            "a worker that was to compute on a GPU has none",
            where="parallel.gpus_per_worker",
            found=f"reserved: {gpu_ids}, seen by torch: {torch.cuda.device_count()}",
            expected="at least one GPU, reserved for this worker alone and seen by torch",
            fix="check the CUDA installation on that machine, or set parallel.gpus_per_worker=0",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = str(gpu_ids[0])
    # Normally only the reserved GPUs are visible, numbered from 0; a cluster may be set otherwise.
    torch.cuda.set_device(visible.index(own) if own in visible else int(own))


def fill(value: Any, values: tuple[Any, ...]) -> Any:
    """`value` with every placeholder in its dicts, lists and tuples replaced."""
    if isinstance(value, Placeholder):
        return values[value.position]
    if isinstance(value, dict):
        return {key: fill(entry, values) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(fill(entry, values) for entry in value)
    return value


def split(value: Any, handle_type: type, handles: list[Any]) -> Any:
    """`value` with a placeholder for every handle, which is appended to `handles`."""
    if isinstance(value, handle_type):
        handles.append(value)
        return Placeholder(len(handles) - 1)
    if isinstance(value, dict):
        return {key: split(entry, handle_type, handles) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(split(entry, handle_type, handles) for entry in value)
    return value


def as_own_error(error: Exception, place: str, item: Any) -> DistpcError:
    """`error` itself if it is distpc's own, else one that names the item and the cause."""
    if isinstance(error, DistpcError):
        return error
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return DistpcError(
        f"a worker failed: {type(error).__name__}: {error}",
        where=f"{place}: {shown(item)}",
        found="\n".join(["", *lines[-_SHOWN_LINES:]]),
        fix="mend the cause, then run the same command again: finished items are kept",
    )


def shown(item: Any) -> str:
    """`item` as a short text."""
    text = repr(item)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
