"""The index stage refuses what a tar reader would pass over, naming shard and key."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from distpc.artifacts.files import read_json, write_json
from distpc.data.index import ShardIndex, build_index
from distpc.data.reader import iterate_split, read_shard
from distpc.data.spec import DatasetSpec
from distpc.errors import ArtifactError, DataError

from .conftest import Build, run_index, run_shards

SPEC = DatasetSpec("bad", "image", 16, (10,) * 16, image_shape=(4, 4, 1))


def png(value: int = 3, shape: tuple[int, ...] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good shards: 6 train, 2 valid, 2 test."""
    SPEC.save(tmp_path)
    numbers = iter(range(10))
    for split, count in (("train", 6), ("valid", 2), ("test", 2)):
        files = [(f"{next(numbers):06d}.png", png()) for _ in range(count)]
        write_tar(tmp_path / f"{split}-000000.tar", files)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        build_index(folder, folder / "index")
    assert not (folder / "index" / "index.json").exists()
    return str(caught.value)


def test_good_shards_pass(folder: Path) -> None:
    index = build_index(folder, folder / "index")
    assert [index.num_samples(split) for split in ("train", "valid", "test")] == [6, 2, 2]
    assert index.shards("valid")[0].samples().keys == ["000006", "000007"]
    assert index.shards("valid")[0].name == "valid-000000"


