"""distpc's side: a training step of online EM."""

from __future__ import annotations

from itertools import cycle

import torch

from circuit_bench.cases import Case
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules.online_em import online_em_

STEP_SIZE = 0.1


class Ours:
    """Forward, backward and update on one batch after another.

    Args:
        case: what to train.
        device: where.
        fused: update each parameter as soon as its flows are there, and drop them.
    """

    def __init__(self, case: Case, device: str, fused: bool = False) -> None:
        self.circuit = case.circuit().to(device)
        self.circuit.matmul_dtype = getattr(torch, case.dtype)
        self.batches = cycle(case.batches(4, device))
        self.optimizer = CircuitOptimizer(self.circuit.parameter_groups(), step_size=STEP_SIZE)
        self.fused = fused
        if fused:
            for parameter in self.circuit.parameter_groups()["em"]:
                parameter.register_post_accumulate_grad_hook(_update)

    def passes(self) -> None:
        """Forward and backward: likelihoods, flows and their statistics."""
        self.optimizer.zero_grad()
        x = next(self.batches)
        log_prob = self.circuit(x)
        (-log_prob.sum() / len(x)).backward()

    def step(self) -> None:
        """A whole training step."""
        self.passes()
        if not self.fused:
            self.optimizer.step()


@torch.no_grad()
def _update(statistics: torch.nn.Parameter) -> None:
    online_em_([statistics], STEP_SIZE)
    statistics.grad = None
