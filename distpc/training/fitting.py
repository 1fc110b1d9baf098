"""One training on an array in memory: its loop, its figures, the parameters to return to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.data.plan import SamplePlan, num_steps
from distpc.parallel.progress import Progress
from distpc.training.figures import Figures, tally
from distpc.training.guard import Guard
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Smoothing
from distpc.training.schedule import Schedule


@dataclass
class Fitting:
    """One training: its loop and what it knows so far.

    Attributes:
        batch_size: samples put through the circuit at once.
        samples_per_update: samples whose flows make an update.
        history: a row an epoch.
        best: impossible samples and bits of the best validation.
        kept: parameters to return to, and the smoothing that they are read out with.
        likelihoods: gives log-likelihoods (B,) of validation samples (B, V) on the device.
    """

    circuit: Circuit
    optimizer: CircuitOptimizer
    schedule: Schedule
    x: Tensor
    valid: Tensor | None
    epochs: int
    batch_size: int
    samples_per_update: int
    history: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, float] | None = None
    kept: tuple[dict[str, Tensor], Smoothing] | None = None

    def __post_init__(self) -> None:
        self.total = self.epochs * len(self.x)
        self.guard = Guard(math.inf)
        self.device = self.circuit.device
        self.likelihoods: Callable[[Tensor], Tensor] = self.circuit

    def run(self, plan: SamplePlan, bar: Progress | None) -> None:
        """Train to the end."""
        size, sums, left = self.samples_per_update, self.no_figures(), self.total
        for step in range(num_steps(self.total, size)):
            first = step * size
            rows = torch.from_numpy(plan.take(first, first + size)[1])
            self.optimizer.set_step_size(self.schedule(first))
            self.optimizer.zero_grad()
            for part in rows.split(self.batch_size):
                totals = self._flows(step, self.x[part].to(self.device), len(rows))
                sums += totals
                if bar is not None:
                    bar.advance(min(len(part), left), bits=Figures.of(totals).bits)
                left -= min(len(part), left)
            self.optimizer.step()
            epoch = min(first + size, self.total) // len(self.x)
            if epoch > first // len(self.x):
                self.guard.check_statistics(step + 1, dict(self.circuit.named_parameters()))
                self.end_epoch(epoch, self.schedule(first), Figures.of(sums))
                sums.zero_()

    def remember(self) -> None:
        """Keep the present parameters to return to."""
        state = {name: value.clone() for name, value in self.circuit.state_dict().items()}
        self.kept = state, Smoothing(*self.circuit.smoothing)

    def return_to_best(self) -> None:
        """Go back to what was kept last: the best epoch, or the start."""
        if self.kept is not None:
            self.circuit.load_state_dict(self.kept[0])
            self.circuit.set_smoothing(*self.kept[1])

    def _flows(self, step: int, x: Tensor, size: int) -> Tensor:
        """Add the flows of some of an update's `size` samples to `.grad`; returns their figures."""
        likelihoods = self.circuit(x)
        totals = tally(likelihoods.detach(), x)
        figures = Figures.of(totals)
        # Before the backward pass, which may update statistics already.
        if figures.not_a_number:
            self.guard.check_statistics(step, dict(self.circuit.named_parameters()))
        self.guard.check_batch(
            step + 1,
            not_a_number=figures.not_a_number,
            impossible=figures.impossible,
            size=len(x),
        )
        kept = torch.where(torch.isfinite(likelihoods), likelihoods, torch.zeros_like(likelihoods))
        # Only `backward` sees a gradient; its value is minus the mean flow.
        (-kept.sum() / size).backward()
        return totals

    def end_epoch(self, epoch: int, step_size: float, figures: Figures) -> None:
        """Write the epoch's row; validate, and keep the parameters if they are the best so far."""
        row = {
            "epoch": float(epoch),
            "train_bits": figures.bits,
            "impossible": float(figures.impossible),
            "step_size": step_size,
        }
        self.history.append(row)
        if self.valid is None:
            return
        figures = Figures.of(self.validate(self.valid))
        self.guard.check_figures(f"validation of epoch {epoch}", figures)
        row["valid_bits"], row["valid_impossible"] = figures.bits, float(figures.impossible)
        rank = (float(figures.impossible), figures.bits)
        if self.best is None or rank < self.best:
            self.best = rank
            self.remember()

    @torch.no_grad()
    def validate(self, x: Tensor) -> Tensor:
        """The sums (5,) that `Figures` holds, of samples that are not trained on."""
        sums = self.no_figures()
        for part in x.split(self.batch_size):
            on_device = part.to(self.device)
            sums += tally(self.likelihoods(on_device), on_device)
        return sums

    def no_figures(self) -> Tensor:
        """Sums over no samples."""
        return torch.zeros(len(Figures.NAMES), dtype=torch.float64, device=self.device)
