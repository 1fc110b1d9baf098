"""Mutual information of all pairs of discrete variables, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.special import xlogy

# Pairs of variables with few values are counted by matrix products of one-hot rows, others one by
# one: its cost does not grow with the values (16 values: 3 times as fast on one core).
_MATMUL_VALUES = 6
_BLOCK_WIDTH = 1024
_BLOCK_SAMPLES = 8192


def mutual_information(
    rows: np.ndarray | Iterable[np.ndarray],
    num_values: Sequence[int] | np.ndarray,
    *,
    pseudocount: float = 0.1,
) -> np.ndarray:
    """Mutual information in nats of every pair of columns.

    A pair is estimated from the samples that miss neither of its values, with `pseudocount` added
    to every cell of its table. Memory is one compact copy of the rows (1 or 2 bytes a value) and
    a few 10 MB: the tables of all pairs never exist at once.

    Args:
        rows: (N, V) integers in 0 .. num_values - 1, -1 = missing; or batches (N_i, V) of them.
        num_values: (V,) number of values of each column.
        pseudocount: added to every cell of a table.

    Returns:
        (V, V) float64, symmetric; the diagonal is 0.
    """
    sizes = np.asarray(num_values, dtype=np.int64)
    columns = _compact_columns(rows, sizes)
    result = np.zeros((len(sizes), len(sizes)))
    for first, second in _blocks(sizes):
        counts = pair_tables(columns, sizes, first, second)
        block = _information(counts, sizes[first], sizes[second], pseudocount)
        result[first, second] = block
        result[second, first] = block.T
    np.fill_diagonal(result, 0.0)
    return result


def pair_tables(columns: np.ndarray, sizes: np.ndarray, first: slice, second: slice) -> np.ndarray:
    """Count tables of all pairs of a variable in `first` and one in `second`, side by side.

    Args:
        columns: (V, N) values, -1 = missing.
        sizes: (V,) number of values of each variable.

    Returns:
        (values of all first variables, values of all second ones) float64 counts.
    """
    if max(sizes[first].max(), sizes[second].max()) > _MATMUL_VALUES:
        tables = [
            _count_cells(columns[row], columns[second], int(sizes[row]), sizes[second])
            for row in range(first.start, first.stop)
        ]
        return np.concatenate(tables)
    counts = np.zeros((int(sizes[first].sum()), int(sizes[second].sum())))
    for start in range(0, columns.shape[1], _BLOCK_SAMPLES):
        part = columns[:, start : start + _BLOCK_SAMPLES]
        counts += _one_hot(part[first], sizes[first]).T @ _one_hot(part[second], sizes[second])
    return counts


def _compact_columns(rows: np.ndarray | Iterable[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """(V, N) contiguous small integers from rows or batches of rows, checked for range."""
    dtype = np.int8 if sizes.max(initial=0) <= 127 else np.int16
    parts = [np.empty((len(sizes), 0), dtype)]
    for batch in [rows] if isinstance(rows, np.ndarray) else rows:
        if batch.ndim != 2 or batch.shape[1] != len(sizes):
            raise ValueError(f"rows of shape {batch.shape} for {len(sizes)} variables")
        if batch.size and (batch.min() < -1 or (batch.max(axis=0) >= sizes).any()):
            raise ValueError("a value is outside -1 .. num_values - 1")
        parts.append(batch.T.astype(dtype))
    return np.concatenate(parts, axis=1)


def _blocks(sizes: np.ndarray) -> Iterable[tuple[slice, slice]]:
    """Pairs of variable ranges that cover the upper triangle in blocks of bounded width."""
    groups: list[slice] = []
    start = 0
    while start < len(sizes):
        widths = np.cumsum(sizes[start:])
        stop = start + max(1, int(np.searchsorted(widths, _BLOCK_WIDTH, side="right")))
        groups.append(slice(start, stop))
        start = stop
    for index, first in enumerate(groups):
        for second in groups[index:]:
            yield first, second


def _one_hot(columns: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(N, sum of sizes) float32 indicators of the values (V, N); a missing value has none."""
    starts = np.cumsum(sizes) - sizes
    result = np.zeros((columns.shape[1], int(sizes.sum())), dtype=np.float32)
    variables, samples = np.nonzero(columns >= 0)
    result[samples, starts[variables] + columns[variables, samples]] = 1.0
    return result


def _count_cells(first: np.ndarray, others: np.ndarray, size: int, sizes: np.ndarray) -> np.ndarray:
    """(size, sum of sizes) counts of one variable (N,) against others (V, N), one by one."""
    tables = []
    scaled: dict[int, np.ndarray] = {}
    for values, width in zip(others, (sizes + 1).tolist(), strict=True):
        # Missing is row or column 0 of a larger table, and cut off: no masks over the samples.
        if width not in scaled:
            scaled[width] = (first.astype(np.int64) + 1) * width + 1
        counts = np.bincount(scaled[width] + values, minlength=(size + 1) * width)
        tables.append(counts.reshape(size + 1, width)[1:, 1:])
    return np.concatenate(tables, axis=1).astype(np.float64)


def _information(
    counts: np.ndarray, first: np.ndarray, second: np.ndarray, pseudocount: float
) -> np.ndarray:
    """(variables of first, of second) information in nats from tables side by side.

    Uses n I = sum n_ab log n_ab - sum n_a log n_a - sum n_b log n_b + n log n.
    """
    rows, columns = np.cumsum(first) - first, np.cumsum(second) - second
    joint = counts + pseudocount
    row_sums = np.add.reduceat(joint, columns, axis=1)
    column_sums = np.add.reduceat(joint, rows, axis=0)
    totals = np.add.reduceat(row_sums, rows, axis=0)
    cells = np.add.reduceat(xlogy(joint, joint), columns, axis=1)
    scaled = np.add.reduceat(cells - xlogy(row_sums, row_sums), rows, axis=0)
    scaled += xlogy(totals, totals)
    scaled -= np.add.reduceat(xlogy(column_sums, column_sums), columns, axis=1)
    return np.maximum(scaled, 0.0) / np.where(totals > 0, totals, 1.0)
