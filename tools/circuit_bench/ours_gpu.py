"""distpc's side on a GPU: the fused training step of online EM where it covers the circuit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from circuit_bench.ours import STEP_SIZE
from distpc.circuits.circuit import Circuit
from distpc.training.optimizer import CircuitOptimizer


class OursGpu:
    """Forward, backward and update on one batch after another.

    Args:
        circuit: on the device; trained in place.
        batches: (B, V) integers on the device, taken in turn.
        dtype: of messages and matrix products, float32 or bfloat16.
        fused: whether to use the fused step; else the ordinary one, with updates in backward.

    Attributes:
        setting: what it runs with, in words.
        warm_seconds: of laying out, compiling kernels, recording the graph.
    """

    def __init__(
        self, circuit: Circuit, batches: Sequence[Tensor], dtype: str, fused: bool = True
    ) -> None:
        begun = time.perf_counter()
        self.circuit = circuit
        self.batches = cycle(batches)
        self.fast: Any = None
        self.optimizer: CircuitOptimizer | None = None
        if fused:
            from distpc.circuits.kernels.step import FastStep

            self.fast = FastStep(circuit, len(batches[0]), dtype=getattr(torch, dtype))
            self.setting = f"online EM, {dtype}, fused step"
        else:
            circuit.matmul_dtype = getattr(torch, dtype)
            groups = circuit.parameter_groups()
            self.optimizer = CircuitOptimizer(groups, step_size=STEP_SIZE)
            self.setting = f"online EM, {dtype}, updates in backward"
        for _ in range(2):
            self.step()
        if batches[0].is_cuda:
            torch.cuda.synchronize()
        self.warm_seconds = time.perf_counter() - begun

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) nats."""
        if self.fast is not None:
            return self.fast.evaluate(x).clone()
        with torch.no_grad():
            return self.circuit(x)

    def step(self, x: Tensor | None = None, step_size: float = STEP_SIZE) -> None:
        """A whole training step."""
        x = next(self.batches) if x is None else x
        if self.fast is not None:
            self.fast.step(x, step_size)
            return
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = step_size
        with self.optimizer.updates_in_backward():
            (-self.circuit(x).sum() / len(x)).backward()
            self.optimizer.step()