def test_truncated_tar(folder: Path) -> None:
    path = folder / "train-000000.tar"
    for length in (len(path.read_bytes()) // 2, 2048, 100, 0):
        path.write_bytes(path.read_bytes()[:length])
        message = refusal(folder)
        assert "cut or broken" in message and "train-000000.tar" in message


def test_half_samples_of_an_unsorted_tar(folder: Path) -> None:
    names = ["100.png", "101.png", "100.txt", "101.txt"]
    write_tar(folder / "train-000000.tar", [(name, png()) for name in names])
    message = refusal(folder)
    assert "half" in message and "100.txt" in message and "train-000000.tar, key 100" in message


def test_keys_with_dots(folder: Path) -> None:
    write_tar(folder / "train-000000.tar", [("img.v1.0.png", png()), ("img.v2.0.png", png())])
    message = refusal(folder)
    assert "dots" in message and "img.v1.0.png" in message


def test_repeated_keys_within_and_across_shards(folder: Path) -> None:
    write_tar(folder / "train-000000.tar", [("000100.png", png()), ("000100.png", png(1))])
    assert "key is repeated" in refusal(folder)
    write_tar(folder / "train-000000.tar", [("000009.png", png())])
    message = refusal(folder)
    assert "key 000009" in message and "train-000000.tar" in message


def test_images_of_another_size_or_mode(folder: Path) -> None:
    for wrong in (png(shape=(4, 5)), png(shape=(4, 4, 3))):
        write_tar(folder / "valid-000000.tar", [("000100.png", png()), ("000101.png", wrong)])
        message = refusal(folder)
        assert "not of the data set's size" in message and "key 000101" in message


def test_values_outside_the_categories(folder: Path) -> None:
    write_tar(folder / "valid-000000.tar", [("000100.png", png(9)), ("000101.png", png(10))])
    message = refusal(folder)
    assert "outside its variable's categories" in message
    assert "key 000101, variable 0" in message and "0 .. 9" in message


def test_undecodable_image(folder: Path) -> None:
    write_tar(folder / "valid-000000.tar", [("000100.png", png()[:-20])])
    assert "cannot be decoded" in refusal(folder)


def test_pickled_rows_are_never_loaded(tmp_path: Path) -> None:
    DatasetSpec("rows", "array", 2, (4, 4)).save(tmp_path)
    buffer = io.BytesIO()
    np.save(buffer, np.array([1, "x"], dtype=object), allow_pickle=True)
    write_tar(tmp_path / "train-000000.tar", [("000000.npy", buffer.getvalue())])
    assert "not of the data set's size" in refusal(tmp_path)


def test_empty_split_and_missing_shard(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-000002.tar")
    assert "a shard is missing" in refusal(folder)
    (folder / "train-000002.tar").unlink()
    write_tar(folder / "test-000000.tar", [])
    message = refusal(folder)
    assert "a shard is empty" in message and "test-000000.tar" in message
    (folder / "test-000000.tar").unlink()
    assert "a split is empty" in refusal(folder)
    (folder / "other.tar").write_bytes(b"")
    assert "unknown name" in refusal(folder)


def test_links_and_escapes(folder: Path) -> None:
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("000100.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    assert "no plain file" in refusal(folder)
    write_tar(path, [("../000100.png", png())])
    assert "leave the target folder" in refusal(folder)
    write_tar(path, [("sub/000100.png", png())])
    assert "slashes" in refusal(folder)


def test_shards_that_change_later_are_noticed(folder: Path) -> None:
    index = build_index(folder, folder / "index")
    (entry,) = index.shards("train")
    content = bytearray(entry.path.read_bytes())
    content[600] ^= 1
    entry.path.write_bytes(content)
    with pytest.raises(DataError, match="changed since it was indexed"):
        read_shard(entry, index.spec)
    with pytest.raises(DataError, match="changed since it was indexed"):
        list(iterate_split(index, index.spec, "train", 4))
    entry.path.write_bytes(content[:-512])
    with pytest.raises(DataError, match="changed since it was indexed"):
        list(iterate_split(index, index.spec, "train", 4))
    entry.path.unlink()
    with pytest.raises(DataError, match="changed since it was indexed"):
        list(iterate_split(index, index.spec, "train", 4))


def test_broken_index_files(folder: Path) -> None:
    index = build_index(folder, folder / "index")
    (folder / "index" / "valid-000000.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ArtifactError, match="sample table"):
        index.shards("valid")[0].samples()
    value = read_json(folder / "index" / "index.json")
    write_json(folder / "index" / "index.json", {**value, "format_version": 99})
    with pytest.raises(ArtifactError, match="format version"):
        ShardIndex.load(folder / "index")
    with pytest.raises(ArtifactError, match="missing"):
        ShardIndex.load(folder)


def test_digits_from_end_to_end(tmp_path: Path, build: Build) -> None:
    index = build({"source": {"kind": "digits"}, "samples_per_shard": 100})
    expected = load_digits().data
    seen = []
    for entry in index.entries:
        shard = read_shard(entry, index.spec)
        numbers = [int(key) for key in shard.keys]
        assert np.array_equal(shard.x, expected[numbers])
        assert shard.x.dtype == np.int16
        seen += numbers
    assert sorted(seen) == list(range(1797))
    # A run folder may be moved as a whole.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("shards", "index"):
        (tmp_path / name).rename(moved / name)
    index = ShardIndex.load(moved / "index")
    assert sum(len(x) for x in iterate_split(index, index.spec, "train", 99)) == 1437


def test_index_is_the_same_bytes_again(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        run_index(run_shards(tmp_path / name, {"source": {"kind": "digits"}}))
        files = sorted((tmp_path / name / "index").iterdir())
        contents.append({file.name: file.read_bytes() for file in files})
    assert contents[0] == contents[1]


def test_real_rows_keep_their_missing_values(tmp_path: Path, build: Build) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    values[::7, 1] = np.nan
    values[:, 2] = np.arange(50) % 4
    np.save(tmp_path / "t.npy", values)
    index = build({"source": {"kind": "arrays", "path": str(tmp_path / "t.npy")}})
    assert index.spec.num_categories == (None, None, 4)
    for entry in index.entries:
        shard = read_shard(entry, index.spec)
        expected = values[[int(key) for key in shard.keys]]
        assert shard.x.dtype == np.float32
        assert np.array_equal(shard.x, expected, equal_nan=True)


def test_a_cut_and_padded_tar_is_noticed(tmp_path: Path) -> None:
    ctx = run_shards(tmp_path, {"source": {"kind": "digits"}, "samples_per_shard": 200})
    path = ctx.out / "train-000001.tar"
    data = path.read_bytes()
    kept = len(data) // 1024 // 2 * 1024
    path.write_bytes(data[:kept] + bytes(len(data) - kept))
    with pytest.raises(DataError) as caught:
        run_index(ctx)
    assert "'train': 1437" in str(caught.value) or "train-000001" in str(caught.value)
