"""Members of clusters drawn to be looked at: clusters by their use, members at random.

Nothing is picked for its looks: clusters lie evenly spread between the most and the least used one,
and members are the first that come, from shards in random order.
Legend: N samples of a shard, Z latents of a sample, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Member:
    """One latent of one sample.

    Attributes:
        shard: name of its shard.
        row: of the sample in the shard's latents.
        key: of the sample.
        unit: number z of the latent: a patch, or a token.
    """

    shard: str
    row: int
    key: str
    unit: int


def spread_clusters(usage: np.ndarray, num: int) -> list[int]:
    """Up to `num` used clusters, from the most to the least used, evenly spread over their order.

    Args:
        usage: (K,) how often each occurs.
    """
    order = np.argsort(-usage, kind="stable")
    used = order[usage[order] > 0]
    places = np.unique(np.linspace(0, len(used) - 1, min(num, len(used))).round().astype(int))
    return [int(cluster) for cluster in used[places]]


def draw_members(
    shards: Iterable[tuple[str, list[str], np.ndarray]],
    clusters: list[int],
    per_cluster: int,
    per_shard: int,
    seed: int = 0,
) -> dict[int, list[Member]]:
    """Up to `per_cluster` members of each cluster, each from another sample.

    Args:
        shards: name, keys and (N, Z) latents of shards; read until there are enough.
        clusters: that are wanted.
        per_shard: members of one cluster that one shard gives, at most.
        seed: of the choice among several latents of one sample.
    """
    rng = np.random.default_rng(seed)
    found: dict[int, list[Member]] = {cluster: [] for cluster in clusters}
    for name, keys, latents in shards:
        for cluster, members in found.items():
            rows = np.flatnonzero((latents == cluster).any(axis=1))
            rows = rng.permutation(rows)[: min(per_shard, per_cluster - len(members))]
            for row in rows.tolist():
                unit = int(rng.choice(np.flatnonzero(latents[row] == cluster)))
                members.append(Member(name, row, keys[row], unit))
        if all(len(members) == per_cluster for members in found.values()):
            break
    return found
