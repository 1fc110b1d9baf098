"""Points with cluster structure, as feature shards on disk and as an array.

Legend: P points, D width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from distpc.artifacts import Artifact
from distpc.latents.store import read_shard, shard_path, write_shard

FINGERPRINT = "generated"
LATENTS = 4
"""Points that count as one sample's."""

_SPREAD = 0.5
_CENTRES_PER_CLUSTER = 1


def write_points(folder: Path, n: int, d: int, k: int, shards: int, seed: int = 0) -> Artifact:
    """About k overlapping groups of unlike size, n points (D,) float16 in all."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(_CENTRES_PER_CLUSTER * k, d)).astype(np.float32)
    weights = rng.dirichlet(np.full(len(centres), 2.0))
    rows = n // shards // LATENTS
    for shard in range(shards):
        own = np.random.default_rng([seed, shard])
        chosen = centres[own.choice(len(centres), size=rows * LATENTS, p=weights)]
        chosen += own.standard_normal(size=chosen.shape, dtype=np.float32) * _SPREAD
        points = torch.from_numpy(chosen.astype(np.float16)).view(rows, LATENTS, d)
        name = f"train-{shard:06d}"
        keys = [f"{shard}_{row:06d}" for row in range(rows)]
        marks = {"fingerprint": FINGERPRINT}
        write_shard(shard_path(folder, name), "features", points, keys, marks)
    return Artifact.seal(folder, "features", FINGERPRINT, 0.0, {})


def read_points(features: Artifact) -> np.ndarray:
    """All of them, (P, D) float32."""
    paths = sorted(features.path.glob("*.safetensors"))
    return np.concatenate(
        [read_shard(path, "features").rows.flatten(0, 1).float().numpy() for path in paths]
    )
