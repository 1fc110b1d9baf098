"""TensorBoard logs of teacher training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distpc.parallel.event_files import open_writer

_LOGGED_POINTS = 400


class Monitor:
    """Writes the curves and pictures of one training run; for rank 0 only.

    Args:
        folder: of the logs.
        first_step: steps taken before; what an interrupted attempt logged beyond is dropped.
        total_steps: of the whole run; at most 400 of them are points of the training curve.
        figure: name of what is logged, for example `mse`.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int, figure: str) -> None:
        self._writer = open_writer(folder, first_step + 1)
        self._every = max(1, total_steps // _LOGGED_POINTS)
        self._figure = figure
        self._errors: list[float] = []

    def train(self, step: int, value: float, learning_rate: float) -> None:
        """Log the training figure, a mean over the steps since the last point."""
        self._errors.append(value)
        if step % self._every == 0:
            self._writer.add_scalar(
                f"teacher/train_{self._figure}", float(np.mean(self._errors)), step
            )
            self._writer.add_scalar("teacher/learning_rate", learning_rate, step)
            self._errors.clear()

    def valid(self, step: int, value: float, picture: np.ndarray | None) -> None:
        """Log the validation figure and, if there is one, a picture (height, width, 3) uint8."""
        self._writer.add_scalar(f"teacher/valid_{self._figure}", value, step)
        if picture is not None:
            self._writer.add_image("teacher/reconstruction", picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
