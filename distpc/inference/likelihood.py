"""Exact log-likelihoods of whole splits, and the figures that are reported of them."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from distpc.circuits.circuit import Circuit
from distpc.data.index import ShardIndex
from distpc.data.reader import iterate_split
from distpc.parallel.progress import Progress
from distpc.training.figures import bits_per_value, count_values

MAX_NAMED_SAMPLES = 20


@dataclass(frozen=True)
class SplitFigures:
    """How well a circuit predicts one split.

    Attributes:
        num_samples: samples that were evaluated, each once.
        num_samples_in_split: samples there are.
        num_values: observed values over all samples, characters of text; missing ones are not
            counted.
        nats_per_sample: mean log-likelihood.
        bits: -log2 likelihood per observed value: bits per dimension, or per character.
        bits_standard_error: of `bits` over the choice of samples; None if it is not finite.
        num_non_finite: samples at -inf or NaN. They stay in the mean, which is then infinite.
        non_finite_keys: the keys of the first MAX_NAMED_SAMPLES such samples.
        seconds: time spent.
        samples_per_second: speed.
    """

    num_samples: int
    num_samples_in_split: int
    num_values: int
    nats_per_sample: float
    bits: float
    bits_standard_error: float | None
    num_non_finite: int
    non_finite_keys: tuple[str, ...]
    seconds: float
    samples_per_second: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "non_finite_keys": list(self.non_finite_keys)}


def measure(
    circuit: Circuit, index: ShardIndex, split: str, *, batch_size: int, limit: int | None = None
) -> SplitFigures:
    """Evaluate every sample of a split once, or its first `limit` samples.

    Args:
        circuit: the model.
        index: of the shards; the split must have samples.
        split: train, valid or test.
        batch_size: samples read and evaluated at once.
        limit: most samples that are evaluated; None for all.
    """
    there = index.num_samples(split)
    wanted = there if limit is None else min(limit, there)
    nats: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    done = 0
    start = time.perf_counter()
    with Progress(f"evaluate {split}", wanted, "samples") as progress:
        for batch in iterate_split(index, index.spec, split, batch_size):
            x = torch.as_tensor(batch)[: wanted - done]
            log_prob = circuit.log_prob(x, batch_size=batch_size)
            nats.append(log_prob.cpu().double().numpy())
            counts.append(count_values(x, index.spec.counted).numpy())
            done += len(x)
            progress.advance(len(x))
            if done >= wanted:
                break
    seconds = time.perf_counter() - start
    bad = np.flatnonzero(~np.isfinite(np.concatenate(nats)))
    keys = _keys(index, split, bad[:MAX_NAMED_SAMPLES])
    return _figures(np.concatenate(nats), np.concatenate(counts), keys, there, seconds)


def _figures(
    nats: np.ndarray, counts: np.ndarray, keys: tuple[str, ...], in_split: int, seconds: float
) -> SplitFigures:
    bits, error = bits_and_error(nats, counts)
    return SplitFigures(
        num_samples=len(nats),
        num_samples_in_split=in_split,
        num_values=int(counts.sum()),
        nats_per_sample=float(nats.mean()),
        bits=bits,
        bits_standard_error=error,
        num_non_finite=int((~np.isfinite(nats)).sum()),
        non_finite_keys=keys,
        seconds=round(seconds, 3),
        samples_per_second=round(len(nats) / max(seconds, 1e-9), 1),
    )


def _keys(index: ShardIndex, split: str, positions: np.ndarray) -> tuple[str, ...]:
    """Keys of the samples at these positions of a split."""
    entries = index.shards(split)
    firsts = np.cumsum([0] + [entry.num_samples for entry in entries])
    shards = np.searchsorted(firsts, positions, side="right") - 1
    return tuple(
        entries[shard].samples().keys[position - firsts[shard]]
        for shard, position in zip(shards.tolist(), positions.tolist(), strict=True)
    )


def bits_and_error(nats: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Bits per observed value, and its standard error.

    The figure is a ratio of two sums over samples, so its error is that of a ratio estimator
    (Cochran 1977, Sampling Techniques, eq. 6.4), which is std / sqrt(N) when no value is missing.

    Args:
        nats: (N,) log-likelihoods.
        counts: (N,) what counts of each sample, see `count_values`.

    Returns:
        The figure (infinite if a sample is impossible or nothing counts), and None for an error
        that is not finite.
    """
    total = int(counts.sum())
    figure = bits_per_value(float(nats.sum()), total)
    if not math.isfinite(figure) or len(nats) < 2:
        return figure, None
    residuals = -nats / math.log(2) - figure * counts
    error = math.sqrt((residuals**2).sum() / (len(nats) - 1) / len(nats)) / (total / len(nats))
    return figure, float(error)
