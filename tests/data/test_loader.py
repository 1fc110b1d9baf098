"""Batches over ranks, resumes, memory and threads, on real shards."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distpc.artifacts.files import file_digest
from distpc.data.codec import SampleCodec
from distpc.data.index import ShardIndex
from distpc.data.loader import Loader, SampleCache
from distpc.data.plan import LoaderState
from distpc.data.reader import iterate_split, read_rows, read_shard
from distpc.errors import DataError

from .conftest import Build
from .test_image_folder import fill

RowsIndex = Callable[[Sequence[int]], ShardIndex]


def loaders(index: ShardIndex, batch: int, ranks: int, state: LoaderState | None) -> list[Loader]:
    return [
        Loader(
            index,
            index.spec,
            "train",
            global_batch=batch,
            mesh_rank=rank,
            num_ranks=ranks,
            seed=3,
            state=state,
            prefetch=0,
        )
        for rank in range(ranks)
    ]


def take(
    index: ShardIndex, batch: int, ranks: int, state: LoaderState | None, total: int
) -> tuple[list[int], LoaderState]:
    """All samples of the ranks' batches in the order of the stream, and the last state."""
    streams = [loader.batches(total) for loader in loaders(index, batch, ranks, state)]
    seen: list[int] = []
    for shares in zip(*streams, strict=True):
        assert sum(len(share.x) for share in shares) == batch == shares[0].global_size
        assert len({share.state for share in shares}) == 1
        state = shares[0].state
        for share in shares:
            seen += share.x[:, 0].tolist()
    assert state is not None
    return seen, state


@pytest.mark.parametrize("ranks", range(1, 6))
def test_every_number_of_ranks_sees_the_same_stream(rows_index: RowsIndex, ranks: int) -> None:
    index = rows_index([10, 10, 7])
    expected, _ = take(index, 9, 1, None, 54)
    found, state = take(index, 9, ranks, None, 54)
    assert found == expected and state == LoaderState(2, 0)
    assert Counter(found) == Counter([*range(27)] * 2)


@pytest.mark.parametrize(
    ("batch", "ranks", "stop", "resumed_batch", "resumed_ranks"),
    [(4, 1, 3, 4, 3), (5, 3, 5, 7, 2), (26, 4, 2, 27, 1), (8, 2, 7, 8, 5)],
)
def test_resume_on_other_ranks(
    rows_index: RowsIndex, batch: int, ranks: int, stop: int, resumed_batch: int, resumed_ranks: int
) -> None:
    index = rows_index([10, 10, 7])
    whole, _ = take(index, 9, 1, None, 108)
    first, state = take(index, batch, ranks, None, stop * batch)
    second, _ = take(index, resumed_batch, resumed_ranks, state, 108)
    assert (first + second)[:108] == whole


def test_shares_of_250_on_3_ranks(build: Build) -> None:
    index = build({"source": {"kind": "digits"}})
    sizes = [len(next(one.batches(250)).x) for one in loaders(index, 250, 3, None)]
    assert sizes == [84, 83, 83]


def test_batches_hold_sklearns_digits(build: Build) -> None:
    index = build({"source": {"kind": "digits"}, "samples_per_shard": 100})
    loader = Loader(index, index.spec, "train", global_batch=479, seed=0)
    batches = list(loader.batches(loader.num_samples))
    assert len(batches) == 3 and loader.state == LoaderState(1, 0)
    x = torch.cat([batch.x for batch in batches])
    assert x.dtype == torch.int64
    keys = [int(k) for entry in index.shards("train") for k in entry.samples().keys]
    expected = load_digits().data[keys].astype(np.int64)
    assert Counter(map(tuple, x.tolist())) == Counter(map(tuple, expected.tolist()))
    assert loader.seconds_waiting > 0


@pytest.mark.parametrize("cache_bytes", [0, 2_000, 20_000, 2**30])
def test_the_cache_bounds_memory_and_changes_nothing(build: Build, cache_bytes: int) -> None:
    index = build({"source": {"kind": "digits"}, "samples_per_shard": 100})
    entries = index.shards("train")
    shards = [read_shard(entry, index.spec).x for entry in entries]
    cache = SampleCache(entries, index.spec, cache_bytes)
    rng = np.random.default_rng(0)
    for _ in range(30):
        numbers = rng.integers(0, len(entries) - 1, 50)
        rows = rng.integers(0, 100, 50)
        found = cache.take(numbers, rows)
        assert np.array_equal(found, [shards[n][r] for n, r in zip(numbers, rows, strict=True)])
        assert cache.used_bytes <= cache_bytes


