"""Rows of values in files: .npy and .csv, read as float64 with NaN for what is missing."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from distpc.artifacts.files import atomic_path, write_bytes
from distpc.data.spec import DatasetSpec
from distpc.data.tables import Table, read_table
from distpc.errors import EvidenceError


def read_rows(path: Path, spec: DatasetSpec) -> np.ndarray:
    """Rows of `path`, with columns in the model's order.

    Which cells and lines mean what: `distpc.data.tables`, as for training data. Where the model's
    columns have names and the file has a header, the names decide the order. Images may keep their
    shape: (B, height, width, channels) is taken as (B, V).

    Returns:
        (B, V') float64, NaN where missing; the width is checked by `check_values`.

    Raises:
        EvidenceError: no such file, another kind of file, or a cell that is no number.
    """
    table = read_table(Path(path), names=spec.columns, flatten=True, error=EvidenceError)
    if table.columns and spec.columns:
        return table.values[:, _order(table, spec)]
    categorical = np.array([count is not None for count in spec.num_categories])
    fits = table.values.shape[1] == spec.num_variables
    return table.with_missing(categorical) if fits else table.values


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
    # Not into the file itself: numpy then hides from us that the disk is full.
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_bytes(path, content.getvalue())


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


def _order(table: Table, spec: DatasetSpec) -> list[int]:
    """For each of the model's columns, where the file has it."""
    if sorted(table.columns) != sorted(spec.columns):
        absent = [name for name in spec.columns if name not in table.columns]
        unknown = [name for name in table.columns if name not in spec.columns]
        raise EvidenceError(
            "the header does not name the model's columns",
            where=table.path,
            found=f"unknown: {unknown[:5]}, absent: {absent[:5]}",
            expected=f"each of {list(spec.columns)[:20]} once",
        )
    return [table.columns.index(name) for name in spec.columns]
