"""Saves checkpoints beside the training: each rank writes its own elements in a thread."""

from __future__ import annotations

import contextlib
import copy
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

from distpc.artifacts.files import fingerprint
from distpc.errors import DistpcError, TrainingError
from distpc.parallel.collectives import broadcast_object, gather_objects
from distpc.parallel.mesh import Mesh
from distpc.training.checkpoint.draft import Draft
from distpc.training.checkpoint.facts import TrainingFacts
from distpc.training.checkpoint.folder import Checkpoints
from distpc.training.checkpoint.shard import Piece

PATIENCE_SECONDS = 120.0
"""How long rank 0 looks for shards after every rank has said that its own is written."""


class Saver:
    """One checkpoint at a time, written while training goes on.

    `save` and `wait` are collectives: all ranks call them, in the same order. A checkpoint exists
    when rank 0 has found all shards; what fails on the way, on any rank, is raised on every rank
    by the next `wait` (or `save`, which waits for the one before).

    Args:
        checkpoints: where to save.
        mesh: this process among the ranks.
        patience_seconds: see `PATIENCE_SECONDS`.

    Raises:
        TrainingError: the ranks run different code or different trainings.
    """

    def __init__(
        self, checkpoints: Checkpoints, mesh: Mesh, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self.checkpoints = checkpoints
        self.mesh = mesh
        self.patience_seconds = patience_seconds
        _refuse_unlike(checkpoints, mesh)
        # Of this start alone: what a killed one left behind has another name.
        self._start = broadcast_object(secrets.token_hex(4), mesh)
        self._count = 0
        self._job: _Job | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still at work on a checkpoint."""
        return self._job is not None and self._job.is_running

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint has failed on this rank; ranks learn of each other's by `wait`."""
        return self._job is not None and self._job.error is not None

    def save(self, facts: TrainingFacts, pieces: Sequence[Piece]) -> None:
        """Start to save; waits for the checkpoint before, if that is not finished.

        Args:
            facts: where training stands; copied.
            pieces: this rank's share, which nobody changes any more.

        Raises:
            DistpcError: the checkpoint before could not be saved.
        """
        self.wait()
        self._count += 1
        attempt = f"{self._start}.{self._count}"
        draft = Draft(self.checkpoints, copy.deepcopy(facts), attempt, self.mesh.world_size)
        self._job = _Job(draft, pieces, self.mesh)

    def wait(self) -> None:
        """Return when nothing is in flight.

        Raises:
            ResourceError: the disk is full, or the ranks' folder is not shared; the checkpoints
                that were there stay.
            ArtifactError: the ranks' shards do not make up a circuit.
        """
        job, self._job = self._job, None
        if job is None:
            return
        job.shard_done.wait()
        errors = gather_objects(job.error, self.mesh)
        if self.mesh.is_main:
            if any(errors):
                job.cancelled.set()
            job.thread.join(self.patience_seconds)
            job.cancelled.set()
            job.thread.join()
            if job.error is not None or any(errors):
                job.draft.remove()
        last = broadcast_object(job.error, self.mesh)
        for error in (*errors, last):
            if error is not None:
                raise error

    def settle(self) -> None:
        """Let what is in flight end, where another error matters more than this one's."""
        with contextlib.suppress(DistpcError, OSError):
            self.wait()


class _Job:
    """One rank's part in one checkpoint, in a thread of its own."""

    def __init__(self, draft: Draft, pieces: Sequence[Piece], mesh: Mesh) -> None:
        self.draft = draft
        self.error: Exception | None = None
        self.shard_done = threading.Event()
        self.cancelled = threading.Event()
        # A daemon: a rank that ends with an error does not finish its checkpoint first.
        self.thread = threading.Thread(
            target=self._run, args=(pieces, mesh), name="checkpoint", daemon=True
        )
        self.thread.start()

    @property
    def is_running(self) -> bool:
        return self.thread.is_alive()

    def _run(self, pieces: Sequence[Piece], mesh: Mesh) -> None:
        # Whatever goes wrong here has to surface in the thread that trains.
        try:
            self.draft.write(mesh.rank, pieces)
        except Exception as error:
            self.error = error
        self.shard_done.set()
        if not mesh.is_main or self.error is not None:
            return
        # The copies of the tensors are not needed while others still write theirs.
        del pieces
        try:
            self.draft.publish(self.cancelled)
        except Exception as error:
            self.error = error


def _refuse_unlike(checkpoints: Checkpoints, mesh: Mesh) -> None:
    """All ranks must run the same code on the same training; a collective."""
    ours = {"code": code_fingerprint(), **checkpoints.identity}
    of_ranks = gather_objects(ours, mesh)
    for rank, theirs in enumerate(of_ranks):
        keys = [key for key in of_ranks[0] if theirs.get(key) != of_ranks[0][key]]
        if keys:
            raise TrainingError(
                f"the ranks of a training are not alike: {', '.join(keys)} differ",
                where=f"rank {rank} of {mesh.world_size}",
                found={key: theirs.get(key) for key in keys},
                expected={key: of_ranks[0][key] for key in keys},
                fix="install the same distpc on every host and start every rank with the same "
                "configuration",
            )


def code_fingerprint(package: Path = Path(__file__).parents[2]) -> str:
    """16 hexadecimal digits that change with any source file of the package."""
    files = sorted(package.rglob("*.py"))
    return fingerprint([[str(f.relative_to(package)), f.read_text()] for f in files])
