"""First centroids: random numbers, races and k-means++."""

from __future__ import annotations

import numpy as np
import torch

from distpc.latents.seeding import (
    draw_points,
    generator,
    plus_plus,
    quotas,
    race,
    winners,
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
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    candidates = torch.tensor([[0.0]])
    wins = np.zeros(4)
    for seed in range(3000):
        times, rows = race(points, candidates, 1, generator(seed))
        assert len(times) == 1
        wins[int(rows[0, 0])] += 1
    assert wins[0] == 0
    np.testing.assert_allclose(wins[1:] / 3000, np.array([1, 4, 9]) / 14, atol=0.03)


def test_points_on_candidates_do_not_run():
    times, rows = race(torch.ones(5, 2), torch.ones(1, 2), 3, generator(0))
    assert len(times) == len(rows) == 0


def test_winners_are_the_fastest_of_all_shards():
    entries = [
        (np.array([0.5, 0.9]), np.array([[5.0], [9.0]])),
        (np.array([0.1]), np.array([[1.0]])),
    ]
    assert winners(entries, 2).ravel().tolist() == [1.0, 5.0]


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
