"""`distpc.fit`: online EM in one process on an array in memory, without the pipeline."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.data.plan import SamplePlan, num_steps
from distpc.data.spec import MISSING
from distpc.errors import ConfigError, DataError, TrainingError
from distpc.parallel.progress import Progress
from distpc.training.figures import Figures, tally
from distpc.training.guard import Guard
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.schedule import LinearSchedule
from distpc.training.start import MARGINAL_SAMPLES, smooth_over_neighbours, standardise_if_new

Array = np.ndarray | Tensor


def fit(
    circuit: Circuit,
    data: Array,
    *,
    epochs: int = 20,
    batch_size: int = 256,
    step_size: float = 0.3,
    final_step_size: float = 0.01,
    pseudocount: float = 0.1,
    leaf_pseudocount: float = 1.0,
    leaf_width: float = 0.0,
    valid: Array | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a circuit in place by online EM, from the parameters that it has.

    Args:
        circuit: trained in place, on the device that it is on; with `valid`, it ends with the
            parameters of the best epoch.
        data: (N, V) integers with -1 for missing values, or floats with NaN.
        epochs: passes over the data.
        batch_size: samples per update (all of the data, if there are fewer).
        step_size, final_step_size: first and last step of online EM, linear in between.
        pseudocount: samples' worth of smoothing a sum row.
        leaf_pseudocount: samples' worth of smoothing a categorical input row.
        leaf_width: smoothing of categorical input rows over neighbouring values, for values that
            have an order: standard deviation in values; 0 for none.
        valid: (N', V) samples to choose the best epoch by.
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
            parameters of the best epoch, or those that it came with.
    """
    smoothing = {
        "pseudocount": pseudocount,
        "leaf_pseudocount": leaf_pseudocount,
        "leaf_width": leaf_width,
    }
    _check_settings(epochs, batch_size, (step_size, final_step_size), smoothing)
    x = as_samples(circuit, data, "data")
    valid_x = None if valid is None else as_samples(circuit, valid, "valid")
    batch_size, total = min(batch_size, len(x)), epochs * len(x)
    standardise_if_new(circuit, x)
    circuit.set_smoothing(pseudocount, leaf_pseudocount, len(x))
    smooth_over_neighbours(circuit, [x[:MARGINAL_SAMPLES]], leaf_width)
    optimizer = CircuitOptimizer(circuit.parameter_groups())
    schedule = LinearSchedule(step_size, final_step_size, total)
    plan, guard = SamplePlan([len(x)], seed), Guard(math.inf)
    history: list[dict[str, float]] = []
    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    before = {name: value.clone() for name, value in circuit.state_dict().items()}
    device = next(circuit.parameters()).device
    sums = torch.zeros(len(Figures.NAMES), dtype=torch.float64, device=device)
    try:
        with Progress("fit", total, "samples") if progress else nullcontext() as bar:
            for step in range(num_steps(total, batch_size)):
                first = step * batch_size
                rows = torch.from_numpy(plan.take(first, first + batch_size)[1])
                optimizer.set_step_size(schedule(first))
                figures = _update(circuit, optimizer, x[rows].to(device), sums)
                if figures.not_a_number:
                    guard.check_statistics(step, dict(circuit.named_parameters()))
                guard.check_batch(
                    step + 1,
                    not_a_number=figures.not_a_number,
                    impossible=figures.impossible,
                    size=batch_size,
                )
                optimizer.step()
                if bar is not None:
                    bar.advance(min(batch_size, total - first), bits=figures.bits)
                epoch = min(first + batch_size, total) // len(x)
                if epoch > first // len(x):
                    guard.check_statistics(step + 1, dict(circuit.named_parameters()))
                    history.append(_row(epoch, schedule(first), Figures.of(sums)))
                    sums.zero_()
                    if valid_x is not None:
                        best = _validate(circuit, guard, valid_x, batch_size, history[-1], best)
    except TrainingError:
        circuit.load_state_dict(before if best is None else best[1])
        raise
    if best is not None:
        circuit.load_state_dict(best[1])
    return history


