"""Training against the clock: bits per dimension over the seconds spent in training steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, float], object]
LogProb = Callable[[Tensor], Tensor]


@dataclass
class Racer:
    """One side.

    Attributes:
        name: in the legend.
        step: trains on a batch (B, V) of integers, with a step size.
        log_prob: (B,) nats of a batch.
        step_size: from the share of the time that is over, in [0, 1].
        setup_seconds: what came before the first step: compilers, graphs.
        notes: what else the file should say.
    """

    name: str
    step: Step
    log_prob: LogProb
    step_size: Callable[[float], float]
    setup_seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


def race(
    racer: Racer, train: Tensor, test: Tensor, batch: int, seconds: float, evaluations: int
) -> dict[str, Any]:
    """Train for some seconds.

    Args:
        racer: the side.
        train, test: (N, V) uint8 on the device; the test set in whole batches.
        batch: B.
        seconds: of training; the clock stands while the test set is evaluated.
        evaluations: at least 2, closer together early, where the curve is steep.

    Returns:
        `name`, `setup_seconds`, `steps`, `curve`: pairs of seconds and test bits per dimension.
    """
    order = torch.Generator(train.device).manual_seed(0)
    times = [seconds * ((i + 1) / evaluations) ** 2 for i in range(evaluations)]
    curve = [(0.0, bits(racer, test, batch))]
    spent, steps, permutation, at = 0.0, 0, None, 0
    for until in times:
        _wait(train)
        begun = time.perf_counter()
        while spent + time.perf_counter() - begun < until:
            # A few steps between looks at the clock: the device is not waited for at each.
            for _ in range(4):
                if permutation is None or at + batch > len(train):
                    permutation = torch.randperm(len(train), generator=order, device=train.device)
                    at = 0
                x = train[permutation[at : at + batch]].long()
                racer.step(x, racer.step_size(min(1.0, spent / seconds)))
                at += batch
                steps += 1
            _wait(train)
        spent += time.perf_counter() - begun
        curve.append((round(spent, 4), bits(racer, test, batch)))
    return {
        "name": racer.name,
        "setup_seconds": round(racer.setup_seconds, 2),
        "steps": steps,
        "epochs": round(steps * batch / len(train), 2),
        "curve": curve,
        **racer.notes,
    }


def bits(racer: Racer, x: Tensor, batch: int) -> float:
    """Mean bits per dimension of a test set."""
    total = sum(float(racer.log_prob(part.long()).double().sum()) for part in x.split(batch))
    return round(-total / (x.numel() * math.log(2)), 5)


def seconds_to(curve: list[tuple[float, float]], target: float) -> float | None:
    """When a curve first comes down to a target, between its points; None if it never does."""
    for (t0, b0), (t1, b1) in pairwise(curve):
        if b1 <= target:
            share = 1.0 if b0 <= target or b0 == b1 else (b0 - target) / (b0 - b1)
            return round(t0 if b0 <= target else t0 + share * (t1 - t0), 4)
    return None


def linear(first: float, last: float) -> Callable[[float], float]:
    """A step size that falls linearly over the time."""
    return lambda share: first + (last - first) * share


def geometric(first: float, last: float) -> Callable[[float], float]:
    """A step size that falls by the same factor in equal times."""
    return lambda share: float(first * (last / first) ** share)


def tutorial(share: float) -> float:
    """PyJuice's tutorial: .9 falling to .1 over the first 100 of 350 epochs, to .05 at the end."""
    turn = 100 / 350
    if share < turn:
        return 0.9 + (0.1 - 0.9) * share / turn
    return 0.1 + (0.05 - 0.1) * (share - turn) / (1 - turn)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
