"""TensorBoard logs of teacher training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distpc.parallel.event_files import Curves

_LOGGED_POINTS = 400


class Monitor(Curves):
    """Shows the curves and pictures of one training run; silent where not enabled.

    Args:
        folder: of the logs.
        enabled: whether this process reports (rank 0).
        first_step: steps taken before; what an interrupted attempt logged beyond is dropped.
        total_steps: of the whole run; at most 400 of them are points of the training curve.
        figure: name of what is logged, for example `mse`.
    """

    def __init__(
        self, folder: Path, *, enabled: bool, first_step: int, total_steps: int, figure: str
    ) -> None:
        super().__init__(folder, enabled=enabled, first_step=first_step + 1)
        self._every = max(1, total_steps // _LOGGED_POINTS)
        self._figure = figure
        self._errors: list[float] = []

    def train(self, step: int, value: float, learning_rate: float) -> None:
        """Log the training figure, a mean over the steps since the last point."""
        self._errors.append(value)
        if step % self._every == 0:
            mean = float(np.mean(self._errors))
            named = {f"train_{self._figure}": mean, "learning_rate": learning_rate}
            self.scalars(step, {f"teacher/{name}": value for name, value in named.items()})
            self._errors.clear()

    def valid(self, step: int, value: float, picture: np.ndarray | None) -> None:
        """Log the validation figure and, if there is one, a picture (height, width, 3) uint8."""
        self.scalars(step, {f"teacher/valid_{self._figure}": value})
        if picture is not None:
            self.image(step, "teacher/reconstruction", picture)
        self.flush()
