"""libcirkit's side: the same circuit with the same parameters, in its fastest setting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor

from circuit_bench.cases import Case
from circuit_bench.clock import seconds
from distpc.circuits.circuit import Circuit
from distpc.circuits.exchange.cirkit import to_cirkit

NAME = "libcirkit"
MAX_SECONDS = 30.0
"""A step that takes longer is not measured."""


@dataclass(frozen=True)
class Setting:
    """How libcirkit is run.

    Attributes:
        optimizer: em (its own) or adam (torch's, on softmax weights).
        fold, optimize: its compiler's flags.
        compile: whether torch.compile compiles the model.
    """

    optimizer: str = "em"
    fold: bool = True
    optimize: bool = True
    compile: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The inverse of `str`."""
        words = text.split("+")
        return cls(words[0], "fold" in words, "optimize" in words, "compile" in words)

    def __str__(self) -> str:
        flags = [name for name in ("fold", "optimize", "compile") if getattr(self, name)]
        return "+".join([self.optimizer, *flags])


class Peer:
    """Forward, backward and update on one batch after another.

    Its semiring is lse-sum: sum-product underflows at these numbers of variables.
    """

    def __init__(self, case: Case, circuit: Circuit, setting: Setting, device: str) -> None:
        from cirkit.backend.torch.em_optimizer import EM
        from cirkit.pipeline import PipelineContext

        unclamp()
        context = PipelineContext(
            backend="torch", semiring="lse-sum", fold=setting.fold, optimize=setting.optimize
        )
        is_em = setting.optimizer == "em"
        symbolic = to_cirkit(circuit, "linear" if is_em else "softmax")
        self.model = context.compile(symbolic).to(device)
        # libcirkit's EM maximises, Adam minimises.
        self.sign = 1.0 if is_em else -1.0
        self.optimizer: torch.optim.Optimizer
        if is_em:
            self.optimizer = EM(self.model, lr=0.1, pseudocount=0.01)
        else:
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.call: Callable[[Tensor], Tensor] = self.model
        if setting.compile:
            self.call = torch.compile(self.model)
        self.batches = cycle(case.batches(4, device))

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) nats."""
        return self.model(x)[:, 0, 0]

    def step(self) -> None:
        """A whole training step."""
        self.optimizer.zero_grad()
        x = next(self.batches)
        (self.sign * self.call(x).sum() / len(x)).backward()
        self.optimizer.step()


def unclamp() -> None:
    """Let libcirkit 0.3.1 go below -708.4 nats, where it clamps every message.

    An image at random parameters has some -4000; the clamp itself still runs and costs the same.
    """
    from cirkit.backend.torch import semiring, utils

    for module in (semiring, utils):
        if hasattr(module, "LOG_CLAMP_MIN"):
            module.LOG_CLAMP_MIN = -1e30


def check_equal(ours: Circuit, peer: Peer, x: Tensor) -> None:
    """The two sides are one model: equal likelihoods to 1e-4 relative."""
    with torch.no_grad():
        expected, found = ours(x).double(), peer.log_prob(x).double()
    error = float(((found - expected) / expected).abs().max())
    assert error < 1e-4, f"likelihoods of the two sides differ by {error:.2g} relative"


def best_setting(
    case: Case, circuit: Circuit, device: str, say: Callable[[str], None]
) -> tuple[Setting | None, str]:
    """The fastest setting, flag by flag; None with the reason where a step takes too long."""
    start = Setting(optimizer="adam") if is_tied(circuit) else Setting()
    best, least = None, float("inf")
    tried: set[Setting] = set()
    candidates = [start, replace(start, optimize=False), replace(start, fold=False)]
    if not is_tied(circuit):
        candidates.append(replace(start, optimizer="adam"))
    while candidates:
        setting = candidates.pop(0)
        if setting in tried:
            continue
        tried.add(setting)
        try:
            taken = _quick_seconds(case, circuit, setting, device)
        except Exception as error:
            # A setting in which the peer fails is not its best one.
            say(f"  {NAME} {setting}: {type(error).__name__}: {str(error)[:150]}")
            continue
        say(f"  {NAME} {setting}: {1e3 * taken:.0f} ms")
        if taken < least:
            best, least = setting, taken
        if not candidates and best is not None and not best.compile and least < MAX_SECONDS:
            others = [replace(best, compile=True)]
            if not is_tied(circuit):
                flipped = "adam" if best.optimizer == "em" else "em"
                others.insert(0, replace(best, optimizer=flipped))
            candidates = [other for other in others if other not in tried]
    if best is None:
        return None, f"{NAME} runs in no setting"
    if least > MAX_SECONDS:
        return None, f"{NAME}'s step takes {least:.0f} s ({best})"
    return best, ""


def is_tied(circuit: Circuit) -> bool:
    """Whether regions share parameters: libcirkit's EM would update those once a region."""
    return any(len(owners) > 1 for plan in circuit.schedule.banks for owners in plan.owners)


def _quick_seconds(case: Case, circuit: Circuit, setting: Setting, device: str) -> float:
    peer = Peer(case, circuit, setting, device)
    check_equal(circuit, peer, next(peer.batches))
    begun = time.perf_counter()
    peer.step()
    if time.perf_counter() - begun > 4 * MAX_SECONDS and not setting.compile:
        return time.perf_counter() - begun
    return min(seconds(peer.step, device) for _ in range(2))
