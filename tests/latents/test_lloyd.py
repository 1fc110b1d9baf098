"""Whole clusterings without Ray: blobs, restarts, stopping, going on after a kill."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents.fit import check_distinct
from distpc.latents.holder import View
from distpc.latents.state import FitState

from .jobs import BLOBS, WIDTH, blob_shards, local_job, write_features


@pytest.mark.parametrize("init", ["k-means||", "k-means++"])
def test_blobs_are_found(tmp_path, init):
    shards, centres = blob_shards()
    names = write_features(tmp_path, shards)
    config = LatentsConfig(num_clusters=BLOBS, init=init)
    job, facts = local_job(tmp_path, names, config)
    state = job.run(FitState())
    distances = np.square(state.best.numpy()[:, None] - centres[None]).sum(-1)
    assert sorted(distances.argmin(1)) == list(range(BLOBS))
    assert distances.min(1).max() < 0.05
    assert state.inertia[0][-1] / 1200 == pytest.approx(0.04 * WIDTH, rel=0.1)
    assert sum(fact.samples for fact in facts) == 600
    points = np.concatenate(shards).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(sum(fact.sums for fact in facts), points.sum(0))
    assert sum(fact.squares for fact in facts) == pytest.approx(np.square(points).sum())


def test_inertia_falls_and_the_best_restart_is_kept(tmp_path):
    rng = np.random.default_rng(2)
    names = write_features(tmp_path, [rng.normal(size=(500, 3)) for _ in range(2)])
    config = LatentsConfig(num_clusters=20, num_restarts=3, num_rounds=12, tolerance=0)
    rounds = []
    job, _ = local_job(tmp_path, names, config, log=lambda *facts: rounds.append(facts))
    state = job.run(FitState())
    assert [len(history) for history in state.inertia] == [13, 13, 13]
    for history in state.inertia:
        assert all(b <= a for a, b in itertools.pairwise(history))
    finals = [history[-1] for history in state.inertia]
    assert len(set(finals)) == 3
    assert state.best_restart == int(np.argmin(finals))
    assert rounds == [(r, i, v) for r in range(3) for i, v in enumerate(state.inertia[r])]
    total = job.measure(state.best, job.views)
    assert total.inertia == min(finals)


def test_tolerance_ends_a_restart(tmp_path):
    shards, _ = blob_shards()
    names = write_features(tmp_path, shards)
    config = LatentsConfig(num_clusters=BLOBS, num_rounds=30, tolerance=1e-3)
    state = local_job(tmp_path, names, config)[0].run(FitState())
    assert len(state.inertia[0]) < 10


def test_a_killed_fit_ends_in_the_same_centroids(tmp_path):
    rng = np.random.default_rng(5)
    names = write_features(tmp_path, [rng.normal(size=(300, 4)) for _ in range(3)])
    config = LatentsConfig(num_clusters=16, num_restarts=2, num_rounds=6, tolerance=0)
    whole = local_job(tmp_path, names, config)[0].run(FitState())
    path = tmp_path / "checkpoint.safetensors"

    class Killed(Exception):
        pass

    attempts = 0
    while True:
        attempts += 1
        seen = 0

        def keep(state):
            nonlocal seen
            state.save(path, "fp")
            seen += 1
            if seen == 3:
                raise Killed

        try:
            job, _ = local_job(tmp_path, names, config, keep=keep)
            state = job.run(FitState.load(path, "fp"))
            break
        except Killed:
            continue
    assert attempts == 5
    assert torch.equal(state.best, whole.best)
    assert state.inertia == whole.inertia
    assert state.refilled == whole.refilled
    assert FitState.load(path, "another fingerprint").inertia == []


def test_duplicates_leave_no_cluster_empty(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(12, 2)) * 5
    # One value holds nearly all points: seeding alone would miss the rare ones at times.
    shards = [values[np.r_[np.zeros(4000, dtype=int), np.arange(12)]] for _ in range(2)]
    names = write_features(tmp_path, shards)
    for init in ("k-means||", "k-means++"):
        config = LatentsConfig(num_clusters=12, init=init)
        job, _ = local_job(tmp_path, names, config)
        check_distinct(job.holders, job.views, 12, tmp_path)
        state = job.run(FitState())
        assert state.inertia[0][-1] == pytest.approx(0, abs=1e-5)
        assert len(torch.unique(state.best, dim=0)) == 12


def test_fewer_different_points_than_clusters_are_refused(tmp_path):
    names = write_features(tmp_path, [np.eye(4)[[0, 1, 0, 1]], np.eye(4)[[1, 2, 2, 2]]])
    job, _ = local_job(tmp_path, names, LatentsConfig(num_clusters=4))
    with pytest.raises(LatentError, match="fewer different features than clusters") as caught:
        check_distinct(job.holders, job.views, 4, tmp_path)
    assert caught.value.found == "3 different feature vectors"
    check_distinct(job.holders, job.views, 3, tmp_path)
    with pytest.raises(LatentError, match="fewer different features than clusters"):
        check_distinct(job.holders, [View(name, 1) for name in names], 3, tmp_path)


def test_features_that_are_not_finite_are_refused(tmp_path):
    points = np.ones((4, 3))
    points[2, 1] = np.nan
    names = write_features(tmp_path, [np.ones((4, 3)), points])
    with pytest.raises(LatentError, match="not finite") as caught:
        local_job(tmp_path, names, LatentsConfig(num_clusters=2))
    assert names[1] in caught.value.where
    assert caught.value.found == "1 samples: '1_00001'"


def test_groups_change_nothing(tmp_path):
    rng = np.random.default_rng(7)
    # One far outlier and few points: clusters run empty and are refilled on the way.
    shards = [rng.normal(size=(rows, 3)) for rows in (40, 300, 2, 120, 90)]
    shards[2][1] = 60.0
    names = write_features(tmp_path, shards)
    config = LatentsConfig(num_clusters=24, num_rounds=8, tolerance=0)
    states = [
        local_job(tmp_path, names, config, num_groups=groups)[0].run(FitState())
        for groups in (1, 2, 3, 5)
    ]
    for other in states[1:]:
        assert torch.equal(other.best, states[0].best)
        assert other.inertia == states[0].inertia


def test_random_start_without_rounds_is_points_of_the_data(tmp_path):
    rng = np.random.default_rng(3)
    shards = [rng.normal(size=(200, 3)) for _ in range(2)]
    names = write_features(tmp_path, shards)
    config = LatentsConfig(num_clusters=16, init="random", num_rounds=0)
    job, _ = local_job(tmp_path, names, config)
    state = job.run(FitState())
    assert len(state.inertia[0]) == 1
    points = np.concatenate(shards).astype(np.float16).astype(np.float32)
    found = state.best.numpy()
    assert len(np.unique(found, axis=0)) == 16
    assert (np.square(found[:, None] - points[None]).sum(-1).min(1) == 0).all()
    again = local_job(tmp_path, names, config, seed=1)[0].run(FitState())
    assert not torch.equal(again.best, state.best)
