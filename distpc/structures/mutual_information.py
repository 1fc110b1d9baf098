"""Mutual information of all pairs of discrete variables, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.special import xlogy

from distpc.data.spec import MISSING
from distpc.errors import DataError

Rows = np.ndarray | Iterable[np.ndarray]
"""One array of rows, or batches of them."""

MAX_BYTES = 2**28
"""Of count tables that are held at once, unless the caller says otherwise."""

_Block = tuple[slice, slice]

# Pairs of variables with few values are counted by matrix products of one-hot rows, others one by
# one: its cost does not grow with the values (16 values: 3 times as fast on one core).
_MATMUL_VALUES = 6
_BLOCK_WIDTH = 1024
_BLOCK_SAMPLES = 8192


def mutual_information(
    rows: Rows,
    num_values: Sequence[int] | np.ndarray,
    *,
    pseudocount: float = 0.1,
    max_bytes: int = MAX_BYTES,
) -> np.ndarray:
    """Mutual information in nats of every pair of columns.

    A pair is estimated from the samples that miss neither of its values, with `pseudocount` added
    to every cell of its table. The tables of all pairs need not exist at once: the batches are
    walked as often as it takes to count them all in `max_bytes`, and no batch is kept.

    Args:
        rows: (N, V) integers in 0 .. num_values - 1, -1 = missing; or batches (N_i, V) of them,
            such as shards, in a list or any object that can be iterated again.
        num_values: (V,) number of values of each column.
        pseudocount: added to every cell of a table.
        max_bytes: of count tables in memory.

    Returns:
        (V, V) float64, symmetric; the diagonal is 0.

    Raises:
        DataError: rows or values that do not fit, tables that no walk can hold, or an iterator
            that ends after one walk where several are needed.
    """
    sizes = np.asarray(num_values, dtype=np.int64)
    result = np.zeros((len(sizes), len(sizes)))
    walks = _walks(sizes, max_bytes)
    if len(walks) > 1 and isinstance(rows, Iterator):
        raise DataError(
            "pairs of values take several walks over the data, and an iterator allows one",
            where="rows",
            found=f"{len(walks)} walks with tables of {max_bytes} bytes",
            fix="pass a list of batches or an object with __iter__, or raise max_bytes",
        )
    for blocks in walks:
        for (first, second), counts in zip(blocks, _count(rows, sizes, blocks), strict=True):
            block = _information(counts, sizes[first], sizes[second], pseudocount)
            result[first, second] = block
            result[second, first] = block.T
    np.fill_diagonal(result, 0.0)
    return result


def count_pairs(
    rows: Rows, num_values: Sequence[int] | np.ndarray, pairs: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Count tables of some pairs of columns, in one walk over the rows.

    Args:
        rows, num_values: as of `mutual_information`.
        pairs: (first, second) columns.

    Returns:
        for each pair (values of first, values of second) int64 counts.

    Raises:
        DataError: rows or values that do not fit.
    """
    sizes = np.asarray(num_values, dtype=np.int64)
    blocks = [(slice(one, one + 1), slice(other, other + 1)) for one, other in pairs]
    return [table.astype(np.int64) for table in _count(rows, sizes, blocks)]


def _count(rows: Rows, sizes: np.ndarray, blocks: Sequence[_Block]) -> list[np.ndarray]:
    tables = [
        np.zeros((int(sizes[one].sum()), int(sizes[other].sum())), np.uint32)
        for one, other in blocks
    ]
    for columns in _chunks(rows, sizes):
        for table, (one, other) in zip(tables, blocks, strict=True):
            table += _pair_tables(columns, sizes, one, other)
    return tables


def _walks(sizes: np.ndarray, max_bytes: int) -> list[list[_Block]]:
    """Blocks of pairs, grouped so that each group's tables fit in `max_bytes`."""
    walks: list[list[_Block]] = [[]]
    left = max_bytes
    for first, second in _blocks(sizes):
        needed = 4 * int(sizes[first].sum()) * int(sizes[second].sum())
        if needed > max_bytes:
            raise DataError(
                "the table of one pair of variables does not fit in memory",
                where=f"variables {first.start} and {second.start}",
                found=f"{sizes[first.start]} and {sizes[second.start]} values",
                expected=f"a table of at most {max_bytes} bytes",
                fix="put the values into bins, or raise max_bytes",
            )
        if needed > left:
            walks.append([])
            left = max_bytes
        walks[-1].append((first, second))
        left -= needed
    return walks


def _pair_tables(columns: np.ndarray, sizes: np.ndarray, first: slice, second: slice) -> np.ndarray:
    """Count tables of all pairs of a variable in `first` and one in `second`, side by side.

    Args:
        columns: (V, n) values of a chunk, -1 = missing.
        sizes: (V,) number of values of each variable.

    Returns:
        (values of all first variables, values of all second ones) uint32 counts.
    """
    if max(sizes[first].max(), sizes[second].max()) > _MATMUL_VALUES:
        tables = [
            _count_cells(columns[row], columns[second], int(sizes[row]), sizes[second])
            for row in range(first.start, first.stop)
        ]
        return np.concatenate(tables)
    # Counts up to 2^24 are exact in float32.
    one, other = _one_hot(columns[first], sizes[first]), _one_hot(columns[second], sizes[second])
    return (one.T @ other).astype(np.uint32)


def _chunks(rows: Rows, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """(V, n) contiguous small integers, checked for range; batches joined to a useful size."""
    dtype = np.min_scalar_type(-1 - int(sizes.max(initial=0)))
    parts: list[np.ndarray] = []
    for batch in [rows] if isinstance(rows, np.ndarray) else rows:
        if batch.ndim != 2 or batch.shape[1] != len(sizes):
            raise DataError(
                "a batch of rows has another shape than the variables",
                where="rows",
                found=f"shape {batch.shape}",
                expected=f"(samples, {len(sizes)})",
            )
        wrong = (batch < MISSING) | (batch >= sizes)
        if wrong.any():
            row, variable = np.argwhere(wrong)[0].tolist()
            raise DataError(
                "a value is not one of its variable's",
                where=f"rows, variable {variable}",
                found=batch[row, variable],
                expected=f"0 .. {sizes[variable] - 1}, or -1 where missing",
            )
        for start in range(0, len(batch), _BLOCK_SAMPLES):
            parts.append(batch[start : start + _BLOCK_SAMPLES].T.astype(dtype))
            if sum(part.shape[1] for part in parts) >= _BLOCK_SAMPLES:
                yield np.concatenate(parts, axis=1)
                parts = []
    if parts:
        yield np.concatenate(parts, axis=1)


def _blocks(sizes: np.ndarray) -> Iterable[_Block]:
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
    for start, values in zip(starts.tolist(), columns, strict=True):
        known = np.flatnonzero(values >= 0)
        result[known, start + values[known].astype(np.int64)] = 1.0
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
    return np.concatenate(tables, axis=1).astype(np.uint32)


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
