"""The shards stage: splits, bytes, resume, refusals."""

from __future__ import annotations

import shutil
import tarfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distpc.artifacts.files import file_digest
from distpc.data.reader import read_shard
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError, DataError, ResourceError

from .conftest import Build, run_shards
from .test_sources import idx_bytes, images

DIGITS: dict[str, Any] = {"source": {"kind": "digits"}, "samples_per_shard": 500}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.glob("shards/*.tar"))}


def test_digits_split_by_seed_and_are_the_same_bytes_again(tmp_path: Path) -> None:
    ctx = run_shards(tmp_path / "a", DIGITS)
    assert ctx.metadata["num_samples"] == {"train": 1437, "valid": 180, "test": 180}
    assert ctx.metadata["bad_samples"] == []
    assert DatasetSpec.load(ctx.out).num_categories == (17,) * 64
    run_shards(tmp_path / "b", DIGITS)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert list(digests(tmp_path / "a")) == [
        "test-000000.tar",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "valid-000000.tar",
    ]
    run_shards(tmp_path / "c", DIGITS, seed=1)
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_splits_do_not_depend_on_the_size_of_shards(tmp_path: Path, build: Build) -> None:
    index = build(DIGITS)
    first = [key for entry in index.shards("test") for key in read_shard(entry, index.spec).keys]
    shutil.rmtree(tmp_path / "shards")
    shutil.rmtree(tmp_path / "index")
    index = build({**DIGITS, "samples_per_shard": 70})
    again = [key for entry in index.shards("test") for key in read_shard(entry, index.spec).keys]
    assert first == again


def test_whole_shards_are_kept_and_cut_ones_never_seen(tmp_path: Path) -> None:
    run_shards(tmp_path, DIGITS)
    expected = digests(tmp_path)
    kept = tmp_path / "shards" / "train-000000.tar"
    (tmp_path / "shards" / "train-000001.tar").unlink()
    (tmp_path / "shards" / "dataset.json").unlink()
    inode, changed = kept.stat().st_ino, kept.stat().st_mtime_ns
    run_shards(tmp_path, DIGITS)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (inode, changed)
    assert digests(tmp_path) == expected


def test_shards_of_changed_source_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "images"
    data = {"source": {"kind": "idx", "train_images": str(path)}, "samples_per_shard": 10}
    path.write_bytes(idx_bytes(images(40)))
    run_shards(tmp_path, data)
    before = digests(tmp_path)
    path.write_bytes(idx_bytes(images(40, seed=1)))
    run_shards(tmp_path, data)
    after = digests(tmp_path)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_members_are_plain_and_anonymous(tmp_path: Path) -> None:
    run_shards(tmp_path, DIGITS)
    with tarfile.open(tmp_path / "shards" / "valid-000000.tar") as archive:
        members = archive.getmembers()
    assert all(member.name.endswith(".png") and member.name.count(".") == 1 for member in members)
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {
        (0, 0, 0, "distpc")
    }


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    run_shards(tmp_path, DIGITS)
    path = tmp_path / "shards" / "valid-000000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
    assert len(samples) == 180
    assert np.asarray(samples[0]["png"]).shape[:2] == (8, 8)


def test_published_test_set_stays_the_test_set(tmp_path: Path, build: Build) -> None:
    for name, count in (("train", 40), ("test", 10)):
        (tmp_path / name).write_bytes(idx_bytes(images(count, seed=count)))
    source = {
        "kind": "idx",
        "train_images": str(tmp_path / "train"),
        "test_images": str(tmp_path / "test"),
    }
    with pytest.raises(ConfigError, match="test set of its own"):
        build({"source": source})
    index = build({"source": source, "split": {"train": 0.9, "valid": 0.1, "test": 0}})
    assert [index.num_samples(split) for split in ("train", "valid", "test")] == [36, 4, 10]
    (entry,) = index.shards("test")
    assert np.array_equal(read_shard(entry, index.spec).x, images(10, seed=10).reshape(10, 24))
    del source["test_images"]
    with pytest.raises(ConfigError, match="no test data"):
        build({"source": source, "split": {"train": 0.9, "valid": 0.1, "test": 0}})


def test_text_is_split_by_document(tmp_path: Path, build: Build) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(20):
        content = f"{number:02d}" * (30 + number)
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(content)
    source = {"kind": "text", "path": str(tmp_path / "texts"), "chunk_length_bytes": 16}
    index = build({"source": source, "samples_per_shard": 16})
    documents: dict[str, set[bytes]] = {}
    for entry in index.entries:
        for row in read_shard(entry, index.spec).x:
            documents.setdefault(entry.split, set()).add(bytes(row[:2].astype(np.uint8)))
    assert {split: len(found) for split, found in documents.items()} == {
        "train": 16,
        "valid": 2,
        "test": 2,
    }
    assert len(set.union(*documents.values())) == 20


@pytest.mark.parametrize("count", [1, 2, 4])
def test_too_few_samples_for_the_splits(tmp_path: Path, count: int) -> None:
    (tmp_path / "images").write_bytes(idx_bytes(images(count)))
    data = {"source": {"kind": "idx", "train_images": str(tmp_path / "images")}}
    with pytest.raises(DataError, match="too few samples"):
        run_shards(tmp_path, data)


def test_color_needs_rgb(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs RGB"):
        run_shards(tmp_path, {**DIGITS, "color": "ycocg_r"})


def test_a_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(ResourceError, match="too small") as caught:
        run_shards(tmp_path, DIGITS)
    assert "100000 bytes free" in str(caught.value)
    assert not list((tmp_path / "shards").glob("*.tar"))
