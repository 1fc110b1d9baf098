"""Feature shards made by hand, and clusterings of them without Ray."""

from __future__ import annotations

import numpy as np
import torch

from distpc.latents.holder import FeatureHolder, View
from distpc.latents.kmeans import grid_bits
from distpc.latents.lloyd import Lloyd
from distpc.latents.questions import Holders
from distpc.latents.store import shard_path, write_shard

BLOBS, WIDTH = 8, 5


def write_features(folder, shards, fingerprint="f"):
    """One feature shard for each (P, D) array, two latents a sample."""
    names = []
    for number, points in enumerate(shards):
        names.append(f"train-{number:06d}")
        rows = torch.from_numpy(points.astype(np.float16)).reshape(-1, 2, points.shape[1])
        keys = [f"{number}_{row:05d}" for row in range(len(rows))]
        path = shard_path(folder, names[-1])
        write_shard(path, "features", rows, keys, {"fingerprint": fingerprint})
    return names


def blob_shards(num_shards=3, rows=400):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(BLOBS, WIDTH)) * 10
    shards = [
        centres[rng.integers(BLOBS, size=rows)] + rng.normal(size=(rows, WIDTH)) * 0.2
        for _ in range(num_shards)
    ]
    return shards, centres


def local_holders(folder, fingerprint="f", num_groups=2, **options):
    """One holder in this process that answers all questions."""
    holder = FeatureHolder(str(folder), fingerprint, "cpu", **options)

    def ask(method, items):
        return [getattr(holder, method)(item) for item in items]

    # In one process what is held and what is told are the same.
    return Holders(ask, ask, num_groups=num_groups)


def local_job(folder, names, config, seed=0, fingerprint="f", num_groups=2, position=None, **hooks):
    """A clustering whose questions one holder in this process answers."""
    holders = local_holders(folder, fingerprint, num_groups)
    facts = holders.each("describe", names)
    sizes = [fact.size(position) for fact in facts]
    bits = grid_bits(sum(sizes), max(fact.largest for fact in facts))
    views = [View(name, position) for name in names]
    return Lloyd(holders, views, sizes, bits, config, seed, **hooks), facts
