"""Sources of numbers and text: files that are right, and files that are not."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from distpc.config.sources import ArraysSource, DigitsSource, IdxSource, TextSource
from distpc.data.sources import Source, open_source
from distpc.data.spec import MISSING
from distpc.errors import DataError


def everything(source: Source) -> np.ndarray:
    return np.stack([source.read(position) for position in range(source.num_samples)])


def idx_bytes(images: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, images.ndim]) + struct.pack(f">{images.ndim}I", *images.shape)
    return header + images.tobytes()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 6), dtype=np.uint8)


def arrays(path: Path, tmp_path: Path, **more: Any) -> Source:
    return open_source(ArraysSource(kind="arrays", path=str(path), **more), tmp_path)


def text(path: Path, length: int = 8) -> Source:
    return open_source(TextSource(kind="text", path=str(path), chunk_length_bytes=length), path)


def test_digits_are_sklearns(tmp_path: Path) -> None:
    source = open_source(DigitsSource(kind="digits"), tmp_path)
    assert np.array_equal(everything(source), load_digits().data)
    assert source.spec.image_shape == (8, 8, 1)
    assert set(source.spec.num_categories) == {17}


@pytest.mark.parametrize("packed", [False, True])
def test_idx_with_published_test_images(tmp_path: Path, packed: bool) -> None:
    write = gzip.compress if packed else bytes
    (tmp_path / "train").write_bytes(write(idx_bytes(images(7))))
    (tmp_path / "test").write_bytes(write(idx_bytes(images(3, seed=1))))
    config = IdxSource(
        kind="idx", train_images=str(tmp_path / "train"), test_images=str(tmp_path / "test")
    )
    source = open_source(config, tmp_path)
    expected = np.concatenate([images(7), images(3, seed=1)]).reshape(10, 24)
    assert np.array_equal(everything(source), expected)
    assert (source.num_samples, source.num_published_test) == (10, 3)
    assert source.spec.image_shape == (4, 6, 1)


def test_idx_files_that_lie(tmp_path: Path) -> None:
    whole = idx_bytes(images(7))
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + b"abc"
    promise = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2**31)
    cases = {
        "cut": whole[:-5],
        "surplus": whole + b"x",
        "labels": labels,
        "empty": b"",
        "half a header": whole[:9],
        "no images": idx_bytes(images(0)),
        "promises the world": promise,
        "cut gzip": gzip.compress(whole)[:-12],
        "text": b"hello, this is no IDX file",
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            open_source(IdxSource(kind="idx", train_images=str(path)), tmp_path)
        assert name in str(caught.value)
    with pytest.raises(DataError, match="does not exist"):
        open_source(IdxSource(kind="idx", train_images=str(tmp_path / "none")), tmp_path)


def test_csv_with_missing_cells_and_mixed_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("kind,size,flag\n0,1.5,1\n2,,0\n,2,nan\n1,-3e2,1\n")
    source = arrays(path, tmp_path)
    assert source.spec.columns == ("kind", "size", "flag")
    assert source.spec.num_categories == (3, None, 2)
    assert source.spec.has_missing
    nan = np.nan
    expected = [[0, 1.5, 1], [2, nan, 0], [nan, 2, nan], [1, -300, 1]]
    assert np.array_equal(everything(source), expected, equal_nan=True)
    assert everything(source).dtype == np.float32


def test_csv_of_integers_only(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n0,1\n,3\n1,0\n")
    source = arrays(path, tmp_path, num_categories=5)
    assert source.spec.num_categories == (5, 5)
    assert everything(source).tolist() == [[0, 1], [MISSING, 3], [1, 0]]


def test_npy_of_integers_and_of_floats(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.array([[0, 1], [MISSING, 3]]))
    source = arrays(path, tmp_path)
    assert source.spec.num_categories == (2, 4)
    assert everything(source).tolist() == [[0, 1], [MISSING, 3]]
    np.save(path, np.array([[0, 0.5], [np.nan, 3.0], [4, -1]], dtype=np.float32))
    source = arrays(path, tmp_path)
    assert source.spec.num_categories == (5, None)
    np.save(path, np.array([[True, False]]))
    assert arrays(path, tmp_path).spec.num_categories == (2, 2)


def test_published_test_rows_share_columns_and_categories(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n0,1\n1,1\n")
    (tmp_path / "b.csv").write_text("a,b\n4,1\n")
    source = arrays(tmp_path / "a.csv", tmp_path, test_path=str(tmp_path / "b.csv"))
    assert source.spec.num_categories == (5, 2)
    assert source.num_published_test == 1
    (tmp_path / "b.csv").write_text("a,c\n4,1\n")
    with pytest.raises(DataError, match="other columns"):
        arrays(tmp_path / "a.csv", tmp_path, test_path=str(tmp_path / "b.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("a,b\n", "no rows"),
        ("a,b\n1\n", "number of cells"),
        ("a,b\n1,red\n", "no finite number"),
        ("a,b\n1,-2\n", "no categories"),
        ("a,b\n1,99999\n", "no categories"),
        ("a,b\n1,inf\n", "no finite number"),
        ("a,b\n1,\n2,\n", "no value at all"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        arrays(path, tmp_path)
    assert "t.csv" in str(caught.value)


def test_value_above_the_given_categories(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a\n0\n7\n")
    with pytest.raises(DataError, match=r"0 \.\. 4"):
        arrays(tmp_path / "t.csv", tmp_path, num_categories=5)


def test_pickles_and_other_npy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    touched = tmp_path / "touched"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (touched,))

    np.save(path, np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable"):
        arrays(path, tmp_path)
    assert not touched.exists()
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="no table"):
        arrays(path, tmp_path)
    path.write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match="not a readable"):
        arrays(path, tmp_path)


def test_text_is_cut_by_document_and_padded(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "sub" / "b.txt").write_text("grüße")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.md").write_text("not text for us")
    source = text(tmp_path, 8)
    rows = everything(source)
    assert rows[:2].tolist() == [list(b"01234567"), [*b"89", *[MISSING] * 6]]
    assert bytes(rows[2][rows[2] != MISSING].astype(np.uint8)).decode() == "grüße"
    assert source.groups is not None and source.groups.tolist() == [0, 0, 1]
    assert source.facts()["empty_files"] == ["empty.txt"]
    assert source.spec.has_missing and source.spec.num_categories == (256,) * 8


def test_one_document_is_split_by_chunk(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789abcdef")
    source = text(tmp_path / "a.txt", 4)
    assert source.groups is None and source.num_samples == 4 and not source.spec.has_missing


def test_text_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        text(tmp_path)
    (tmp_path / "latin.txt").write_bytes("grüße".encode("latin1"))
    with pytest.raises(DataError, match="byte 2"):
        text(tmp_path)


def test_the_identity_of_a_table_follows_all_that_is_read(tmp_path: Path) -> None:
    path, test = tmp_path / "t.csv", tmp_path / "test" / "t.csv"
    test.parent.mkdir()
    contents = ["a,b\n0,1\n1,0\n", "a,b\n1,1\n1,0\n", "a,c\n0,1\n1,0\n", "a,b\n0,1.0\n1,0\n"]
    identities = []
    for content in contents:
        path.write_text(content)
        identities.append(arrays(path, tmp_path).identity())
    path.write_text(contents[0])
    for rows in ("0,1\n", "1,1\n"):
        test.write_text("a,b\n" + rows)
        identities.append(arrays(path, tmp_path, test_path=str(test)).identity())
    path.write_text(contents[1])
    identities.append(arrays(path, tmp_path, test_path=str(test)).identity())
    assert len({json.dumps(identity) for identity in identities}) == 7
    path.write_text(contents[1])
    assert arrays(path, tmp_path).identity() == identities[1]
    assert json.loads(json.dumps(identities)) == identities


def test_the_identity_of_idx_files_follows_their_content(tmp_path: Path) -> None:
    paths = [tmp_path / "train" / "images", tmp_path / "test" / "images"]
    identities = []
    for train, test, shape in ((0, 1, (4, 6)), (2, 1, (4, 6)), (0, 3, (4, 6)), (0, 1, (6, 4))):
        for path, seed in zip(paths, (train, test), strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(idx_bytes(images(3, seed).reshape(3, *shape)))
        config = IdxSource(kind="idx", train_images=str(paths[0]), test_images=str(paths[1]))
        identities.append(open_source(config, tmp_path).identity())
    assert len({json.dumps(identity) for identity in identities}) == 4
    assert json.loads(json.dumps(identities)) == identities


def test_the_identity_of_text_follows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one two")
    first = text(path).identity()
    path.write_text("one tow")
    assert text(path).identity() != first
    assert json.loads(json.dumps(first)) == first