def test_real_columns_come_as_floats(tmp_path: Path, build: Build) -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    values[::5, 0] = np.nan
    np.save(tmp_path / "t.npy", values)
    index = build({"source": {"kind": "arrays", "path": str(tmp_path / "t.npy")}})
    loader = Loader(index, index.spec, "train", global_batch=32, seed=0)
    (batch,) = loader.batches(32)
    assert batch.x.dtype == torch.float32
    assert torch.isnan(batch.x[:, 0]).any() and not torch.isnan(batch.x[:, 1:]).any()


def test_colour_is_applied_when_read(tmp_path: Path, build: Build) -> None:
    from distpc.data.color import ycocg_r_inverse

    fill(tmp_path / "set", 20)
    data = {"source": {"kind": "image_folder", "path": str(tmp_path / "set")}, "color": "ycocg_r"}
    index = build(data)
    assert index.spec.num_categories[:4] == (256, 512, 512, 256)
    x = np.concatenate(list(iterate_split(index, index.spec, "train", 5)))
    assert x.max() > 256
    rgb = ycocg_r_inverse(x.reshape(-1, 6, 6, 3))
    assert rgb.min() >= 0 and rgb.max() <= 255


def test_more_than_there_is(rows_index: RowsIndex) -> None:
    index = rows_index([10, 10, 7])
    with pytest.raises(DataError, match="fewer samples than one batch") as caught:
        loaders(index, 28, 1, None)
    assert "27 samples" in str(caught.value) and "at least 28" in str(caught.value)
    with pytest.raises(DataError, match="fewer samples than there are ranks"):
        loaders(index, 3, 4, None)
    with pytest.raises(DataError, match="does not fit the split"):
        loaders(index, 4, 1, LoaderState(0, 27))


@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_evaluation_sees_each_sample_once(rows_index: RowsIndex, num_ranks: int) -> None:
    index = rows_index([10, 10, 7])
    streams = [
        list(iterate_split(index, index.spec, "train", 8, rank, num_ranks))
        for rank in range(num_ranks)
    ]
    assert {len(stream) for stream in streams} == {4}
    seen = [int(value) for step in zip(*streams, strict=True) for x in step for value in x[:, 0]]
    assert seen == list(range(27))


def test_reading_ahead_gives_the_same_and_ends_its_thread(rows_index: RowsIndex) -> None:
    index = rows_index([10, 10, 7])
    make = lambda prefetch: Loader(  # noqa: E731
        index, index.spec, "train", global_batch=4, seed=0, prefetch=prefetch
    )
    expected = [batch.x.tolist() for batch in make(0).batches(100)]
    assert [batch.x.tolist() for batch in make(3).batches(100)] == expected
    stream = make(3).batches(100)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "distpc-loader"]


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_value_changed_in_place_is_noticed(rows_index: RowsIndex, cache_bytes: int) -> None:
    index = rows_index([10, 10])
    (entry, other) = index.shards("train")
    offset = int(entry.samples().offsets[3] + entry.samples().sizes[3]) - 2
    content = bytearray(entry.path.read_bytes())
    assert content[offset] == 3
    content[offset] = 7
    entry.path.write_bytes(content)
    loader = Loader(
        index,
        index.spec,
        "train",
        global_batch=20,
        seed=0,
        cache_bytes=cache_bytes,
        prefetch=0,
    )
    with pytest.raises(DataError, match="changed since it was indexed") as caught:
        next(loader.batches(20))
    assert caught.value.where == str(entry.path)
    assert file_digest(entry.path) in (caught.value.found or "")
    assert entry.sha256 in (caught.value.expected or "")
    assert "remove the shards and index" in (caught.value.fix or "")
    assert read_rows(other, SampleCodec(index.spec), np.array([3])).tolist() == [[13]]


def test_shards_are_digested_once(rows_index: RowsIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index = rows_index([10, 10])
    digested = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda *given: digested.append(given) or real(*given)
    )
    for _ in range(3):
        assert len(list(iterate_split(index, index.spec, "train", 3))) == 7
    assert len(digested) == 2
    (entry, _) = index.shards("train")
    status = entry.path.stat()
    os.utime(entry.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    list(iterate_split(index, index.spec, "train", 3))
    assert len(digested) == 3


def test_errors_of_the_reading_thread_reach_the_taker(rows_index: RowsIndex) -> None:
    index = rows_index([10, 10, 7])
    loader = Loader(index, index.spec, "train", global_batch=4, seed=0, cache_bytes=0)
    stream = loader.batches(10_000)
    next(stream)
    for entry in index.shards("train"):
        entry.path.unlink()
    with pytest.raises(DataError, match="changed since it was indexed"):
        list(stream)
