"""TensorBoard: what a process shows of its work, and a continuation of an earlier attempt's."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from torch import Tensor

from distpc.artifacts.files import is_disk_full, no_space
from distpc.errors import ResourceError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes event files; silent where not enabled.

    Args:
        folder: of the event files; of one job alone, because going on with it purges in it.
        enabled: whether this process reports.
        first_step: what an earlier attempt logged from this step on is dropped; 0 drops nothing.

    Raises:
        ResourceError: the disk is full; every method, because files are written in the background.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, first_step: int = 0) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        if enabled:
            with _full_disk_told(folder):
                self._writer = open_writer(folder, first_step)

    @property
    def enabled(self) -> bool:
        """Whether this process reports."""
        return self._writer is not None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures under their names; the caller puts units into the names."""
        if self._writer is not None:
            with _full_disk_told(self._folder):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Write a picture, (height, width, 3) uint8."""
        if self._writer is not None:
            with _full_disk_told(self._folder):
                self._writer.add_image(name, picture, step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Write how values of any shape are distributed."""
        if self._writer is not None:
            with _full_disk_told(self._folder):
                self._writer.add_histogram(name, values.flatten(), step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Write Markdown."""
        if self._writer is not None:
            with _full_disk_told(self._folder):
                self._writer.add_text(name, text, step)

    def flush(self) -> None:
        """Let readers of the files see all that was written."""
        if self._writer is not None:
            with _full_disk_told(self._folder):
                self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with _full_disk_told(self._folder):
                self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An error that is on its way says more than what it left unwritten.
        quiet = () if error is None else (OSError, ResourceError)
        with contextlib.suppress(*quiet):
            self.close()


@contextlib.contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise no_space(folder) from error
        raise


@functools.cache
def _quiet_writers() -> None:
    """Keep TensorBoard's threads from printing what they raise again in their caller's thread."""
    others = threading.excepthook

    def hook(caught: threading.ExceptHookArgs) -> None:
        if not type(caught.thread).__module__.startswith("tensorboard."):
            others(caught)

    threading.excepthook = hook


def open_writer(folder: Path, first_step: int = 0) -> SummaryWriter:
    """A writer of event files in `folder`; see `Curves`."""
    from torch.utils.tensorboard import SummaryWriter

    _quiet_writers()
    # Files are read in the order of their names, which begin with the second of their making:
    # two attempts in one second could be read in the wrong order, and the later one purged.
    newest = max(folder.glob("events.out.tfevents.*"), default=None)
    if newest is not None:
        made = int(newest.name.split(".")[3])
        time.sleep(max(0.0, made + 1 - time.time()))
    return SummaryWriter(str(folder), purge_step=first_step if first_step > 0 else None)
