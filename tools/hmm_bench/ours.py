"""distpc's side: a step of online EM on a tied hidden Markov model, scanned or compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.structures.hmm import hmm
from distpc.training.optimizer import CircuitOptimizer


class Ours:
    """Forward, backward and update on one batch.

    Args:
        x: (B, T) tokens.
        states: H.
        vocabulary: C.
        layer: of the transition, cp or monarch.
        scanned: whether the scan does the work, or the compiled circuit.
        device: where.
    """

    def __init__(
        self,
        x: Tensor,
        states: int,
        vocabulary: int,
        layer: str = "cp",
        scanned: bool = True,
        device: str = "cpu",
    ) -> None:
        length = x.shape[1]
        self.circuit = Circuit(hmm(length, states, layer=layer), [vocabulary] * length, seed=0)
        self.circuit.set_smoothing(0.1, 0.1, 50_000)
        self.circuit.to(device)
        if not scanned:
            self.circuit.scan = None
        self.x = x.to(device)
        self.optimizer = CircuitOptimizer(self.circuit.parameter_groups(), step_size=0.1)

    def step(self) -> float:
        """A training step; mean nats of a chunk before it."""
        self.optimizer.zero_grad()
        log_prob = self.circuit(self.x)
        (-log_prob.sum() / len(self.x)).backward()
        self.optimizer.step()
        return float(log_prob.detach().mean())


class Products:
    """The matrix products that no training step can do without: one each way a step, and one for
    the flows of all steps together."""

    def __init__(self, batch: int, length: int, states: int, device: str) -> None:
        self.theta = torch.rand(states, states, device=device)
        self.values = torch.rand(length - 1, batch, states, device=device)
        self.out = torch.empty_like(self.values)

    def run(self) -> None:
        """All products of one step of training."""
        for u, out in zip(self.values, self.out, strict=True):
            torch.mm(u, self.theta.T, out=out)
        for u, out in zip(self.values, self.out, strict=True):
            torch.mm(u, self.theta, out=out)
        left, right = self.values.flatten(0, 1), self.out.flatten(0, 1)
        torch.mm(left.T, right)
