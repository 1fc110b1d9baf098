"""Where the time of a rank's steps goes: now and then one is looked at closely.

Communication is what torch's profiler sees of collective operations, DeepSpeed's and ours alike:
the time in which at least one is under way. Profiling costs some tens of milliseconds, so that one
step in many is measured.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from distpc.artifacts.files import write_json
from distpc.parallel.collectives import gather_objects
from distpc.parallel.mesh import Mesh

T = TypeVar("T")

FIGURES = "figures.json"
"""Where rank 0 leaves them, in a stage's folder of logs."""
_FIRST = 2
"""The step that is measured first: the very first does what no other has to."""
_COLLECTIVE = "gloo:", "nccl"
_MATRIX = {"cpu": 512, "cuda": 8192}
_TRIALS = 5


class Meter:
    """Measures steps of one rank.

    Args:
        mesh: this process among the ranks.
        flops_per_sample: floating-point operations that a step takes for a sample, on this rank;
            None: torch counts those of the first step that `run` is given.
        every: steps between two that are measured; 0: none is.
        folder: where rank 0 leaves the figures of all; None: nowhere.

    Attributes:
        figures: of every rank, in their order, at the last step that was measured; see `step`.
        measured_step: number of that step, 0 before there is one.
    """

    def __init__(
        self, mesh: Mesh, flops_per_sample: float | None, every: int, folder: Path | None = None
    ) -> None:
        self.mesh = mesh
        self.folder = folder
        self.flops_per_sample = flops_per_sample
        self.every = every
        self.figures: list[dict[str, float]] = []
        self.measured_step = 0
        self._waited = 0.0
        self._device_flops = matmul_flops(mesh.device) if every else 0.0

    def is_due(self, step: int) -> bool:
        """Whether a step is measured; the same on every rank."""
        return self.every > 0 and (step == _FIRST or step % self.every == 0)

    def run(self, step: int, num_samples: int, waited: float, update: Callable[[], T]) -> T:
        """Do a step by `update`, and measure it if it is due; a collective.

        Args:
            step: its number, from 1.
            num_samples: of this rank.
            waited: seconds that this rank waited for data so far, in all steps.
        """
        waiting, self._waited = waited - self._waited, waited
        if self.every and self.flops_per_sample is None:
            # Not measured as well: counting takes time.
            with FlopCounterMode(display=False) as counter:
                outcome = update()
            self.flops_per_sample = counter.get_total_flops() / max(1, num_samples)
            return outcome
        if not self.is_due(step):
            return update()
        with self.step(num_samples, waiting):
            outcome = update()
        self.measured_step = step
        return outcome

    @contextmanager
    def step(self, num_samples: int, data_seconds: float) -> Iterator[None]:
        """Measure what happens inside, and tell the other ranks; a collective.

        Figures of a rank: samples_per_second, tflops (1e12 operations a second), its fraction
        device_peak_fraction of what products of matrices reach on the device, seconds of the step
        and in compute_seconds, communication_seconds and data_seconds, and peak_memory_bytes.

        Args:
            num_samples: of this rank.
            data_seconds: that it waited for them.
        """
        with _collectives(self.mesh.device) as intervals:
            began = time.perf_counter()
            yield
            finish(self.mesh.device)
            busy = time.perf_counter() - began
        seconds = busy + data_seconds
        communication = min(covered(intervals), busy)
        flops = (self.flops_per_sample or 0.0) * num_samples / seconds
        own = {
            "samples_per_second": num_samples / seconds,
            "tflops": flops / 1e12,
            "device_peak_fraction": flops / self._device_flops,
            "step_seconds": seconds,
            "compute_seconds": busy - communication,
            "communication_seconds": communication,
            "data_seconds": data_seconds,
            "peak_memory_bytes": float(peak_memory_bytes(self.mesh.device)),
        }
        self.figures = gather_objects(own, self.mesh)
        if self.folder is not None and self.mesh.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / FIGURES, {"ranks": self.figures})


def by_member(
    figures: Sequence[Mapping[str, float]], group: str, most: int = 16
) -> dict[str, float]:
    """Figures of the members of a group (ranks, workers) under names for curves: the least and the
    largest, and where members are few each one's."""
    named = {}
    for name in dict.fromkeys(name for own in figures for name in own):
        values = {number: own[name] for number, own in enumerate(figures) if name in own}
        named[f"{group}/{name}/least"] = min(values.values())
        named[f"{group}/{name}/largest"] = max(values.values())
        if len(figures) <= most:
            named |= {f"{group}/{name}/{number}": value for number, value in values.items()}
    return named


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the intervals (begin, end) lies."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def matmul_flops(device: torch.device) -> float:
    """Operations a second that float32 products of large matrices reach on a device."""
    size = _MATRIX[device.type]
    a = torch.rand(size, size, device=device)
    seconds = []
    for _ in range(_TRIALS):
        finish(device)
        began = time.perf_counter()
        a @ a
        finish(device)
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process held so far: of the accelerator if it uses one, else RAM."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux gives kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finish(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _collectives(device: torch.device) -> Iterator[list[tuple[float, float]]]:
    """Inside, collective operations are noted; after it the list holds when each began and ended,
    in seconds of the device that did them."""
    # It greets on stderr, once a measurement.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_device = None if device.type == "cpu" else device.type
    intervals: list[tuple[float, float]] = []
    with profile(use_kineto=True, use_device=on_device) as watched:
        yield intervals
    assert watched.kineto_results is not None
    for event in watched.kineto_results.events():
        # On a GPU the kernels, not the calls that put them into a queue.
        of_device = str(event.device_type()).lower().endswith(device.type)
        if of_device and event.name().startswith(_COLLECTIVE):
            begin = event.start_ns() / 1e9
            intervals.append((begin, begin + event.duration_ns() / 1e9))
