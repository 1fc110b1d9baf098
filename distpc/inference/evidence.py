"""Checked evidence: arrays of values, NaN where missing, that fit a data set's variables."""

from __future__ import annotations

import numpy as np
import torch

from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import EvidenceError


def check_values(values: np.ndarray, spec: DatasetSpec, where: object) -> torch.Tensor:
    """Values as the circuit takes them, after a check of every cell.

    Args:
        values: (B, V) float64, NaN where missing.
        spec: the variables' names and categories.
        where: the file that the values came from, for errors.

    Returns:
        (B, V) int64 with MISSING, or float32 with NaN where a variable is real.

    Raises:
        EvidenceError: another width, or a cell that is infinite, fractional where categories are
            whole numbers, or outside the categories; it names the row and column (from 0).
    """
    if values.ndim != 2 or values.shape[1] != spec.num_variables:
        raise EvidenceError(
            "the rows have another width than the model",
            where=where,
            found=f"shape {values.shape}",
            expected=f"{spec.num_variables} values a row",
        )
    if not len(values):
        raise EvidenceError("there are no rows", where=where, expected="at least one row")
    missing = np.isnan(values)
    counts = np.array([np.inf if n is None else n for n in spec.num_categories])
    categorical = np.isfinite(counts)
    whole = ~categorical | (values == np.floor(values))
    inside = ~categorical | ((values >= 0) & (values < counts))
    wrong = ~missing & ~(np.isfinite(values) & whole & inside)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise _bad_cell(values[row, column], spec, row, column, int(wrong.sum()), where)
    if spec.is_discrete:
        return torch.from_numpy(np.where(missing, MISSING, values).astype(np.int64))
    return torch.from_numpy(values.astype(np.float32))


def is_missing(x: torch.Tensor) -> torch.Tensor:
    """(B, V) bool: which cells of checked or loaded values are missing."""
    return torch.isnan(x) if x.is_floating_point() else x == MISSING


def column_name(spec: DatasetSpec, column: int) -> str:
    """How errors and tables name a variable: by its column's name, or by its number."""
    return spec.columns[column] if spec.columns else str(column)


def _bad_cell(
    value: float, spec: DatasetSpec, row: int, column: int, count: int, where: object
) -> EvidenceError:
    categories = spec.num_categories[column]
    expected = "a finite number" if categories is None else f"a whole number 0 .. {categories - 1}"
    return EvidenceError(
        f"row {row}, column {column_name(spec, column)}: a value does not fit the model",
        where=where,
        found=f"{value:g}" + (f" (and {count - 1} more such cells)" if count > 1 else ""),
        expected=f"{expected}, or NaN / an empty cell for a missing value",
    )
