"""Tells a rank that hangs from one that is slow, for the process that started it.

A rank *hangs* when its process is alive but
    silent:      its thread of signs of life has said nothing for `lost_seconds`: it was stopped,
                 its machine is cut off, or something holds the interpreter's lock; or
    stands still: for as long its main thread has stood at one and the same place, all its threads
                 together have used less than a hundredth of a core, and none of them is inside
                 torch.distributed or DeepSpeed, where a rank waits for others, or waits for a
                 process of its own (a compiler): it is stuck in a read, or in a lock.
A rank that computes uses its core, however long a step takes; a long read moves on. Only time that
the watching process has lived through itself counts, so that stopping all of them harms nobody.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Collection
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch.distributed as dist

_IDLE_SHARE = 0.01
"""Of a core: what a process uses whose threads only look whether there is something to do."""
_WAITING = "/torch/distributed/", "/deepspeed/", "/subprocess.py"
_SHOWN_FRAMES = 4


def _interval(lost_seconds: float) -> float:
    return min(2.0, lost_seconds / 8)


class Pulse:
    """Gives signs of life of this rank from a thread of its own, as a context manager.

    Args:
        store: a connection of its own to the ranks' store.
        rank: of this process.
        lost_seconds: silence after which it will be taken for lost.
    """

    def __init__(self, store: dist.Store, rank: int, lost_seconds: float) -> None:
        self._store = store
        self._key = f"pulse/{rank}"
        self._interval = _interval(lost_seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._place: list[tuple[Any, int]] = []
        self._moved = time.monotonic()
        self._used = time.process_time()

    def _beat(self) -> None:
        number = 0
        while True:
            number += 1
            try:
                self._store.set(self._key, json.dumps({"number": number, **self._look()}))
            except (RuntimeError, OSError):
                # The store is gone, and with it the process that started this one.
                return
            if self._stop.wait(self._interval):
                return

    def _look(self) -> dict[str, Any]:
        """For how long the main thread has stood still, and where."""
        stacks = _stacks()
        main = stacks.get(threading.main_thread().ident or 0, [])
        place = [(step.code, step.instruction) for step in main]
        now, used = time.monotonic(), time.process_time()
        busy = used - self._used > _IDLE_SHARE * (now - self._moved) + _IDLE_SHARE
        if busy or place != self._place or _waits(stacks):
            self._place, self._moved, self._used = place, now, used
            return {"still": 0.0}
        shown = [f"{step.code.co_filename}:{step.line} in {step.code.co_name}" for step in main]
        return {"still": now - self._moved, "where": shown[:_SHOWN_FRAMES]}

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)


class _Step(NamedTuple):
    """A call that a thread is in."""

    code: CodeType
    instruction: int
    line: int


def _stacks() -> dict[int, list[_Step]]:
    """Of every other thread the calls it is in, innermost first.

    No frame may outlive this: it keeps alive what its function holds, such as the tensors of a
    backward pass. With this thread's own frame among them, `frames` would be part of a cycle.
    """
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    return {
        thread: [
            _Step(frame.f_code, frame.f_lasti, line) for frame, line in traceback.walk_stack(top)
        ]
        for thread, top in frames.items()
    }


def _waits(stacks: dict[int, list[_Step]]) -> bool:
    """Whether any thread is in code that waits for other ranks, or for a process."""
    return any(
        part in step.code.co_filename
        for steps in stacks.values()
        for step in steps
        for part in _WAITING
    )


class Lookout:
    """Reads the pulses of ranks.

    Args:
        store: theirs.
        num_ranks: R.
        lost_seconds: see above.
        join_seconds: that a rank has for its first sign of life.
    """

    def __init__(
        self, store: dist.Store, num_ranks: int, lost_seconds: float, join_seconds: float
    ) -> None:
        self._store = store
        self._lost_seconds, self._join_seconds = lost_seconds, join_seconds
        self._interval = _interval(lost_seconds)
        self._silent = dict.fromkeys(range(num_ranks), 0.0)
        self._numbers: dict[int, int] = {}
        self._looked = time.monotonic()

    def hanging(self, running: Collection[int]) -> tuple[int, str, str] | None:
        """Of the ranks whose processes run, one that hangs: its number, what it does, and where."""
        now = time.monotonic()
        passed = now - self._looked
        if passed < self._interval:
            return None
        self._looked = now
        for rank in running:
            self._silent[rank] += min(passed, 2 * self._interval)
            found = self._pulse(rank)
            if found is not None and self._numbers.get(rank) != found["number"]:
                self._numbers[rank], self._silent[rank] = found["number"], 0.0
            has_begun = rank in self._numbers
            if self._silent[rank] > (self._lost_seconds if has_begun else self._join_seconds):
                what = "has given no sign of life" if has_begun else "has not begun to work"
                return rank, f"{what} for {self._silent[rank]:.0f} s, though its process runs", ""
            if found is not None and found["still"] > self._lost_seconds:
                how = f"has stood still for {found['still']:.0f} s without computing"
                return rank, how, "\n".join(found["where"])
        return None

    def _pulse(self, rank: int) -> dict[str, Any] | None:
        key = f"pulse/{rank}"
        if not self._store.check([key]):
            return None
        found: dict[str, Any] = json.loads(self._store.get(key))
        return found
