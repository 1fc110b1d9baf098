"""Rows of values in files: .npy and .csv, read as float64 with NaN for what is missing."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from distpc.artifacts.files import atomic_path
from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import EvidenceError

_EMPTY = {"", "nan", "NaN", "NA"}


def read_rows(path: Path, spec: DatasetSpec) -> np.ndarray:
    """Rows of `path`, with columns in the model's order.

    A .csv may start with a header; where the model's columns have names, the header's names decide
    the order. An empty cell or NaN is missing; so is -1 in a .npy of whole numbers (categorical
    columns), which has no NaN. Images may keep their shape: (B, height, width, channels) is taken
    as (B, V).

    Returns:
        (B, V') float64; the width is checked by `check_values`.

    Raises:
        EvidenceError: no such file, another kind of file, or a cell that is no number.
    """
    path = Path(path)
    if not path.is_file():
        raise EvidenceError("the data file does not exist", where=path)
    if path.suffix == ".npy":
        return _read_npy(path, spec)
    if path.suffix == ".csv":
        return _read_csv(path, spec)
    raise EvidenceError(
        "the data file is of an unknown kind",
        where=path,
        found=path.suffix or "no suffix",
        expected=".npy or .csv",
    )


def write_csv(path: Path | None, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a header and rows to `path`, whole or not at all; None prints them."""
    if path is None:
        _print_lines(header, rows)
        return
    with (
        atomic_path(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as handle,
    ):
        _write_lines(handle, header, rows)


def write_npy(path: Path, values: np.ndarray) -> None:
    """Write an array to `path`, whole or not at all."""
    with atomic_path(path) as partial, partial.open("wb") as handle:
        np.save(handle, values, allow_pickle=False)


def _print_lines(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    try:
        _write_lines(sys.stdout, header, rows)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_lines(handle: TextIO, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)


def _read_npy(path: Path, spec: DatasetSpec) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise EvidenceError(
            "the data file is not an array of numbers",
            where=path,
            found=str(error).splitlines()[0],
            expected="a .npy of whole or real numbers",
        ) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf" or values.ndim < 2:
        shape = getattr(values, "shape", None)
        raise EvidenceError(
            "the data file does not hold rows of numbers",
            where=path,
            found=f"{getattr(values, 'dtype', type(values).__name__)} of shape {shape}",
            expected="whole or real numbers of shape (rows, columns)",
        )
    rows = values.reshape(len(values), int(np.prod(values.shape[1:]))).astype(np.float64)
    if values.dtype.kind == "i" and rows.shape[1] == spec.num_variables:
        categorical = np.array([count is not None for count in spec.num_categories])
        rows[(rows == MISSING) & categorical] = np.nan
    return rows


def _read_csv(path: Path, spec: DatasetSpec) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            lines = [line for line in csv.reader(handle) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvidenceError("the data file is not CSV text", where=path, found=error) from error
    header = bool(lines) and _is_header(lines[0], spec)
    rows = lines[1:] if header else lines
    width = len(lines[0]) if lines else 0
    values = np.empty((len(rows), width))
    for number, cells in enumerate(rows):
        if len(cells) != width:
            raise EvidenceError(
                f"row {number} has another number of columns than the first line",
                where=path,
                found=f"{len(cells)} columns",
                expected=f"{width} columns",
            )
        for column, cell in enumerate(cells):
            if not _is_number(cell):
                name = lines[0][column] if header else column
                raise EvidenceError(
                    f"row {number}, column {name}: a cell is no number",
                    where=path,
                    found=repr(cell[:40]),
                    expected="a number, or an empty cell for a missing value",
                )
            values[number, column] = np.nan if cell.strip() in _EMPTY else float(cell)
    return values[:, _order(path, lines[0], spec)] if header and spec.columns else values


def _order(path: Path, header: Sequence[str], spec: DatasetSpec) -> list[int]:
    """For each of the model's columns, where the file has it."""
    names = [name.strip() for name in header]
    if sorted(names) != sorted(spec.columns):
        absent = [name for name in spec.columns if name not in names]
        unknown = [name for name in names if name not in spec.columns]
        raise EvidenceError(
            "the header does not name the model's columns",
            where=path,
            found=f"unknown: {unknown[:5]}, absent: {absent[:5]}",
            expected=f"each of {list(spec.columns)[:20]} once",
        )
    return [names.index(name) for name in spec.columns]


def _is_header(cells: Sequence[str], spec: DatasetSpec) -> bool:
    named = bool(spec.columns) and sorted(cell.strip() for cell in cells) == sorted(spec.columns)
    # A first line with some numbers in it is a row, with a bad cell to report, not a header.
    return named or not any(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    if cell.strip() in _EMPTY:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True
