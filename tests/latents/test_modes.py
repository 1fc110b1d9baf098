"""Mini-batches, balanced clusters, a codebook a position, projected features, empty shards."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.config.schema import LatentsConfig
from distpc.latents.balance import apply_splits, plan_splits, small_clusters
from distpc.latents.fit import principal_directions
from distpc.latents.holder import Draw, FeatureHolder, View
from distpc.latents.state import FitState

from .jobs import BLOBS, blob_shards, local_holders, local_job, write_features


def inertia_of(points: np.ndarray, centroids: torch.Tensor) -> float:
    squares = np.square(points[:, None] - centroids.numpy()[None].astype(np.float64)).sum(-1)
    return squares.min(1).sum()


def entropy(shares: np.ndarray) -> float:
    """Usage entropy over its largest value."""
    part = shares / shares.sum()
    return -(part * np.log(part)).sum() / np.log(len(part))


def test_mini_batches_come_near_to_all_points(tmp_path):
    rng = np.random.default_rng(0)
    shards = [rng.normal(size=(rows, 4)) for rows in (2000, 1000, 3000)]
    names = write_features(tmp_path, shards)
    common = {"num_clusters": 24, "num_rounds": 30, "tolerance": 0.0}
    whole = local_job(tmp_path, names, LatentsConfig(**common))[0].run(FitState())
    config = LatentsConfig(**common, algorithm="mini_batch", batch_points=600)
    job, _ = local_job(tmp_path, names, config)
    state = job.run(FitState())
    assert len(state.inertia[0]) == 31
    points = np.concatenate(shards).astype(np.float16).astype(np.float64)
    # The last figure is of all points; those before are estimates of it.
    assert state.inertia[0][-1] == pytest.approx(inertia_of(points, state.best), rel=1e-4)
    assert state.inertia[0][-2] == pytest.approx(state.inertia[0][-1], rel=0.2)
    assert whole.inertia[0][-1] * 0.99 < state.inertia[0][-1] < whole.inertia[0][-1] * 1.06
    assert state.inertia[0][-1] < state.inertia[0][0]
    for groups in (1, 3):
        other = local_job(tmp_path, names, config, num_groups=groups)[0].run(FitState())
        assert torch.equal(other.best, state.best)


def test_a_mini_batch_centroid_is_the_mean_of_all_it_was_given(tmp_path):
    names = write_features(tmp_path, [np.array([[-2.0], [-1.0], [5.0], [9.0]])])
    config = LatentsConfig(
        num_clusters=2, num_rounds=3, algorithm="mini_batch", batch_points=2, init="random"
    )
    states = []
    job, _ = local_job(tmp_path, names, config, keep=lambda state: states.append(state.seen))
    job.run(FitState())
    assert [int(seen.sum()) for seen in states[:3]] == [2, 4, 6]
    assert states[3] is None


def test_a_killed_mini_batch_or_balanced_fit_goes_on(tmp_path):
    rng = np.random.default_rng(5)
    names = write_features(tmp_path, [rng.normal(size=(300, 4)) for _ in range(3)])
    for mode in ({"algorithm": "mini_batch", "batch_points": 100}, {"balanced": True}):
        config = LatentsConfig(num_clusters=9, num_rounds=6, num_restarts=2, **mode)
        whole = local_job(tmp_path, names, config)[0].run(FitState())
        path = tmp_path / "state.safetensors"
        path.unlink(missing_ok=True)

        def keep(state, path=path):
            state.save(path, "fp")
            if sum(map(len, state.inertia)) in (4, 9):
                raise KeyboardInterrupt

        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                local_job(tmp_path, names, config, keep=keep)[0].run(FitState.load(path, "fp"))
        state = local_job(tmp_path, names, config)[0].run(FitState.load(path, "fp"))
        assert torch.equal(state.best, whole.best)
        assert state.inertia == whole.inertia


def test_balanced_clusters_are_about_equally_large(tmp_path):
    rng = np.random.default_rng(0)
    # Most points in one place: k-means alone gives the few others most of the clusters.
    points = np.concatenate([rng.normal(size=(3600, 3)) * 0.3, rng.normal(size=(400, 3)) * 4])
    names = write_features(tmp_path, np.array_split(rng.permutation(points), 2))
    shares = {}
    for balanced in (False, True):
        config = LatentsConfig(num_clusters=16, num_rounds=40, tolerance=0, balanced=balanced)
        job, _ = local_job(tmp_path, names, config)
        state = job.run(FitState())
        counts = job.measure(state.best, job.views).counts
        shares[balanced] = counts * 16 / counts.sum()
    assert shares[False].max() > 2.4
    assert shares[False].min() < 0.15
    assert shares[True].max() < 2.2
    assert shares[True].min() > 0.2
    assert entropy(shares[True]) > entropy(shares[False]) + 0.1


def test_small_clusters_split_the_largest_first():
    counts = np.array([100, 1, 60, 0, 39])
    labels = np.array([2, 0, 4, 0, 0, 2])
    splits = plan_splits(counts, small_clusters(counts), labels)
    assert splits.small.tolist() == [3, 1]
    assert splits.large.tolist() == [0, 2]
    assert splits.drawn.tolist() == [1, 0]
    means = np.arange(10, dtype=np.float32).reshape(5, 2)
    held, moved = apply_splits(splits, np.full((2, 2), 8.0, dtype=np.float32), counts, means)
    np.testing.assert_allclose(moved[3], [1.0, 1.875])
    np.testing.assert_array_equal(moved[[0, 2, 4]], means[[0, 2, 4]])
    assert held.tolist() == [100, 1, 60, 1, 39]
    # Nothing to gain: no cluster has much more than the small ones.
    assert not len(plan_splits(np.array([3, 2, 3, 3]), np.array([1]), labels % 4).small)


def test_each_position_may_have_a_codebook_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 4, 3)) * 10
    # Rows alternate between the two positions of a sample.
    shards = []
    for _ in range(2):
        pairs = centres[[0, 1], rng.integers(4, size=(150, 1))] + rng.normal(size=(150, 2, 3)) * 0.1
        shards.append(pairs.reshape(300, 3))
    names = write_features(tmp_path, shards)
    for position in (0, 1):
        job, _ = local_job(tmp_path, names, LatentsConfig(num_clusters=4), position=position)
        found = job.run(FitState()).best.numpy()
        distances = np.square(found[:, None] - centres[position][None]).sum(-1)
        assert sorted(distances.argmin(1)) == [0, 1, 2, 3]
        assert distances.min(1).max() < 0.05


def test_projected_features_are_clustered(tmp_path):
    rng = np.random.default_rng(0)
    shards, _ = blob_shards()
    # A column of loud noise hides the blobs; whitening makes it one of many.
    noisy = [np.c_[shard, rng.normal(size=(len(shard), 1)) * 300] for shard in shards]
    names = write_features(tmp_path, noisy)
    config = LatentsConfig(num_clusters=BLOBS, projection="whiten")
    raw = local_holders(tmp_path)
    projection = principal_directions(raw, names, config, tmp_path)
    holders = local_holders(
        tmp_path, projection=(projection.mean.numpy(), projection.basis.numpy())
    )
    held = local_holders(tmp_path, in_memory=True)
    rows = np.arange(20)
    for number, name in enumerate(names):
        points = torch.from_numpy(noisy[number]).half()
        taken = holders.ask("take", [(View(name), rows)])[0]
        np.testing.assert_array_equal(taken, projection(points[:20]).float())
        taken = held.ask("take", [(View(name), rows)])[0]
        np.testing.assert_array_equal(taken, points[:20].float())
    facts = holders.each("describe", names)
    covariance = sum(fact.squares for fact in facts) / sum(fact.points for fact in facts)
    assert covariance == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize("projected", [False, True])
def test_what_a_worker_keeps_is_bounded(tmp_path, projected):
    shards, _ = blob_shards()
    names = write_features(tmp_path, shards)
    eye = np.zeros(5, np.float32), np.eye(5, dtype=np.float32)
    options = {"projection": eye} if projected else {"in_memory": True}
    answers = []
    # A shard has 4,000 bytes of features: room for all of them, for one, for none.
    for most_bytes, kept in ((12_000, 3), (7_999, 1), (0, 0)):
        holder = FeatureHolder(str(tmp_path), "f", "cpu", most_bytes=most_bytes, **options)
        answers.append([holder.describe(name) for name in names])
        assert [len(holder.draw(Draw(View(name), 10, (0,)))) for name in names] == [10, 10, 10]
        assert len(holder._kept) == kept
    for facts in zip(*answers, strict=True):
        assert len({fact.squares for fact in facts}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the process's memory maps")
def test_no_file_stays_mapped(tmp_path):
    shards, _ = blob_shards()
    names = write_features(tmp_path, shards)
    config = LatentsConfig(num_clusters=BLOBS)
    local_job(tmp_path, names, config)[0].run(FitState())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("init", ["k-means||", "random"])
def test_an_empty_shard_changes_nothing(tmp_path, init):
    shards, _ = blob_shards()
    empty = np.zeros((0, shards[0].shape[1]))
    config = LatentsConfig(num_clusters=BLOBS, init=init)
    found = []
    for name, parts in (("whole", shards), ("with", [*shards, empty])):
        (tmp_path / name).mkdir()
        names = write_features(tmp_path / name, parts)
        state = local_job(tmp_path / name, names, config)[0].run(FitState())
        found.append(state)
    assert torch.equal(found[0].best, found[1].best)
    assert found[0].inertia == found[1].inertia


@pytest.mark.slow
def test_65536_clusters(tmp_path):
    """One round of as many clusters as there may be; candidates reduced in batches."""
    rng = np.random.default_rng(0)
    shards = [rng.normal(size=(50_000, 4)) for _ in range(2)]
    names = write_features(tmp_path, shards)
    for init in ("random", "k-means++"):
        config = LatentsConfig(num_clusters=65_536, num_rounds=1, init=init)
        job, _ = local_job(tmp_path, names, config)
        state = job.run(FitState())
        assert state.best.shape == (65_536, 4)
        assert state.inertia[0][1] < state.inertia[0][0]
        assert len(torch.unique(state.best, dim=0)) > 0.99 * 65_536
