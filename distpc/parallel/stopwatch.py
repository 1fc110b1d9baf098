"""What a worker process does with its time, call by call.

Code that reads or writes says so where it does (`part`), whoever calls it; what is left of a call
is computing. Outside of a worker nothing is noted.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distpc.parallel.meter import finish, matmul_flops, peak_memory_bytes

PARTS = ("read", "wait", "compute", "write", "idle")
"""Reading and decoding files; waiting for another call of the same worker; computing, which
includes the first touch of a file that is mapped; writing; and no call at all."""


@dataclass
class Work:
    """One call.

    Attributes:
        worker: host and process that did it.
        seconds: by part; idle ones are those before the call. Of a worker without overlapping
            calls all of them add up to the age at the end of its last call.
        counts: of what it worked through, by name.
        age_seconds: from the worker's start to the end of the call.
        peak_memory_bytes: most that the worker held so far.
        tflops: 1e12 operations a second of its computing, where this call's were counted.
        device_peak_fraction: of what products of matrices reach on the worker's device.
    """

    worker: str
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    counts: dict[str, int] = field(default_factory=dict)
    age_seconds: float = 0.0
    peak_memory_bytes: int = 0
    tflops: float | None = None
    device_peak_fraction: float | None = None


@dataclass
class _Call:
    work: Work
    in_part: bool = False


_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@contextmanager
def part(name: Literal["read", "wait", "write"]) -> Iterator[None]:
    """What happens inside is no computing; also a decorator. Of nested parts the outer counts."""
    call = _call.get()
    if call is None or call.in_part:
        yield
        return
    call.in_part, began = True, time.monotonic()
    try:
        yield
    finally:
        call.in_part = False
        call.work.seconds[name] += time.monotonic() - began


@contextmanager
def holding(lock: threading.Lock) -> Iterator[None]:
    """Hold a lock; the time until it is free is waiting."""
    with part("wait"):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def count(**amounts: int) -> None:
    """Say how many of something this call worked through: `count(samples=256)`."""
    call = _call.get()
    if call is not None:
        counts = call.work.counts
        for name, amount in amounts.items():
            counts[name] = counts.get(name, 0) + amount


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions inside, of this thread.

    As torch's own `FlopCounterMode`, without that one's hooks in the modules of all threads.

    Attributes:
        total: a multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            # In inference mode some operations come here before they fall into their parts.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class Stopwatch:
    """Times the calls of a worker, which several threads may make at a time.

    Args:
        device: whose memory is noted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._lock = threading.Lock()
        self._running = self._calls = 0
        self._device_flops: float | None = None
        self._free_since = self._began = time.monotonic()

    @contextmanager
    def call(self) -> Iterator[Work]:
        """Time what happens inside; the result is whole after it."""
        work, began = Work(self._name), time.monotonic()
        with self._lock:
            if not self._running:
                work.seconds["idle"] = began - self._free_since
            self._running += 1
            self._calls += 1
            # Counting takes time: the 1st, 2nd, 4th, 8th ... call.
            is_counted = self._calls.bit_count() == 1
        token = _call.set(_Call(work))
        operations = Operations()
        try:
            with operations if is_counted else nullcontext():
                yield work
            if is_counted:
                finish(self._device)
        finally:
            _call.reset(token)
            ended = time.monotonic()
            others = sum(work.seconds[name] for name in ("read", "wait", "write"))
            work.seconds["compute"] = ended - began - others
            work.age_seconds = ended - self._began
            work.peak_memory_bytes = peak_memory_bytes(self._device)
            with self._lock:
                self._running -= 1
                self._free_since = ended
                if operations.total:
                    self._rate(work, operations.total)

    def _rate(self, work: Work, operations: int) -> None:
        """Operations a second of a call, and what the device can do at most: seen once."""
        if self._device_flops is None:
            self._device_flops = matmul_flops(self._device)
        flops = operations / max(work.seconds["compute"], 1e-9)
        work.tflops, work.device_peak_fraction = flops / 1e12, flops / self._device_flops
