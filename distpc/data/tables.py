"""Tables of numbers in .npy and .csv files, read by the same rules for training and for queries.

A .csv may start with a header line: a first line without any number in it (or with the expected
names). Rows and columns are counted from 0, the header aside. An empty cell, NA or NaN, in capitals
or not, is missing. In a .npy of signed integers, which has no NaN, -1 is missing in categorical
columns.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distpc.data.spec import MISSING
from distpc.errors import DataError, DistpcError

MAX_CATEGORIES = 2**15
"""More values than this in an integer column: it is an amount, not a category."""

MISSING_CELLS = ("", "na", "nan")
_EXPECTED_CELL = "a finite number; an empty cell, NA or NaN where a value is missing"


@dataclass(frozen=True)
class Table:
    """A file's content.

    Attributes:
        path: where it comes from.
        values: (N, V) float64, NaN missing; -1 is not yet.
        columns: names; empty for .npy and for .csv without a header line.
        is_integer: (V,) bool. In a .csv, every present cell is written as an integer (`3`, not
            `3.0`); in a .npy of integers every column is; in a .npy of floats, a column whose
            present values are all whole numbers from 0 to MAX_CATEGORIES - 1, since NaN as missing
            value forces such columns to be stored as floats.
        has_signed_integers: whether -1 stands for missing values in categorical columns.
    """

    path: Path
    values: np.ndarray
    columns: tuple[str, ...]
    is_integer: np.ndarray
    has_signed_integers: bool = False

    def with_missing(self, is_categorical: np.ndarray) -> np.ndarray:
        """(N, V) values, NaN where missing.

        Args:
            is_categorical: (V,) bool.
        """
        if not self.has_signed_integers:
            return self.values
        return np.where((self.values == MISSING) & is_categorical, np.nan, self.values)


def read_table(
    path: Path,
    *,
    names: Sequence[str] = (),
    flatten: bool = False,
    error: type[DistpcError] = DataError,
) -> Table:
    """Read a .npy or .csv file.

    Args:
        path: the file.
        names: of the columns that are expected, if known; a first line of these is a header even
            where they look like numbers.
        flatten: take a .npy of more than two dimensions (images) as rows.
        error: raised where the file is not what it should be.

    Raises:
        DataError, or `error`: naming the row and column of what is wrong.
    """
    if not path.is_file():
        raise error("the data file does not exist", where=path)
    if path.suffix == ".npy":
        table = _read_npy(path, flatten, error)
    elif path.suffix == ".csv":
        table = _read_csv(path, names, error)
    else:
        raise error(
            "unknown kind of table",
            where=path,
            found=path.suffix or "no suffix",
            expected="a .npy or .csv file",
        )
    if not table.values.size:
        rows, columns = table.values.shape
        raise error(
            "a table holds no rows",
            where=path,
            found=f"{rows} rows, {columns} columns" if columns else "an empty file",
            expected="at least one row",
        )
    infinite = np.argwhere(np.isinf(table.values))
    if len(infinite):
        row, column = infinite[0].tolist()
        labels = _labels(table.values.shape[1], table.columns, names)
        raise _bad_cell(error, path, row, labels[column], table.values[row, column])
    return table


def _labels(width: int, columns: Sequence[str], names: Sequence[str]) -> Sequence[object]:
    """What errors call the columns: as the file does, as is expected, or by number."""
    return columns or (names if len(names) == width else range(width))


def _bad_cell(
    error: type[DistpcError], where: object, row: int, label: object, found: object
) -> DistpcError:
    return error(
        f"row {row}, column {label}: a cell is no finite number",
        where=where,
        found=found,
        expected=_EXPECTED_CELL,
        fix="encode categories as integers 0, 1, 2, ...",
    )


def _read_npy(path: Path, flatten: bool, error: type[DistpcError]) -> Table:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as cause:
        raise error(
            "not a readable .npy file: no array of numbers",
            where=path,
            found=str(cause).splitlines()[0] if str(cause) else repr(cause),
        ) from cause
    is_array = isinstance(values, np.ndarray) and values.dtype.kind in "biuf"
    if not is_array or not (values.ndim == 2 or (flatten and values.ndim > 2)):
        shape = getattr(values, "shape", None)
        raise error(
            "a .npy file holds no table of numbers",
            where=path,
            found=f"shape {shape}, {getattr(values, 'dtype', type(values).__name__)}",
            expected="2 dimensions (rows, columns) of booleans, integers or floats",
        )
    table = values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64)
    if values.dtype.kind != "f":
        is_integer = np.ones(table.shape[1], dtype=bool)
        return Table(path, table, (), is_integer, values.dtype.kind == "i")
    with np.errstate(invalid="ignore"):
        whole = np.isnan(table) | (
            (table == np.floor(table)) & (table >= 0) & (table < MAX_CATEGORIES)
        )
    return Table(path, table, (), whole.all(axis=0))


def _read_csv(path: Path, names: Sequence[str], error: type[DistpcError]) -> Table:
    lines: list[tuple[int, list[str]]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle)
            for cells in reader:
                if cells:
                    lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except (OSError, UnicodeDecodeError, csv.Error) as cause:
        raise error("not a readable .csv file", where=path, found=cause) from cause
    columns: tuple[str, ...] = ()
    if lines and _is_header(lines[0][1], names):
        columns = tuple(lines[0][1])
        _check_names(path, columns, error)
    rows = lines[1:] if columns else lines
    width = len(lines[0][1]) if lines else 0
    values = np.empty((len(rows), width))
    is_integer = np.ones(width, dtype=bool)
    for row, (line, cells) in enumerate(rows):
        where = f"{path}, line {line}"
        if len(cells) != width:
            raise error(
                f"row {row} has another number of cells than the first line",
                where=where,
                found=f"{len(cells)} columns",
                expected=f"{width} columns",
            )
        for column, cell in enumerate(cells):
            value = _parse(cell)
            if value is None:
                label = _labels(width, columns, names)[column]
                raise _bad_cell(error, where, row, label, repr(cell[:80]))
            values[row, column] = value
            is_integer[column] &= math.isnan(value) or cell.lstrip("+-").isdecimal()
    return Table(path, values, columns, is_integer)


def _is_header(cells: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a first line holds names. With some numbers in it, it is a row that has a bad cell:
    to take it for a header would lose that row in silence."""
    if names and sorted(cells) == sorted(names):
        return True
    values = [_parse(cell) for cell in cells]
    return None in values and all(value is None or math.isnan(value) for value in values)


def _check_names(path: Path, columns: tuple[str, ...], error: type[DistpcError]) -> None:
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise error(
            "a header line repeats a name",
            where=f"{path}, line 1",
            found=repeated[:5],
            expected="a name of its own for every column",
        )


def _parse(cell: str) -> float | None:
    """A cell's value, NaN if it is missing, None if it is no number."""
    if cell.lower() in MISSING_CELLS:
        return math.nan
    try:
        # Python alone reads 1_000 as a number.
        return None if "_" in cell else float(cell)
    except ValueError:
        return None
