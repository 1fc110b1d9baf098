"""Few values a variable, so that pairwise tables stay small: binning of ordered values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distpc.data.spec import MISSING

Binning = Literal["frequency", "range"]


@dataclass(frozen=True)
class Bins:
    """Bins of columns, found in a sample of rows and applied to any others.

    Attributes:
        edges: for each column the lower ends of bins 1, 2, ..; None where values are kept.
        num_values: (V,) number of values of each column when binned.
        is_real: (V,) whether negative values are values, not missing ones.
    """

    edges: tuple[np.ndarray | None, ...]
    num_values: np.ndarray
    is_real: np.ndarray

    @classmethod
    def of(
        cls,
        x: np.ndarray,
        num_categories: Sequence[int | None],
        num_bins: int,
        *,
        binning: Binning = "frequency",
    ) -> Bins:
        """Bins for the columns that have more than `num_bins` values.

        Args:
            x: (N, V) integers with -1 = missing, or floats with NaN = missing.
            num_categories: length V, categories of each variable; None for a real column.
            num_bins: most values of a binned column.
            binning: `frequency` for bins of about equally many samples (equal values stay
                together), `range` for bins of equal width between the least and the largest value.
        """
        edges: list[np.ndarray | None] = []
        for column, categories in enumerate(num_categories):
            if categories is not None and categories <= num_bins:
                edges.append(None)
                continue
            known = x[:, column][_present(x[:, column], categories is None)]
            if binning == "range" and len(known):
                edges.append(np.linspace(known.min(), known.max(), num_bins + 1)[1:-1])
            else:
                edges.append(frequency_edges(known, num_bins))
        sizes = [num_bins if c is None else min(c, num_bins) for c in num_categories]
        is_real = np.array([categories is None for categories in num_categories])
        return cls(tuple(edges), np.array(sizes, dtype=np.int64), is_real)

    def apply(self, x: np.ndarray) -> np.ndarray:
        """(N, V) int16 values with -1 = missing."""
        rows = np.full(x.shape, MISSING, dtype=np.int16)
        for column, edges in enumerate(self.edges):
            values = x[:, column]
            present = _present(values, bool(self.is_real[column]))
            known = values[present]
            found = known if edges is None else np.searchsorted(edges, known, side="right")
            rows[present, column] = found
        return rows

    def stream(self, batches: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        """The batches binned one by one; can be iterated as often as `batches` can."""
        return _Binned(self, batches)


@dataclass(frozen=True)
class _Binned:
    bins: Bins
    batches: Iterable[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.bins.apply, self.batches)


def discretize(
    x: np.ndarray,
    num_categories: Sequence[int | None],
    num_bins: int,
    *,
    binning: Binning = "frequency",
) -> tuple[np.ndarray, np.ndarray]:
    """Bin the columns that have more than `num_bins` values; leave the others alone.

    Args: as of `Bins.of`.

    Returns:
        (N, V) int16 values with -1 = missing, and (V,) the number of values of each column.
    """
    bins = Bins.of(x, num_categories, num_bins, binning=binning)
    return bins.apply(x), bins.num_values


def _present(values: np.ndarray, is_real: bool) -> np.ndarray:
    """(N,) which values are not missing."""
    present = ~np.isnan(values) if np.issubdtype(values.dtype, np.floating) else None
    if is_real and present is not None:
        return present
    return values >= 0 if present is None else present & (values >= 0)


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