def _check_settings(
    epochs: int,
    batch_size: int,
    step_sizes: tuple[float, float],
    smoothing: dict[str, float],
) -> None:
    first, last = step_sizes
    rules = [
        ("epochs", epochs, epochs >= 0, "0 or more"),
        ("batch_size", batch_size, batch_size >= 1, "1 or more"),
        ("step_size", first, 0 < first <= 1, "above 0, at most 1"),
        ("final_step_size", last, 0 < last <= 1, "above 0, at most 1"),
        *((name, value, 0 <= value < math.inf, "0 or more") for name, value in smoothing.items()),
    ]
    for name, value, is_right, expected in rules:
        if not is_right:
            raise ConfigError(
                "a setting of fit is out of its range", where=name, found=value, expected=expected
            )


def as_samples(circuit: Circuit, data: Array, name: str) -> Tensor:
    """An array as samples of a circuit: (N, V) on the CPU, int64 with -1, or float32 with NaN,
    where missing.

    Floats stay floats, and circuits with real variables get them; -1 is missing in categorical
    columns of either kind, and a number in real ones.

    Raises:
        DataError: no rows, another number of variables, or an impossible value.
    """
    x = torch.as_tensor(data).cpu()
    if x.dim() != 2 or x.shape[1] != circuit.num_variables or not len(x):
        raise DataError(
            "the array does not fit the circuit",
            where=name,
            found=f"shape {tuple(x.shape)}",
            expected=f"(samples, {circuit.num_variables})",
        )
    x = x.float() if x.is_floating_point() else x.long()
    for variable, count in enumerate(circuit.num_categories):
        values = x[:, variable]
        # NaN is a missing value and compares as within.
        if count is None:
            outside = torch.isinf(values)
        else:
            outside = (values >= count) | ((values < 0) & (values != MISSING))
        if outside.any():
            raise DataError(
                "a value is infinite or outside a variable's categories",
                where=f"{name}, row {int(outside.nonzero()[0])}, column {variable}",
                found=values[outside][0].item(),
                expected="a finite number"
                if count is None
                else f"0 .. {count - 1}, or {MISSING} where missing",
            )
    is_real = torch.tensor([count is None for count in circuit.num_categories])
    if x.is_floating_point() or is_real.any():
        x = torch.where((x == MISSING) & ~is_real, torch.nan, x.float())
    return x


def _update(circuit: Circuit, optimizer: CircuitOptimizer, x: Tensor, sums: Tensor) -> Figures:
    """Flows of one batch into `.grad`; adds its figures to `sums`."""
    optimizer.zero_grad()
    likelihoods = circuit(x)
    kept = torch.where(torch.isfinite(likelihoods), likelihoods, torch.zeros_like(likelihoods))
    # Only `backward` sees a gradient; its value is minus the mean flow.
    (-kept.sum() / len(x)).backward()
    totals = tally(likelihoods.detach(), x)
    sums += totals
    return Figures.of(totals)


def _row(epoch: int, step_size: float, figures: Figures) -> dict[str, float]:
    return {
        "epoch": float(epoch),
        "train_bits": figures.bits,
        "impossible": float(figures.impossible),
        "step_size": step_size,
    }


def _validate(
    circuit: Circuit,
    guard: Guard,
    x: Tensor,
    batch_size: int,
    row: dict[str, float],
    best: Any,
) -> Any:
    """Add the validation figures to the epoch's row; the better of it and the best so far."""
    device = next(circuit.parameters()).device
    sums = torch.zeros(len(Figures.NAMES), dtype=torch.float64, device=device)
    with torch.no_grad():
        for part in x.split(batch_size):
            on_device = part.to(device)
            sums += tally(circuit(on_device), on_device)
    figures = Figures.of(sums)
    guard.check_figures(f"validation of epoch {row['epoch']:.0f}", figures)
    row["valid_bits"], row["valid_impossible"] = figures.bits, float(figures.impossible)
    rank = (float(figures.impossible), figures.bits)
    if best is not None and best[0] <= rank:
        return best
    return rank, {name: value.clone() for name, value in circuit.state_dict().items()}
