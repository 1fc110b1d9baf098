"""The loop of `fit` around the fused step: an epoch is queued without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from distpc.circuits.kernels.step import FastStep
from distpc.data.plan import SamplePlan, num_steps
from distpc.data.spec import MISSING
from distpc.parallel.progress import Progress
from distpc.training.figures import Figures, tally
from distpc.training.fitting import Fitting

_STEPS_AT_ONCE = 1024
"""Steps whose order of samples goes to the device in one copy."""


class FastLoop:
    """Trains what a `Fitting` describes by the fused step.

    The samples are kept on the device, in the narrowest type that holds them. What may go wrong
    in a batch is looked for at the end of an epoch: samples with likelihoods of 0 or NaN have
    passed no flow, so that the statistics are sound until then.

    Args:
        fitting: what to train; its rule is online EM, with one batch an update.
        dtype: of messages and weights.
    """

    def __init__(self, fitting: Fitting, dtype: torch.dtype = torch.bfloat16) -> None:
        self.fitting = fitting
        self.fast = FastStep(fitting.circuit, fitting.batch_size, dtype=dtype)
        self.x = _narrow(fitting.x).to(fitting.device)
        fitting.likelihoods = self._likelihoods
        self.most_impossible = torch.zeros((), dtype=torch.int64, device=fitting.device)

    def run(self, plan: SamplePlan, bar: Progress | None) -> None:
        """Train to the end."""
        fitting, size = self.fitting, self.fitting.batch_size
        sums, glance = fitting.no_figures(), _Glance(fitting.device)
        rows, left = self.x[:0, 0], fitting.total
        for step in range(num_steps(fitting.total, size)):
            first = step * size
            place = step % _STEPS_AT_ONCE
            if place == 0:
                wanted = min(_STEPS_AT_ONCE * size, -(-(fitting.total - first) // size) * size)
                taken = torch.from_numpy(plan.take(first, first + wanted)[1])
                rows = taken.to(fitting.device)
            x = self.x[rows[place * size : (place + 1) * size]]
            log_prob = self.fast.step(x, fitting.schedule(first))
            totals = tally(log_prob, x)
            sums += totals
            torch.maximum(self.most_impossible, totals[3].long(), out=self.most_impossible)
            if bar is not None:
                bar.advance(min(size, left), **glance.figures(sums))
            left -= min(size, left)
            epoch = min(first + size, fitting.total) // len(self.x)
            if epoch > first // len(self.x):
                self._end_epoch(step + 1, epoch, fitting.schedule(first), Figures.of(sums))
                sums.zero_()

    def _end_epoch(self, step: int, epoch: int, step_size: float, figures: Figures) -> None:
        fitting = self.fitting
        state = dict(fitting.circuit.named_parameters())
        fitting.guard.check_statistics(step, state)
        fitting.guard.check_batch(
            step,
            not_a_number=figures.not_a_number,
            impossible=int(self.most_impossible),
            size=fitting.batch_size,
        )
        self.most_impossible.zero_()
        fitting.end_epoch(epoch, step_size, figures)

    def _likelihoods(self, x: Tensor) -> Tensor:
        """Of up to a batch of samples."""
        missing = x.new_full((self.fast.batch_size - len(x), x.shape[1]), MISSING)
        codes = torch.where(x.isnan(), MISSING, x) if x.is_floating_point() else x
        return self.fast.evaluate(torch.cat([codes, missing.to(codes.dtype)]))[: len(x)].clone()


class _Glance:
    """Figures on their way to the host, shown once they are there: looking does not wait."""

    def __init__(self, device: torch.device) -> None:
        self.is_async = device.type == "cuda"
        self.host = torch.zeros(len(Figures.NAMES), dtype=torch.float64, pin_memory=self.is_async)
        self.event: torch.cuda.Event | None = None
        self.shown: dict[str, float] = {}

    def figures(self, sums: Tensor) -> dict[str, float]:
        """What is known by now of the epoch's sums."""
        if not self.is_async:
            return {"bits": Figures.of(sums).bits}
        if self.event is None or self.event.query():
            if self.event is not None:
                self.shown = {"bits": Figures.of(self.host).bits}
            self.host.copy_(sums, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        return self.shown


def _narrow(x: Tensor) -> Tensor:
    """Samples (N, V), int64 or float32 with NaN, as integers with -1 of the narrowest type."""
    codes = torch.where(x.isnan(), MISSING, x) if x.is_floating_point() else x
    least, largest = int(codes.min()), int(codes.max())
    # Signed types: -1 is a missing value wherever samples are counted.
    for dtype in (torch.int8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= least and largest <= limits.max:
            return codes.to(dtype)
    raise ValueError(f"categories up to {largest}: more than the fused step can number")
