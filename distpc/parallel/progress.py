"""Progress: a bar on a terminal, now and then a plain line in a log, nothing on ranks above 0."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from distpc.parallel.mesh import is_main_process

T = TypeVar("T")

LINE_SECONDS = 10.0


class Progress:
    """How far a loop is, on stderr.

    Args:
        label: what is being done.
        total: units of work, or None where unknown.
        unit: name of a unit, plural.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "items") -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self._figures = ""
        self._started = self._last_line = time.monotonic()
        self._closed = False
        self._speaks = is_main_process()
        self._bar: tqdm | None = None
        if self._speaks and sys.stderr.isatty():
            # Some terminals (containers, recorders) say that they have no rows or columns, and
            # would be shown nothing.
            known = all(os.get_terminal_size(sys.stderr.fileno()))
            size: dict[str, Any] = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
            self._bar = tqdm(desc=label, total=total, unit=f" {unit}", **size)

    def advance(self, n: int = 1, **figures: float | int | str) -> None:
        """Count `n` more units as done and show `figures` beside them."""
        self.done += n
        if figures:
            self._figures = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(n)
        elif self._speaks and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def say(self, line: str) -> None:
        """Print a line of its own above the bar, or into the log."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._speaks:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, or write the last line. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif self._speaks:
            self._print_line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._started
        amount = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        line = f"{self.label}: {amount} {self.unit} in {seconds:.1f} s"
        print(f"{line}, {self._figures}" if self._figures else line, file=sys.stderr, flush=True)


def track(
    iterable: Iterable[T], total: int | None = None, label: str = "", unit: str = "items"
) -> Iterator[T]:
    """Yield from `iterable` and show how far it is."""
    with Progress(label, total, unit) as progress:
        for value in iterable:
            yield value
            progress.advance()


def in_bytes(amount: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:,.1f} GiB"


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
