"""Rows of a table from .npy or .csv: integer columns are categorical, others real."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from distpc.config.sources import ArraysSource
from distpc.data.sources.base import Source, existing
from distpc.data.spec import MISSING, DatasetSpec
from distpc.data.tables import MAX_CATEGORIES, Table, read_table
from distpc.errors import DataError


class Arrays(Source):
    """Rows of `path` and, if given, published test rows behind them."""

    group_name = "rows"

    def __init__(self, config: ArraysSource) -> None:
        tables = [read_table(existing(config.path, "path"))]
        if config.test_path is not None:
            tables.append(read_table(existing(config.test_path, "test_path")))
            _check_same_columns(*tables)
        self._tables = tables
        is_integer = np.logical_and.reduce([table.is_integer for table in tables])
        values = np.concatenate([table.with_missing(is_integer) for table in tables])
        counts = _count_categories(tables[0], values, is_integer, config.num_categories)
        missing = np.isnan(values)
        self.num_published_test = len(tables[1].values) if len(tables) == 2 else 0
        self.num_samples = len(values)
        if is_integer.all():
            self._values = np.where(missing, MISSING, values).astype(np.int32)
        else:
            self._values = values.astype(np.float32)
        self.spec = DatasetSpec(
            name=tables[0].path.stem,
            kind="array",
            num_variables=values.shape[1],
            num_categories=counts,
            columns=tables[0].columns,
            has_missing=bool(missing.any()),
        )

    def read(self, position: int) -> np.ndarray:
        """(V,) int32 with MISSING, or float32 with NaN where there are real columns."""
        return self._values[position]

    def identity(self) -> dict[str, Any]:
        """Size, checksum and columns of every file; `3` and `3.0` make different columns."""
        return {
            "tables": [
                {
                    "name": table.path.name,
                    "shape": list(table.values.shape),
                    "crc32": zlib.crc32(table.values.tobytes()),
                    "columns": list(table.columns),
                    "is_integer": table.is_integer.tolist(),
                    "has_signed_integers": table.has_signed_integers,
                }
                for table in self._tables
            ]
        }

    def facts(self) -> dict[str, Any]:
        """Which columns are categorical, and the share of missing cells."""
        missing = self._values == MISSING if self.spec.is_discrete else np.isnan(self._values)
        return {
            "num_categories": list(self.spec.num_categories),
            "missing_fraction": round(float(missing.mean()), 6),
        }


def _check_same_columns(train: Table, test: Table) -> None:
    if train.values.shape[1] != test.values.shape[1] or train.columns != test.columns:
        raise DataError(
            "test rows have other columns than training rows",
            where=test.path,
            found=test.columns or f"{test.values.shape[1]} columns",
            expected=train.columns or f"{train.values.shape[1]} columns",
        )


def _count_categories(
    table: Table, values: np.ndarray, is_integer: np.ndarray, num_categories: int | None
) -> tuple[int | None, ...]:
    """Values of every column: given or found, None for real columns."""
    counts: list[int | None] = []
    for column, integer in enumerate(is_integer):
        present = values[:, column][~np.isnan(values[:, column])]
        names = table.columns
        where = f"{table.path}, column {names[column] if names else column}"
        if not len(present):
            raise DataError("a column holds no value at all", where=where, fix="remove it")
        if not integer:
            counts.append(None)
            continue
        most = num_categories or MAX_CATEGORIES
        if present.min() < 0 or present.max() >= most:
            raise DataError(
                "an integer column's values are no categories",
                where=where,
                found=f"{present.min():.0f} .. {present.max():.0f}",
                expected=f"0 .. {most - 1}",
                fix="recode them from 0, or write them as real numbers (1.0 in .csv, float .npy)",
            )
        counts.append(num_categories or max(2, int(present.max()) + 1))
    return tuple(counts)
