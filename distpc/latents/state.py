"""Where a clustering stands: everything that the rest of it depends on, kept on disk.

Legend: D feature width, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from distpc.latents.store import read_tensors, write_tensors

_TENSORS = {"centroids", "best", "seen"}


@dataclass
class FitState:
    """Everything that the rest of a fit depends on; kept on disk after every round.

    Attributes:
        restart: the one under way.
        centroids: (K, D) float32 of the next round; None before a restart is seeded.
        best: (K, D) float32 of the best finished restart, if any.
        best_restart: which one that was.
        seen: (K,) int64 points that mini-batches gave to each cluster so far.
        inertia: per restart, the inertia of each round's centroids.
        refilled: per restart, empty clusters that were moved after each round.
        seconds: worked so far, over all attempts.
    """

    restart: int = 0
    centroids: Tensor | None = None
    best: Tensor | None = None
    best_restart: int = 0
    seen: Tensor | None = None
    inertia: list[list[float]] = field(default_factory=list)
    refilled: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the state, whole or not at all."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        facts = {
            "restart": self.restart,
            "best_restart": self.best_restart,
            "inertia": self.inertia,
            "refilled": self.refilled,
            "seconds": self.seconds,
        }
        write_tensors(
            path,
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            {"holds": "k-means state", "fingerprint": fingerprint, "facts": facts},
        )

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> FitState:
        """The state of an interrupted attempt with the same fingerprint, or a fresh one.

        Raises:
            LatentError: there is one, and it cannot be read.
        """
        if not path.exists():
            return cls()
        tensors, metadata = read_tensors(path, "k-means state", None)
        if metadata["fingerprint"] != fingerprint:
            return cls()
        state = cls(**metadata["facts"])
        for name in _TENSORS & tensors.keys():
            # Cloned, since the file that they are mapped from is about to be replaced.
            setattr(state, name, tensors[name].clone())
        return state
