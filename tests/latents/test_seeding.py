"""First centroids: random numbers, races and k-means++."""

from __future__ import annotations

import numpy as np
import torch

from distpc.latents import seeding
from distpc.latents.entries import Entries
from distpc.latents.seeding import (
    draw_points,
    generator,
    plus_plus,
    quotas,
    race,
    reduce_candidates,
)


def test_quotas_share_out_everything():
    assert quotas([10, 20, 30], 6) == [1, 2, 3]
    assert sum(quotas([7, 1, 5, 100], 50)) == 50
    assert quotas([4, 4], 100) == [4, 4]
    assert all(q <= n for q, n in zip(quotas([3, 9, 1], 12), [3, 9, 1], strict=True))


def test_draws_depend_on_the_seed_alone():
    points = torch.arange(100.0)[:, None]
    first = draw_points(points, 10, generator(1, 2, 3))
    assert torch.equal(first, draw_points(points, 10, generator(1, 2, 3)))
    assert not torch.equal(first, draw_points(points, 10, generator(1, 2, 4)))
    assert len(torch.unique(first)) == 10


def test_race_is_won_in_proportion_to_squared_distance():
    distances = np.array([0.0, 1.0, 4.0, 9.0], dtype=np.float32)
    wins = np.zeros(4)
    for seed in range(3000):
        times = race(distances, generator(seed))
        assert times[0] == np.inf
        wins[times.argmin()] += 1
    np.testing.assert_allclose(wins[1:] / 3000, np.array([1, 4, 9]) / 14, atol=0.03)


def test_entries_of_shards_are_merged_in_any_order():
    rng = np.random.default_rng(0)
    # Few different keys: shards and rows have to decide.
    parts = [
        Entries.of(shard, rng.integers(4, size=9).astype(float), np.arange(9), 12)
        for shard in range(4)
    ]
    forwards = parts[0] + parts[1] + parts[2] + parts[3]
    backwards = (parts[3] + parts[1]) + (parts[2] + parts[0])
    for name in ("keys", "shards", "rows"):
        np.testing.assert_array_equal(getattr(forwards, name), getattr(backwards, name))
    assert len(forwards.keys) == 12
    together = sorted(
        (key, shard, row)
        for part in parts
        for key, shard, row in zip(part.keys, part.shards, part.rows, strict=True)
    )[:12]
    assert list(zip(forwards.keys, forwards.shards, forwards.rows, strict=True)) == together


def test_plus_plus_finds_one_point_of_every_blob():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 3)) * 50
    points = np.concatenate([centres + rng.normal(size=centres.shape) * 0.1 for _ in range(20)])
    chosen = plus_plus(points, np.ones(len(points)), 12, generator(5)).numpy()
    nearest = np.square(chosen[:, None] - centres[None]).sum(-1).argmin(1)
    assert sorted(nearest) == list(range(12))


def test_plus_plus_never_draws_weightless_points_and_repeats_when_it_must():
    points = np.array([[0.0], [1.0], [7.0]])
    chosen = plus_plus(points, np.array([1, 2, 0]), 3, generator(0)).ravel().tolist()
    assert set(chosen) == {0.0, 1.0}


def test_many_clusters_are_drawn_in_batches(monkeypatch):
    monkeypatch.setattr(seeding, "GREEDY_CLUSTERS", 8)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 3)) * 50
    points = np.concatenate([centres + rng.normal(size=centres.shape) * 0.1 for _ in range(20)])
    # More draws than clusters: one at a time, so that every blob is found.
    chosen = reduce_candidates(points, np.ones(len(points)), 12, generator(5)).numpy()
    nearest = np.square(chosen[:, None] - centres[None]).sum(-1).argmin(1)
    assert sorted(nearest) == list(range(12))
    monkeypatch.setattr(seeding, "BATCHES", 3)
    chosen = reduce_candidates(points, np.ones(len(points)), 100, generator(5)).numpy()
    assert len(np.unique(chosen, axis=0)) == 100
    weights = np.zeros(len(points))
    weights[:5] = 1
    few = reduce_candidates(points, weights, 20, generator(5)).numpy()
    assert len(few) == 20
    assert len(np.unique(few, axis=0)) == 5
