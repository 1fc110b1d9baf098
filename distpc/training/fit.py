"""`distpc.fit`: training in one process on an array in memory, without the pipeline."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.data.plan import SamplePlan, num_steps
from distpc.errors import ConfigError, TrainingError
from distpc.parallel.heap import steady
from distpc.parallel.progress import Progress
from distpc.training.arrays import Array, as_samples
from distpc.training.figures import Figures, tally
from distpc.training.guard import Guard
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Smoothing, make_rule
from distpc.training.schedule import Schedule, make_schedule
from distpc.training.start import MARGINAL_SAMPLES, smooth_over_neighbours, standardise_if_new


def fit(
    circuit: Circuit,
    data: Array,
    *,
    rule: str = "online_em",
    epochs: int = 20,
    batch_size: int = 256,
    step_size: float = 0.3,
    final_step_size: float = 0.01,
    schedule: str | Schedule = "linear",
    momentum: float = 0.9,
    pseudocount: float = 0.1,
    leaf_pseudocount: float = 1.0,
    leaf_width: float = 0.0,
    gradient_learning_rate: float = 0.01,
    gradient_clip: float = 1.0,
    update_in_backward: bool = False,
    valid: Array | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a circuit in place, from the parameters that it has.

    Args:
        circuit: trained in place, on the device that it is on; with `valid`, it ends with the
            parameters of the best epoch.
        data: (N, V) integers with -1 for missing values, or floats with NaN.
        rule: online_em, mini_batch_em, full_batch_em, anemone or adam; see `training.rules`.
        epochs: passes over the data.
        batch_size: samples per update (all of the data, if there are fewer); full_batch_em updates
            once an epoch, from batches of this size.
        step_size, final_step_size: first and last step size; of the rule adam its learning rate,
            about 0.01.
        schedule: "linear" from first to last, "cosine", "constant" (the first throughout), or a
            function from samples consumed to a step size, see `training.schedule`.
        momentum: of the flows (rule anemone).
        pseudocount: samples' worth of smoothing a sum row, of the whole data set's samples.
        leaf_pseudocount: samples' worth of smoothing an input row.
        leaf_width: smoothing of categorical input rows over neighbouring values, for values that
            have an order: standard deviation in values; 0 for none.
        gradient_learning_rate: of Adam, for parameters that follow gradients.
        gradient_clip: largest entry of their gradients.
        update_in_backward: rule online_em alone: update each table during the backward pass, as
            soon as its flow is complete. Same result, with the statistics once in memory instead of
            three times: no gradients are held, and no copy to return to, so that a training that
            fails before the first validation leaves the circuit as its last step left it.
        valid: (N', V) samples to choose the best epoch by; keeps a copy of the best statistics.
        seed: of the order of samples.
        progress: whether to show a progress bar.

    Returns:
        A row an epoch: `epoch`, `train_bits` (bits per observed value, mean over the epoch's
        batches, each before its own update), `impossible` (training samples of likelihood 0),
        `step_size`, and `valid_bits`, `valid_impossible` where there are validation samples.

    Raises:
        ConfigError: a setting out of its range.
        DataError: the array does not fit the circuit.
        TrainingError: log-likelihoods or statistics are no longer finite; the circuit then has the
            parameters of the best epoch, or those that it came with. Or the rule cannot train this
            circuit.
    """
    _check_settings(
        [
            ("epochs", epochs, epochs >= 0, "0 or more"),
            ("batch_size", batch_size, batch_size >= 1, "1 or more"),
            ("step_size", step_size, 0 < step_size <= 1, "above 0, at most 1"),
            ("final_step_size", final_step_size, 0 < final_step_size <= 1, "above 0, at most 1"),
            ("momentum", momentum, 0 <= momentum < 1, "0 or more, below 1"),
            ("pseudocount", pseudocount, 0 <= pseudocount < math.inf, "0 or more"),
            ("leaf_pseudocount", leaf_pseudocount, 0 <= leaf_pseudocount < math.inf, "0 or more"),
            ("leaf_width", leaf_width, 0 <= leaf_width < math.inf, "0 or more"),
            ("gradient_learning_rate", gradient_learning_rate, gradient_learning_rate > 0, "> 0"),
            ("gradient_clip", gradient_clip, gradient_clip > 0, "above 0"),
        ]
    )
    x = as_samples(circuit, data, "data")
    smoothing = Smoothing(pseudocount, leaf_pseudocount, len(x))
    if isinstance(schedule, str):
        schedule = make_schedule(schedule, step_size, final_step_size, epochs * len(x))
    chosen = make_rule(rule, circuit, smoothing, momentum)
    optimizer = CircuitOptimizer(
        circuit.parameter_groups(),
        rule=chosen,
        gradient_learning_rate=gradient_learning_rate,
        gradient_clip=gradient_clip,
    )
    fitting = _Fitting(
        circuit,
        optimizer,
        schedule,
        x,
        valid=None if valid is None else as_samples(circuit, valid, "valid"),
        epochs=epochs,
        batch_size=min(batch_size, len(x)),
        samples_per_update=len(x) if chosen.needs_all_data else min(batch_size, len(x)),
    )
    with ExitStack() as stack:
        stack.enter_context(steady())
        if update_in_backward:
            stack.enter_context(optimizer.updates_in_backward())
        else:
            fitting.remember()
        bar = stack.enter_context(Progress("fit", fitting.total, "samples")) if progress else None
        try:
            standardise_if_new(circuit, x)
            smooth_over_neighbours(circuit, [x[:MARGINAL_SAMPLES]], leaf_width)
            chosen.start()
            fitting.run(SamplePlan([len(x)], seed), bar)
        except TrainingError:
            fitting.return_to_best()
            raise
    if fitting.best is not None:
        fitting.return_to_best()
    chosen.finish()
    return fitting.history


@dataclass
class _Fitting:
    """One training: its loop and what it knows so far.

    Attributes:
        batch_size: samples put through the circuit at once.
        samples_per_update: samples whose flows make an update.
        history: a row an epoch.
        best: impossible samples and bits of the best validation.
        kept: parameters to return to, and the smoothing that they are read out with.
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

    def run(self, plan: SamplePlan, bar: Progress | None) -> None:
        """Train to the end."""
        size, sums, left = self.samples_per_update, self._no_figures(), self.total
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
                self._end_epoch(epoch, self.schedule(first), Figures.of(sums))
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

    def _end_epoch(self, epoch: int, step_size: float, figures: Figures) -> None:
        row = {
            "epoch": float(epoch),
            "train_bits": figures.bits,
            "impossible": float(figures.impossible),
            "step_size": step_size,
        }
        self.history.append(row)
        if self.valid is None:
            return
        sums = self._no_figures()
        with torch.no_grad():
            for part in self.valid.split(self.batch_size):
                on_device = part.to(self.device)
                sums += tally(self.circuit(on_device), on_device)
        figures = Figures.of(sums)
        self.guard.check_figures(f"validation of epoch {epoch}", figures)
        row["valid_bits"], row["valid_impossible"] = figures.bits, float(figures.impossible)
        rank = (float(figures.impossible), figures.bits)
        if self.best is None or rank < self.best:
            self.best = rank
            self.remember()

    def _no_figures(self) -> Tensor:
        return torch.zeros(len(Figures.NAMES), dtype=torch.float64, device=self.device)


def _check_settings(settings: list[tuple[str, float, bool, str]]) -> None:
    for name, value, is_right, expected in settings:
        if not is_right:
            raise ConfigError(
                "a setting of fit is out of its range", where=name, found=value, expected=expected
            )
