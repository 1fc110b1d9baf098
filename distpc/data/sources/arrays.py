"""Rows of a table from .npy or .csv: integer columns are categorical, others real.

Which column is which: in a .csv, a column is integer when every present cell is written as an
integer (`3`, not `3.0`); in a .npy of integers every column is, and -1 is a missing value; in a
.npy of floats a column is integer when every present value is a whole number from 0 to
MAX_CATEGORIES - 1, since NaN as missing value forces such columns to be stored as floats.
"""

from __future__ import annotations

import csv
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distpc.config.sources import ArraysSource
from distpc.data.sources.base import Source, existing
from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import DataError

MAX_CATEGORIES = 2**15
"""More values than this in an integer column: it is an amount, not a category."""

MISSING_CELLS = ("", "nan", "NaN", "NAN")


@dataclass(frozen=True)
class Table:
    """A file's content.

    Attributes:
        path: where it comes from.
        values: (N, V) float64, NaN missing.
        columns: names; empty for .npy.
        is_integer: (V,) bool.
    """

    path: Path
    values: np.ndarray
    columns: tuple[str, ...]
    is_integer: np.ndarray


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
        counts = _count_categories(tables, is_integer, config.num_categories)
        values = np.concatenate([table.values for table in tables])
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
        """Size and checksum of every file's values."""
        return {
            table.path.name: [len(table.values), zlib.crc32(table.values.tobytes())]
            for table in self._tables
        }

    def facts(self) -> dict[str, Any]:
        """Which columns are categorical, and the share of missing cells."""
        missing = self._values == MISSING if self.spec.is_discrete else np.isnan(self._values)
        return {
            "num_categories": list(self.spec.num_categories),
            "missing_fraction": round(float(missing.mean()), 6),
        }


def read_table(path: Path) -> Table:
    """Read a .npy (2 dimensions, numbers) or .csv (header line, numbers) file.

    Raises:
        DataError: naming the line and column of what is wrong.
    """
    if path.suffix == ".npy":
        table = _read_npy(path)
    elif path.suffix == ".csv":
        table = _read_csv(path)
    else:
        raise DataError("unknown kind of table", where=path, expected="a .npy or .csv file")
    if not table.values.size:
        raise DataError("a table holds no rows", where=path, found=table.values.shape)
    if np.isinf(table.values).any():
        row, column = np.argwhere(np.isinf(table.values))[0]
        raise DataError(
            "a table holds an infinite value",
            where=f"{path}, row {row}, column {column}",
            expected="finite numbers; NaN or an empty cell where a value is missing",
        )
    return table


def _read_npy(path: Path) -> Table:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError("not a readable .npy file", where=path, found=error) from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "biuf":
        shape = getattr(values, "shape", None)
        raise DataError(
            "a .npy file holds no table of numbers",
            where=path,
            found=f"shape {shape}, {getattr(values, 'dtype', type(values).__name__)}",
            expected="2 dimensions (rows, columns) of booleans, integers or floats",
        )
    table = values.astype(np.float64)
    if values.dtype.kind != "f":
        if values.dtype.kind == "i":
            table[values == MISSING] = np.nan
        return Table(path, table, (), np.ones(values.shape[1], dtype=bool))
    with np.errstate(invalid="ignore"):
        whole = np.isnan(table) | (
            (table == np.floor(table)) & (table >= 0) & (table < MAX_CATEGORIES)
        )
    return Table(path, table, (), whole.all(axis=0))


def _read_csv(path: Path) -> Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            lines = [line for line in csv.reader(handle) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError("not a readable .csv file", where=path, found=error) from error
    if not lines:
        raise DataError("a .csv file is empty", where=path, expected="a header line and rows")
    columns = tuple(name.strip() for name in lines[0])
    if all(_is_number(name) for name in columns):
        raise DataError(
            "a .csv file has no header line",
            where=f"{path}, line 1",
            found=",".join(columns)[:80],
            expected="the names of the columns",
            fix="put a first line such as a,b,c",
        )
    values = np.empty((len(lines) - 1, len(columns)))
    is_integer = np.ones(len(columns), dtype=bool)
    for row, line in enumerate(lines[1:]):
        if len(line) != len(columns):
            raise DataError(
                "a .csv row has another number of cells than the header",
                where=f"{path}, row {row + 1} after the header",
                found=len(line),
                expected=len(columns),
            )
        for column, cell in enumerate(line):
            value, integer = _parse(cell.strip(), f"{path}, row {row + 1}, '{columns[column]}'")
            values[row, column] = value
            is_integer[column] &= integer
    return Table(path, values, columns, is_integer)


def _parse(cell: str, where: str) -> tuple[float, bool]:
    """A cell's value (NaN if missing), and whether it may stand in an integer column."""
    if cell in MISSING_CELLS:
        return math.nan, True
    try:
        return float(cell), cell.lstrip("+-").isdecimal()
    except ValueError as error:
        raise DataError(
            "a .csv cell is no number",
            where=where,
            found=cell[:80],
            expected="a number, or nothing where the value is missing",
            fix="encode categories as integers 0, 1, 2, ...",
        ) from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _check_same_columns(train: Table, test: Table) -> None:
    if train.values.shape[1] != test.values.shape[1] or train.columns != test.columns:
        raise DataError(
            "test rows have other columns than training rows",
            where=test.path,
            found=test.columns or f"{test.values.shape[1]} columns",
            expected=train.columns or f"{train.values.shape[1]} columns",
        )


def _count_categories(
    tables: list[Table], is_integer: np.ndarray, num_categories: int | None
) -> tuple[int | None, ...]:
    """Values of every column: given or found, None for real columns."""
    values = np.concatenate([table.values for table in tables])
    counts: list[int | None] = []
    for column, integer in enumerate(is_integer):
        present = values[:, column][~np.isnan(values[:, column])]
        names = tables[0].columns
        where = f"{tables[0].path}, column {names[column] if names else column}"
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
