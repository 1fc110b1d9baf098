"""Adam: for what follows gradients, and as a rule for statistics, on their logits."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from distpc.circuits.bank import Bank
from distpc.circuits.circuit import Circuit
from distpc.circuits.gaussian import VARIANCE_FLOOR, GaussianBank
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.sums import SumBank
from distpc.errors import TrainingError
from distpc.training.rules.anemone import running_mean
from distpc.training.rules.base import Rule, Smoothing, mean_flow, normalised

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
CLIP = 5.0
"""Entries of a gradient on logits are clipped to this (PyJuice's value)."""


def adam_direction(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Bias-corrected m / (sqrt(v) + 1e-8) of Adam (Kingma and Ba, 2015), betas 0.9 and 0.999."""
    mean = running_mean(gradient, state, FIRST, "adam_first_")
    square = running_mean(gradient.square(), state, SECOND, "adam_second_")
    return mean.div_(square.sqrt_().add_(EPSILON))


class AdamOnLogits(Rule):
    """logits <- logits - step * Adam(gradient), with theta = softmax(logits) a row.

    `papers.md` C.3 (5). The gradient of the mean negative log-likelihood in the logits of a row is
    theta * (row sum of F) - F, clipped to +-5 an entry; it needs no logits, because the new weights
    are theta * exp(-step * direction), normalised. (PyJuice takes the gradient in unnormalised
    weights instead and renormalises the circuit as a whole.) Gaussian units take the same step in
    the mean and the logarithm of the standard deviation of standardised values. The step size is
    Adam's learning rate, 0.01 as a rule. S holds theta itself, rows of one use.

    **Shards.** Where ZeRO cuts rows, flows become gradients of logits on their way out of the
    backward pass, where rows are whole: that is linear, so ranks may average them afterwards. S
    then holds exp(logits), of which any flat shard is multiplied alone; the read-out normalises
    it, and `settle` does now and then, since nothing else holds the scale of a row. Units with
    moments need whole rows.

    **Smoothing**: none; pseudocounts are not used, and a weight of zero stays zero.

    Raises:
        TrainingError: inputs that have no logits.
    """

    name = "adam"
    keeps_state = True
    settle_every: ClassVar[int] = 50

    def __init__(self, circuit: Circuit, smoothing: Smoothing) -> None:
        super().__init__(circuit, smoothing)
        for bank in self.banks.values():
            if not isinstance(bank, SumBank | CategoricalBank | GaussianBank):
                raise TrainingError(
                    "Adam on logits cannot train these inputs",
                    found=type(bank).__name__,
                    expected="categorical or Gaussian inputs",
                    fix="choose a rule of expectation maximisation",
                )
        self.needs_whole_rows = any(isinstance(b, GaussianBank) for b in self.banks.values())
        self._on_shards = False

    def work_on_shards(self) -> None:
        for statistics, bank in self.banks.items():
            statistics.register_hook(partial(_in_logits, bank))
        self._on_shards = True

    def settle(self, statistics: Tensor) -> None:
        bank = self.banks.get(statistics)
        if bank is not None:
            statistics.copy_(normalised(bank, statistics))

    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        if self._on_shards:
            # Turned into logits by then; the sign is that of a gradient.
            gradient = mean_flow(statistics).neg_().clamp_(-CLIP, CLIP)
            statistics.mul_(adam_direction(gradient, state).mul_(-step_size).exp_())
            return
        bank, flow = self.banks[statistics], mean_flow(statistics)
        if isinstance(bank, GaussianBank):
            statistics.copy_(_gaussian_step(bank, flow, state, step_size))
            return
        weights = normalised(bank, statistics)
        gradient = (weights * bank.totals(flow) - flow).clamp_(-CLIP, CLIP)
        weights *= adam_direction(gradient, state).mul_(-step_size).exp_()
        statistics.copy_(normalised(bank, weights))


@torch.no_grad()
def _in_logits(bank: Bank, gradient: Tensor) -> Tensor:
    """-F, or part of it, as the gradient in logits: theta * (row sum of F) - F."""
    return gradient - normalised(bank, bank.statistics) * bank.totals(gradient)


def _gaussian_step(bank: Bank, flow: Tensor, state: dict[str, Any], step_size: float) -> Tensor:
    """New statistics (T, 3, K) of one use a unit."""
    assert isinstance(bank, GaussianBank)
    mean, variance = bank.moments(bank.statistics)
    uses, first, second = flow.unbind(1)
    # Minus the derivatives of log N(z; mean, variance), summed with the flows as weights.
    of_mean = (mean * uses - first) / variance
    of_log_deviation = uses - (second - 2 * mean * first + mean.square() * uses) / variance
    gradient = torch.stack([of_mean, of_log_deviation], dim=1).clamp_(-CLIP, CLIP)
    moves = adam_direction(gradient, state).mul_(-step_size)
    mean = mean + moves[:, 0]
    variance = (variance * (2 * moves[:, 1]).exp()).clamp_min(VARIANCE_FLOOR)
    return torch.stack([torch.ones_like(mean), mean, variance + mean.square()], dim=1)
