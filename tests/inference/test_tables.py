"""Reading rows: what is missing, header lines, and what is refused with row and column."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError
from distpc.inference.evidence import check_values
from distpc.inference.tables import read_rows

INTEGERS = DatasetSpec("t", "array", 3, (4, 4, 2), columns=("a", "b", "c"))
MIXED = DatasetSpec("t", "array", 3, (4, None, 2), columns=("a", "b", "c"))


def read(tmp_path, content, spec=INTEGERS) -> torch.Tensor:
    if isinstance(content, str):
        path = tmp_path / "rows.csv"
        path.write_text(content)
    else:
        path = tmp_path / "rows.npy"
        np.save(path, content)
    return check_values(read_rows(path, spec), spec, path)


def test_empty_cells_and_nan_are_missing(tmp_path):
    x = read(tmp_path, "1,,0\nnan,3,1\n")
    assert x.dtype == torch.int64
    assert x.tolist() == [[1, -1, 0], [-1, 3, 1]]
    assert read(tmp_path, np.array([[1, np.nan, 0]])).tolist() == [[1, -1, 0]]
    assert read(tmp_path, np.array([[1, -1, 0]])).tolist() == [[1, -1, 0]]


def test_a_header_decides_the_order(tmp_path):
    assert read(tmp_path, "c,a,b\n1,2,3\n").tolist() == [[2, 3, 1]]


def test_real_columns_stay_real(tmp_path):
    x = read(tmp_path, "a,b,c\n1,-1.5,\n", MIXED)
    assert x.dtype == torch.float32
    assert x[0, :2].tolist() == [1, -1.5]
    assert torch.isnan(x[0, 2])
    # -1 is a value like any other in a real column.
    assert read(tmp_path, np.array([[1, -1, 0]]), MIXED)[0, 1] == -1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1,2\n", ["3 values a row"]),
        ("a,b,x\n1,2,0\n", ["unknown: ['x']", "absent: ['c']"]),
        ("1,2,0\n1,9,0\n", ["row 1, column b", "9", "0 .. 3"]),
        ("1,2,0\n1,2.5,0\n", ["row 1, column b", "2.5"]),
        ("1,2,0\n1,-1,0\n", ["row 1, column b", "-1"]),
        ("1,2,0\n1,inf,0\n", ["row 1, column b", "inf"]),
        ("1,2,0\n1,two,0\n", ["row 1, column b", "'two'"]),
        ("1,two,0\n1,2,0\n", ["row 0, column b", "'two'"]),
        ("1,2,0\n1,2\n", ["row 1", "2 columns"]),
        ("", ["no rows"]),
        ("a,b,c\n", ["no rows"]),
        (np.array([[1, 2, 7]]), ["row 0, column c", "7", "0 .. 1"]),
        (np.array([1, 2, 0]), ["shape (3,)", "2 dimensions"]),
        (np.array([["1", "2", "0"]]), ["<U1"]),
    ],
)
def test_bad_rows_are_named(tmp_path, content, words):
    with pytest.raises(EvidenceError) as error:
        read(tmp_path, content)
    for word in words:
        assert word in str(error.value)
    assert "rows." in error.value.where


def test_a_pickle_is_never_loaded(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(EvidenceError, match="array of numbers"):
        read_rows(path, INTEGERS)


def test_a_cut_file_and_an_unknown_kind(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros((50, 3)))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(EvidenceError, match="array of numbers"):
        read_rows(path, INTEGERS)
    (tmp_path / "rows.xls").write_text("1")
    with pytest.raises(EvidenceError, match="csv"):
        read_rows(tmp_path / "rows.xls", INTEGERS)
    with pytest.raises(EvidenceError, match="does not exist"):
        read_rows(tmp_path / "none.csv", INTEGERS)
