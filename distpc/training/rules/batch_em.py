"""EM on a batch: a step towards its M-step, or all of the way on the whole data set."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from distpc.training.rules.base import Rule, mean_flow, normalised


class MiniBatchEM(Rule):
    """theta <- (1 - step) * theta + step * (F + q / fan-in) / (row sum of F + q).

    `papers.md` C.3 (2), with pc = q * B for sums of flows over a batch of B samples. A unit that
    one sample of the batch visits moves as far as a unit that all of them visit. S holds theta
    itself (moments for inputs that have them), rows of one use.

    **Smoothing** is part of every step and does not average out: the 0.1 *a batch* of the
    literature costs 0.8 nats on plants against 1e-6 (`papers.md` E.4), which is why a pseudocount
    counts samples of the training set here. Rows with no flow and no pseudocount stay.
    """

    name = "mini_batch_em"

    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        bank = self.banks[statistics]
        target = mean_flow(statistics).add_(self.prior(bank))
        old = normalised(bank, statistics)
        target = torch.where(bank.totals(target) > 0, normalised(bank, target), old)
        statistics.copy_(old.lerp_(target, step_size))


class FullBatchEM(Rule):
    """S <- F + q / fan-in, with F the mean flow over the whole data set.

    `papers.md` C.3 (1), with pc = q * N, which is the pseudocount as given. The step size is not
    used. Rows with no flow and no pseudocount stay.
    """

    name = "full_batch_em"
    needs_all_data = True

    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        bank = self.banks[statistics]
        target = mean_flow(statistics).add_(self.prior(bank))
        statistics.copy_(torch.where(bank.totals(target) > 0, target, statistics))
