"""Shards, centroids and what is refused when they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distpc.errors import LatentError
from distpc.latents import load_latents
from distpc.latents.store import (
    read_shard,
    shard_path,
    write_shard,
)

KEYS = ["000007", "000012", "é"]


@pytest.fixture
def shard(tmp_path):
    path = shard_path(tmp_path, "train-000000")
    rows = torch.arange(24).reshape(3, 2, 4).half()
    write_shard(path, "features", rows, KEYS, {"fingerprint": "abc", "split": "train"})
    return path


def test_round_trip(shard):
    found = read_shard(shard, "features", fingerprint="abc", keys=KEYS)
    assert found.keys == KEYS
    assert found.rows.dtype == torch.float16
    assert torch.equal(found.rows, torch.arange(24).reshape(3, 2, 4).half())
    assert found.metadata["split"] == "train"
    assert [path.name for path in shard.parent.iterdir()] == ["train-000000.safetensors"]


def test_another_fingerprint_is_refused(shard):
    with pytest.raises(LatentError, match="another run") as caught:
        read_shard(shard, "features", fingerprint="xyz")
    assert "abc" in str(caught.value)
    assert "xyz" in str(caught.value)


@pytest.mark.parametrize("keys", [["000007", "000013", "é"], KEYS[:2], [*KEYS, "more"]])
def test_other_keys_are_refused(shard, keys):
    with pytest.raises(LatentError, match="other samples") as caught:
        read_shard(shard, "features", keys=keys)
    assert "number" in caught.value.found


def test_another_kind_is_refused(shard, tmp_path):
    with pytest.raises(LatentError, match="kind or version"):
        read_shard(shard, "latents")
    save_file({"features": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(LatentError, match="kind or version"):
        read_shard(tmp_path / "other.safetensors", "features")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_cut_files_are_refused(shard, size):
    data = shard.read_bytes()
    shard.write_bytes(data[:size])
    with pytest.raises(LatentError, match="cut or damaged") as caught:
        read_shard(shard, "features")
    assert "train-000000" in caught.value.where


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(LatentError, match="missing"):
        load_latents(tmp_path, "train-000003")


def test_keys_and_rows_must_match(tmp_path):
    with pytest.raises(ValueError):
        write_shard(tmp_path / "x", "latents", torch.zeros(3, 1), ["a"], {})


def test_latents_come_back_under_their_keys(tmp_path):
    rows = torch.tensor([[0, 3], [1, 2], [3, 3]], dtype=torch.int32)
    path = shard_path(tmp_path, "train-000000")
    write_shard(path, "latents", rows, KEYS, {"fingerprint": "f", "num_clusters": 4})
    keys, latents = load_latents(tmp_path, "train-000000")
    assert keys == KEYS
    np.testing.assert_array_equal(latents, rows.numpy())
    latents[0] = 0

    write_shard(path, "latents", rows, KEYS, {"fingerprint": "f", "num_clusters": 3})
    with pytest.raises(LatentError, match="outside the clusters"):
        load_latents(tmp_path, "train-000000")
