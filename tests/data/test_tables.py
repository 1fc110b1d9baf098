"""One reader for training tables and queries: headers, missing cells, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distpc.config.sources import ArraysSource
from distpc.data.sources import open_source
from distpc.data.tables import read_table
from distpc.errors import DataError, EvidenceError
from distpc.inference.tables import read_rows


def write(folder: Path, content: str) -> Path:
    (folder / "t.csv").write_text(content)
    return folder / "t.csv"


CONTENTS = {
    "header": "a,b\n0,1.5\n2,-1\n",
    "no header": "0,1.5\n2,-1\n",
    "missing": "a,b\n0,NA\n,1.5\nnan,2\n NaN ,na\n1,3\n",
    "missing in the first row": "NA,1.5\n2,\n1,3\n",
    "nameless index column": ",b\n0,1.5\n1,2.5\n",
    "byte order mark": "\ufeffa,b\r\n1,2.5\r\n0,1\r\n",
    "quoted": '"a","b"\n"1",""\n0,2.5\n',
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_queries_read_what_training_reads(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    source = open_source(ArraysSource(kind="arrays", path=str(path)), tmp_path)
    trained = np.stack([source.read(number) for number in range(source.num_samples)])
    assert source.spec.num_categories[1] is None
    np.testing.assert_array_equal(read_rows(path, source.spec), trained)


def test_a_header_is_optional(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "0,1\n1,3\n"))
    assert table.columns == () and table.values.tolist() == [[0, 1], [1, 3]]
    table = read_table(write(tmp_path, "a,b\n1,3\n"))
    assert table.columns == ("a", "b") and table.values.tolist() == [[1, 3]]


def test_expected_names_may_look_like_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "2020,id\n3,1\n")
    with pytest.raises(DataError, match="row 0, column 1"):
        read_table(path)
    assert read_table(path, names=("id", "2020")).columns == ("2020", "id")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1,2\n1,red\n", ["row 1, column b", "'red'", "line 3"]),
        ("1,2\n1,red\n", ["row 1, column 1", "'red'", "line 2"]),
        ("a,b\n\n1,1_000\n", ["row 0, column b", "line 3"]),
        ("a,b\n1,inf\n", ["row 0, column b", "inf"]),
        ("a,b\n1,2\n1\n", ["row 1", "1 columns", "line 3"]),
        ("a,b,a\n1,2,3\n", ["repeats a name", "['a']"]),
        ("a,b\n", ["no rows", "2 columns"]),
        ("", ["no rows", "empty file"]),
    ],
)
@pytest.mark.parametrize("error", [DataError, EvidenceError])
def test_bad_tables_are_named(
    tmp_path: Path, content: str, words: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        read_table(write(tmp_path, content), error=error)
    for word in [*words, "t.csv"]:
        assert word in str(caught.value)


def test_minus_one_is_missing_in_categorical_columns_of_integers(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.array([[0, -1], [-1, 3]]))
    values = read_table(path).with_missing(np.array([True, False]))
    np.testing.assert_array_equal(values, [[0, -1], [np.nan, 3]])
    np.save(path, np.array([[0.0, -1.0]]))
    assert read_table(path).with_missing(np.array([True, True])).tolist() == [[0, -1]]


def test_images_are_rows_only_where_asked(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((2, 4, 3, 1), dtype=np.uint8))
    assert read_table(tmp_path / "t.npy", flatten=True).values.shape == (2, 12)
    with pytest.raises(DataError, match="no table of numbers"):
        read_table(tmp_path / "t.npy")
