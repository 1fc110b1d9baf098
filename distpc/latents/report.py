"""How well a codebook is used: figures, pictures, and a refusal where it collapsed.

Legend: N samples, Z latents of a sample, K clusters of a codebook. Where every position has a
codebook of its own, value c at position z is another cluster than c elsewhere: number z * K + c.
Missing tokens have no latent (NO_LATENT), and no part in any figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents.store import NO_LATENT

MAX_PAIR_SAMPLES = 20_000
"""Samples whose neighbouring latents are counted; more would not change the figure."""
MAX_PAIR_LATENTS = 2**24
"""A bound on their latents, which are held in memory."""


@dataclass(frozen=True)
class LatentReport:
    """What the values of all latents look like together.

    Attributes:
        num_clusters: K.
        num_codebooks: 1, or Z.
        samples: N over all shards.
        latents_per_sample: Z.
        missing: of the N Z latents, those of missing tokens.
        used: clusters that occur.
        dead: clusters that do not.
        usage_entropy_bits: entropy of a latent's value over all samples and positions; the mean of
            codebooks where there are several.
        max_entropy_bits: log2 K, which equal use would give.
        largest_share: share of the most frequent cluster in the latents of its codebook.
        mean_squared_distance: of features to their centroid.
        explained_variance: 1 - mean_squared_distance over the features' variance.
        neighbour_information_bits: mutual information of latents beside and below each other
            (`horizontal`, `vertical`); the mean over pairs of positions where these have
            codebooks; empty where latents lie on no grid.
        pair_samples: samples that the mutual information was counted on.
        usage: how often each cluster occurs, K counts of every codebook.
    """

    num_clusters: int
    num_codebooks: int
    samples: int
    latents_per_sample: int
    missing: int
    used: int
    dead: int
    usage_entropy_bits: float
    max_entropy_bits: float
    largest_share: float
    mean_squared_distance: float
    explained_variance: float
    neighbour_information_bits: dict[str, float]
    pair_samples: int
    usage: list[int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatentReport:
        """What `to_json` gave, other keys left out; older ones do not say what is missing."""
        known = {field.name for field in fields(cls)}
        return cls(**{"missing": 0, **{key: value[key] for key in known & value.keys()}})


def make_report(
    shards: Iterable[np.ndarray],
    num_clusters: int,
    grid: tuple[int, int] | None,
    inertia: float,
    feature_variance: float,
    per_position: bool = False,
) -> LatentReport:
    """Count the latents of all shards, (N, Z) integers each, in one pass.

    Args:
        grid: rows and columns of the patches, Z = rows * columns; None if they lie on no grid.
        inertia: sum of squared distances of all features to their centroids.
        feature_variance: mean squared distance of all features to their mean.
        per_position: whether every position has a codebook of its own.
    """
    usage = np.zeros((0, num_clusters), dtype=np.int64)
    seen: list[np.ndarray] = []
    samples = pair_samples = per_sample = 0
    for latents in shards:
        per_sample = latents.shape[1]
        if not samples:
            usage = np.zeros((per_sample if per_position else 1, num_clusters), dtype=np.int64)
        columns = latents.T if per_position else latents.reshape(1, -1)
        for counts, column in zip(usage, columns, strict=True):
            counts += np.bincount(column[column != NO_LATENT], minlength=num_clusters)
        samples += len(latents)
        if grid is not None:
            most = min(MAX_PAIR_SAMPLES, MAX_PAIR_LATENTS // per_sample)
            seen.append(latents[: max(0, most - pair_samples)])
            pair_samples += len(seen[-1])
    points = int(usage.sum())
    used = int((usage > 0).sum())
    distance = inertia / points
    return LatentReport(
        num_clusters=num_clusters,
        num_codebooks=len(usage),
        samples=samples,
        latents_per_sample=per_sample,
        missing=samples * per_sample - points,
        used=used,
        dead=usage.size - used,
        usage_entropy_bits=float(np.mean([entropy_bits(counts) for counts in usage])),
        max_entropy_bits=float(np.log2(num_clusters)),
        largest_share=max(float(counts.max() / max(1, counts.sum())) for counts in usage),
        mean_squared_distance=distance,
        explained_variance=1 - distance / feature_variance if feature_variance > 0 else 0.0,
        neighbour_information_bits=_of_neighbours(seen, grid, per_position),
        pair_samples=pair_samples,
        usage=usage.ravel().tolist(),
    )


def _of_neighbours(
    seen: list[np.ndarray], grid: tuple[int, int] | None, per_position: bool
) -> dict[str, float]:
    """Mutual information of latents beside and below each other, where there are any."""
    if grid is None:
        return {}
    maps = np.concatenate(seen).reshape(-1, *grid)
    sides = {
        "horizontal": (maps[:, :, :-1], maps[:, :, 1:]),
        "vertical": (maps[:, :-1], maps[:, 1:]),
    }
    found = {}
    for name, (first, second) in sides.items():
        if not first.size:
            continue
        shape = (len(maps), -1) if per_position else (-1, 1)
        columns = zip(first.reshape(shape).T, second.reshape(shape).T, strict=True)
        pairs = [_both_there(*pair) for pair in columns]
        of_pairs = [mutual_information_bits(*pair) for pair in pairs if len(pair[0])]
        if of_pairs:
            found[name] = float(np.mean(of_pairs))
    return found


def _both_there(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of (n,) pairs of latents of which neither is missing."""
    there = (first != NO_LATENT) & (second != NO_LATENT)
    return first[there], second[there]


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of the distribution that `counts` (any shape, not all zero) describe."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def mutual_information_bits(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information in bits of two variables, from (n,) values of each, 0 or more.

    Only pairs that occur are counted: a table of all would take 32 GiB at 65,536 values.
    The plug-in estimate is too high when cells are many and counts few; the Miller-Madow
    correction (Miller 1955) takes off the expected excess.
    """
    rows, columns = np.bincount(first), np.bincount(second)
    _, pairs = np.unique(first.astype(np.int64) * len(columns) + second, return_counts=True)
    plug_in = entropy_bits(rows) + entropy_bits(columns) - entropy_bits(pairs)
    cells = len(pairs) - (rows > 0).sum() - (columns > 0).sum() + 1
    return float(max(0.0, plug_in - cells / (2 * len(first) * np.log(2))))


def refuse_collapse(report: LatentReport, config: LatentsConfig, where: Path) -> None:
    """Stop the run where too few clusters carry the latents.

    Raises:
        LatentError: with the figures and what to change.
    """
    least_bits = config.min_usage_entropy_fraction * report.max_entropy_bits
    most_dead = config.max_dead_fraction * len(report.usage)
    if report.usage_entropy_bits >= least_bits and report.dead <= most_dead:
        return
    raise LatentError(
        "the codebook collapsed: most latents have one of few values",
        where=where,
        found=f"usage entropy {report.usage_entropy_bits:.3f} bits, {report.used} of "
        f"{len(report.usage)} clusters used, {report.dead} dead, the largest holds "
        f"{report.largest_share:.1%} of all latents",
        expected=f"at least {least_bits:.3f} bits "
        f"(latents.min_usage_entropy_fraction = {config.min_usage_entropy_fraction:g} of "
        f"{report.max_entropy_bits:g}) and at most {most_dead:g} dead clusters "
        f"(latents.max_dead_fraction = {config.max_dead_fraction:g})",
        fix="set fewer latents.num_clusters, try a control (teacher.kind=pixels, of text onehot) "
        "to see whether the teacher is at fault, train the teacher longer, or lower these limits "
        "if such data are expected",
    )


def log_report(report: LatentReport, folder: Path) -> None:
    """Write the report's scalars and a picture of the sorted usage for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        writer.add_scalar("latents/usage_entropy_bits", report.usage_entropy_bits, 0)
        writer.add_scalar("latents/used_clusters", report.used, 0)
        writer.add_scalar("latents/mean_squared_distance", report.mean_squared_distance, 0)
        writer.add_scalar("latents/explained_variance", report.explained_variance, 0)
        for name, bits in report.neighbour_information_bits.items():
            writer.add_scalar(f"latents/{name}_information_bits", bits, 0)
        usage = np.asarray(report.usage)
        writer.add_histogram("latents/patches_per_cluster", usage, 0)
        writer.add_image("latents/usage_sorted", usage_picture(usage), 0, dataformats="HW")


def usage_picture(usage: np.ndarray, height: int = 128, width: int = 512) -> np.ndarray:
    """(height, width) uint8: clusters from the most to the least used as dark bars on white."""
    bars = np.sort(usage)[::-1][np.arange(width) * len(usage) // width]
    tops = np.ceil(bars / max(1, usage.max()) * (height - 1))
    above = np.arange(height)[::-1, None]
    return np.where(above < tops, 64, 255).astype(np.uint8)
