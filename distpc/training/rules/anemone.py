"""Anemone: mini-batch EM whose step in a unit follows how much of the batch used that unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from distpc.circuits.circuit import Circuit
from distpc.training.rules.base import Rule, Smoothing, mean_flow


class Anemone(Rule):
    """S <- (1 - step) * TD * theta + step * F + q / fan-in, with TD the expected uses of a row.

    `papers.md` C.3 (3), with pc = q: "Rethinking Probabilistic Circuit Parameter Learning"
    (arXiv 2505.19982). It is online EM that forgets how often a row *was* used: before each step
    S is brought to the scale of the uses that the present weights predict, which takes a pass of
    one sample. Momentum m replaces F by the bias-corrected running mean of the batches' flows,
    at the price of another copy of S.

    **Smoothing** is added to flows per sample, whose rows sum to TD, mostly far below 1: a q of
    0.1 destroys a model (`papers.md` E.4). Pseudocounts of samples in N are on the right scale: 0.1
    in 20,000 samples is a q of 5e-6; the paper's 1e-6 is a pseudocount of 1e-6 * N.

    Args:
        circuit, smoothing: see `Rule`.
        momentum: m in [0, 1); 0 keeps no state.
    """

    name = "anemone"
    needs_whole_circuit = True
    keeps_state = True

    def __init__(self, circuit: Circuit, smoothing: Smoothing, momentum: float = 0.9) -> None:
        super().__init__(circuit, smoothing)
        self.momentum = momentum

    def begin_step(self) -> None:
        self.circuit.rescale_to_uses_()

    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        flow = mean_flow(statistics)
        if self.momentum:
            flow = running_mean(flow, state, self.momentum)
        prior = self.prior(self.banks[statistics])
        statistics.mul_(1.0 - step_size).add_(flow, alpha=step_size).add_(prior)


def running_mean(values: Tensor, state: dict[str, Any], momentum: float, name: str = "") -> Tensor:
    """buffer <- m * buffer + (1 - m) * values; returns buffer / (1 - m^count), a new tensor.

    Args:
        values: of this step.
        state: where the buffer and the count of steps are kept.
        momentum: m.
        name: tells buffers of one state apart.
    """
    buffer, count = f"{name}mean", f"{name}count"
    if buffer not in state:
        state[buffer] = torch.zeros_like(values)
        state[count] = torch.zeros((), dtype=torch.int64)
    state[count] += 1
    state[buffer].lerp_(values, 1.0 - momentum)
    return state[buffer] / (1.0 - momentum ** int(state[count]))
