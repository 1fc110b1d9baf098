"""Few values a variable, so that pairwise tables stay small: binning of ordered values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from distpc.data.spec import MISSING

Binning = Literal["frequency", "range"]


def discretize(
    x: np.ndarray,
    num_categories: Sequence[int | None],
    num_bins: int,
    *,
    binning: Binning = "frequency",
) -> tuple[np.ndarray, np.ndarray]:
    """Bin the columns that have more than `num_bins` values; leave the others alone.

    Args:
        x: (N, V) integers with -1 = missing, or floats with NaN = missing.
        num_categories: length V, categories of each variable; None for a real column.
        num_bins: most values of a binned column.
        binning: `frequency` for bins of about equally many samples (equal values stay together),
            `range` for bins of equal width between the least and the largest value.

    Returns:
        (N, V) int16 values with -1 = missing, and (V,) the number of values of each column.
    """
    rows = np.empty(x.shape, dtype=np.int16)
    num_values = np.empty(x.shape[1], dtype=np.int64)
    for column, categories in enumerate(num_categories):
        values = x[:, column]
        if categories is not None and categories <= num_bins:
            real = np.issubdtype(values.dtype, np.floating)
            rows[:, column] = np.where(np.isnan(values), MISSING, values) if real else values
            num_values[column] = categories
        else:
            rows[:, column] = _bin(values, categories is None, num_bins, binning)
            num_values[column] = num_bins
    return rows, num_values


def _bin(values: np.ndarray, is_real: bool, num_bins: int, binning: Binning) -> np.ndarray:
    """Bin one column (N,); missing stays -1."""
    if np.issubdtype(values.dtype, np.floating):
        present = ~np.isnan(values)
        if not is_real:
            present &= values >= 0
    else:
        present = values >= 0
    binned = np.full(len(values), MISSING, dtype=np.int16)
    known = values[present]
    if not len(known):
        return binned
    if binning == "range":
        edges = np.linspace(known.min(), known.max(), num_bins + 1)[1:-1]
    else:
        edges = frequency_edges(known, num_bins)
    binned[present] = np.searchsorted(edges, known, side="right")
    return binned


def frequency_edges(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Lower ends of bins 1 .. num_bins - 1 with about equally many of `values` in each.

    A value that fills several bins alone (the black of an image's background) takes one, and the
    bins that are freed go to the rest.
    """
    distinct, counts = np.unique(values, return_counts=True)
    edges: list[float] = []
    remaining, filled, bins_left = int(counts.sum()), 0, num_bins
    for value, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        # Close the bin before this value if that leaves it nearer to its fair share.
        if filled and bins_left > 1 and filled + count / 2 > remaining / bins_left:
            edges.append(value)
            remaining -= filled
            filled, bins_left = 0, bins_left - 1
        filled += count
    return np.array(edges)
