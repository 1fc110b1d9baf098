"""Exact M-steps on more and more data: EM as language models' companions are trained with it."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch.nn import Parameter

from distpc.circuits.circuit import Circuit
from distpc.training.rules.base import Rule, Smoothing, mean_flow


class GrowingEM(Rule):
    """S <- mean F over the batches since the last M-step; each M-step takes `growth` times more.

    Between M-steps S stands still, so that each is exact on its batches: 1, g, g^2, ... of them
    (rounded up). Early ones are cheap and rough, late ones see much data (as in Ctrl-G's schedule,
    Zhang et al. 2024). A last stretch that ends before its M-step is not used. The step size is not
    used either.

    **Smoothing** stays out of S, as in online EM. Element-wise, so that any flat shard of S can be
    updated alone; it keeps a mean of flows beside S.

    Args:
        circuit, smoothing: see `Rule`.
        growth: g, at least 1.
    """

    name = "growing_em"
    needs_whole_rows = False
    keeps_state = True
    keeps_statistics = True

    def __init__(self, circuit: Circuit, smoothing: Smoothing, growth: float = 2.0) -> None:
        super().__init__(circuit, smoothing)
        self.growth = growth

    def start(self) -> None:
        self.resume()

    def resume(self) -> None:
        self.circuit.set_smoothing(*self.smoothing)

    def finish(self) -> None:
        """Nothing: the statistics are means of flows."""

    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        if "mean" not in state:
            state["mean"] = torch.zeros_like(statistics)
            state["count"] = torch.zeros((), dtype=torch.int64)
        state["count"] += 1
        seen, wanted = self.place(int(state["count"]))
        state["mean"].lerp_(mean_flow(statistics), 1.0 / seen)
        if seen == wanted:
            statistics.copy_(state["mean"])

    def place(self, count: int) -> tuple[int, int]:
        """Batches since the last M-step, this one included, and how many the next M-step takes."""
        number, before = 0, 0
        while True:
            wanted = ceil(self.growth**number)
            if count <= before + wanted:
                return count - before, wanted
            number, before = number + 1, before + wanted
