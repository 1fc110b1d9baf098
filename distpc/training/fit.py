"""`distpc.fit`: training in one process on an array in memory, without the pipeline."""

from __future__ import annotations

import math
from contextlib import ExitStack

from distpc.circuits.circuit import Circuit
from distpc.circuits.kernels.plan import why_not
from distpc.data.plan import SamplePlan
from distpc.errors import ConfigError, TrainingError
from distpc.parallel.heap import steady
from distpc.parallel.progress import Progress
from distpc.training.arrays import Array, as_samples
from distpc.training.fitting import Fitting
from distpc.training.fitting_fused import FastLoop
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Smoothing, make_rule
from distpc.training.rules.online_em import OnlineEM
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
    fused: bool | None = None,
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
        fused: rule online_em alone: train by the fused step in bfloat16, which is many times faster
            on a GPU (see docs/gpu.md and `circuits.kernels.step`); it covers trees of dense sums
            over categorical leaves, with pseudocounts. None: on a GPU where it covers the circuit.
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
    fitting = Fitting(
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
            run = FastLoop(fitting).run if _is_fast(circuit, rule, fused) else fitting.run
            run(SamplePlan([len(x)], seed), bar)
        except TrainingError:
            fitting.return_to_best()
            raise
    if fitting.best is not None:
        fitting.return_to_best()
    chosen.finish()
    return fitting.history


def _is_fast(circuit: Circuit, rule: str, fused: bool | None) -> bool:
    """Whether to train by the fused step.

    Raises:
        ConfigError: it is asked for and cannot be had.
    """
    if fused is None and circuit.device.type != "cuda":
        return False
    reason = why_not(circuit) if rule == OnlineEM.name else f"the rule {rule}"
    if fused and reason is not None:
        raise ConfigError(
            "the fused step does not cover this training",
            where="fused",
            found=reason,
            expected="online EM of a tree of dense sums over categorical leaves, with pseudocounts",
            fix="leave fused at None: it is then used where it can be",
        )
    return reason is None and fused is not False


def _check_settings(settings: list[tuple[str, float, bool, str]]) -> None:
    for name, value, is_right, expected in settings:
        if not is_right:
            raise ConfigError(
                "a setting of fit is out of its range", where=name, found=value, expected=expected
            )
