"""What a fit shows while it runs: a progress line and TensorBoard curves."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from distpc.artifacts.stage import StageContext
from distpc.latents.state import FitState
from distpc.parallel.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RoundLog:
    """Shows every round: a progress line, and a TensorBoard curve for each restart.

    Args:
        ctx: of the stage.
        state: of the fit; rounds of a killed attempt are written again, so no curve has holes.
    """

    def __init__(self, ctx: StageContext, state: FitState) -> None:
        self._folder = ctx.tensorboard / "fit"
        self._state = state
        self._writers: dict[int, SummaryWriter] = {}
        config = ctx.config.latents
        total = config.num_restarts * (config.num_rounds + 1)
        self._progress = Progress("k-means", total, "rounds")
        if not state.inertia:
            for folder in self._folder.glob("*/"):
                shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> RoundLog:
        return self

    def __exit__(self, *details: object) -> None:
        for writer in self._writers.values():
            writer.close()
        self._progress.close()

    def __call__(self, restart: int, number: int, inertia: float) -> None:
        """Note the inertia of round `number` of a restart."""
        writer = self._writers.get(restart)
        if writer is None:
            writer = self._writers[restart] = self._open(restart)
        writer.add_scalar("latents/inertia", inertia, number)
        self._progress.advance(1, restart=restart, inertia=inertia)

    def _open(self, restart: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder / f"restart-{restart}"
        shutil.rmtree(folder, ignore_errors=True)
        writer = SummaryWriter(folder, flush_secs=10)
        for number, inertia in enumerate(self._state.inertia[restart][:-1]):
            writer.add_scalar("latents/inertia", inertia, number)
        return writer
