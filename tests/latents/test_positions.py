"""Codebooks of single positions: fitted from copies of some positions, as if from all there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents.holder import Draw, FeatureHolder, ShardFacts, View
from distpc.latents.positions import PositionFitter, blocks, checkpoint, clustering, num_positions
from distpc.latents.questions import Holders
from distpc.latents.state import FitState

from .jobs import local_holders, local_job, write_features
from .stages import Run

CONFIG = LatentsConfig(num_clusters=6, num_rounds=8)


@pytest.fixture
def points(tmp_path):
    """Three shards whose second position has three different features."""
    rng = np.random.default_rng(4)
    shards = [rng.normal(size=(400, 3)) for _ in range(3)]
    for shard in shards:
        shard[1::2] = np.eye(3)[rng.integers(3, size=200)]
    return write_features(tmp_path, shards)


def copied(folder, positions, **options) -> Holders:
    return local_holders(folder, num_groups=1, positions=positions, **options)


@pytest.mark.parametrize("positions", [(0, 2), (1, 2)])
def test_a_position_is_clustered_as_by_workers_that_hold_shards(tmp_path, points, positions):
    job, facts = local_job(tmp_path, points, CONFIG, seed=8, position=1)
    expected = job.run(FitState())
    views = [View(name, 1 - positions[0]) for name in points]
    own = clustering(copied(tmp_path, positions), views, facts, CONFIG, 7, 1)
    found = own.run(FitState())
    assert torch.equal(found.best, expected.best)
    assert found.inertia == expected.inertia
    # Fewer different features than clusters: each has one of its own, the others have none.
    assert found.inertia[0][-1] == 0
    assert len(torch.unique(found.best, dim=0)) == 3


def test_projected_positions_are_what_all_are_projected_to(tmp_path, points):
    rng = np.random.default_rng(0)
    projection = rng.normal(size=3), rng.normal(size=(3, 2))
    for name in points:
        whole, own = (
            FeatureHolder(str(tmp_path), "f", "cpu", projection=projection, positions=positions)
            for positions in (None, (1, 2))
        )
        drawn = whole.draw(Draw(View(name, 1), 50, (1, 2)))
        assert (drawn == own.draw(Draw(View(name, 0), 50, (1, 2)))).all()


def test_blocks_are_bounded_and_shared_out():
    facts = [ShardFacts(1000, np.full(784, 1000), np.zeros(9), 1.0, 1.0) for _ in range(20)]
    for width, workers in ((9, 1), (9, 4), (4000, 2)):
        parts = blocks(facts, width, workers)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == 784
        most = max(stop - start for start, stop in parts)
        assert most == 1 or most * 20_000 * 2 * width <= 2**26
        assert len(parts) >= 8 * workers
    few = [ShardFacts(10, np.full(2, 10), np.zeros(1), 1.0, 1.0)]
    assert blocks(few, 1, 4) == [(0, 1), (1, 2)]


def test_positions_have_features(tmp_path):
    facts = [ShardFacts(5, np.array([5, count]), np.zeros(1), 1.0, 1.0) for count in (0, 2)]
    assert num_positions(facts, tmp_path) == 2
    with pytest.raises(LatentError, match="a position has no features") as caught:
        num_positions(facts[:1], tmp_path)
    assert "position 1" in caught.value.found
    with pytest.raises(LatentError, match="different numbers of positions"):
        num_positions([*facts, ShardFacts(5, np.array([5]), np.zeros(1), 1.0, 1.0)], tmp_path)


def test_finished_positions_are_kept(tmp_path, points):
    run = Run(tmp_path, latents={"num_clusters": 6, "codebook": "per_position"})
    ctx = run.context("fit")
    holder = {"folder": str(tmp_path), "fingerprint": "f", "device": "cpu"}
    facts = [FeatureHolder(**holder).describe(name) for name in points]
    work = ctx.to_json(), holder, facts, points
    PositionFitter(*work)((0, 2))
    files = [checkpoint(ctx.out, position) for position in (0, 1)]
    states = [FitState.load(file, ctx.fingerprint) for file in files]
    files[0].unlink()
    before = files[1].stat().st_mtime_ns
    PositionFitter(*work)((0, 2))
    assert files[1].stat().st_mtime_ns == before
    for file, state in zip(files, states, strict=True):
        assert torch.equal(FitState.load(file, ctx.fingerprint).best, state.best)
    # Those of other settings are not.
    files[1].write_bytes(files[0].read_bytes())
    ctx.fingerprint = "another"
    PositionFitter(ctx.to_json(), *work[1:])((1, 2))
    assert torch.equal(FitState.load(files[1], "another").best, states[1].best)
