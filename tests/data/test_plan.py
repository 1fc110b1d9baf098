"""The order of samples: nothing lost, nothing twice, whatever the ranks."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from distpc.data.plan import (
    LoaderState,
    SamplePlan,
    evaluation_ranges,
    num_steps,
    rank_share,
    seeded_permutation,
)


def pairs(plan: SamplePlan, start: int, stop: int) -> list[tuple[int, int]]:
    shards, rows = plan.take(start, stop)
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def everything(sizes: list[int]) -> Counter[tuple[int, int]]:
    return Counter((shard, row) for shard, size in enumerate(sizes) for row in range(size))


def test_permutation_is_fixed_for_ever() -> None:
    assert seeded_permutation(10, 7, 3).tolist() == seeded_permutation(10, 7, 3).tolist()
    assert seeded_permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(seeded_permutation(1000, 1).tolist()) == list(range(1000))
    assert seeded_permutation(0, 1).tolist() == []


def test_shares_of_250_on_3_ranks() -> None:
    shares = [rank_share(250, rank, 3) for rank in range(3)]
    assert shares == [(0, 84), (84, 167), (167, 250)]


@pytest.mark.parametrize(
    ("count", "num_ranks"), list(itertools.product([0, 1, 7, 128], [1, 2, 3, 5]))
)
def test_shares_tile_the_batch(count: int, num_ranks: int) -> None:
    shares = [rank_share(count, rank, num_ranks) for rank in range(num_ranks)]
    assert shares[0][0] == 0 and shares[-1][1] == count
    assert all(left[1] == right[0] for left, right in itertools.pairwise(shares))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sizes", [[10, 10, 7], [1], [3, 0, 5, 1], [5] * 40])
def test_each_epoch_holds_every_sample_once(sizes: list[int]) -> None:
    plan = SamplePlan(sizes, seed=1, window_shards=4)
    total = sum(sizes)
    epochs = [pairs(plan, epoch * total, (epoch + 1) * total) for epoch in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == everything(sizes)
    if total > 5:
        assert epochs[0] != epochs[1]
        assert epochs[0] != pairs(SamplePlan(sizes, seed=2, window_shards=4), 0, total)


def test_the_stream_does_not_depend_on_how_it_is_cut() -> None:
    plan = SamplePlan([10, 10, 7, 30, 2], seed=3, window_shards=2)
    whole = pairs(plan, 0, 200)
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, stop = np.sort(rng.integers(0, 201, 2)).tolist()
        assert pairs(plan, start, stop) == whole[start:stop]


def test_windows_mix_shards() -> None:
    plan = SamplePlan([100] * 8, seed=0, window_shards=4)
    first = plan.take(0, 100)[0]
    assert len(set(first.tolist())) == 4


@pytest.mark.parametrize(
    ("ranks", "batch", "resumed_ranks", "resumed_batch"),
    [(1, 4, 3, 4), (3, 5, 2, 7), (5, 9, 1, 2), (2, 26, 4, 27), (4, 8, 4, 8)],
)
def test_stop_and_resume_on_other_ranks_keeps_the_epochs(
    ranks: int, batch: int, resumed_ranks: int, resumed_batch: int
) -> None:
    sizes = [10, 10, 7]
    total = sum(sizes)
    for stop_after in range(1, 12):
        plan = SamplePlan(sizes, seed=5)
        seen: list[tuple[int, int]] = []
        for step in range(stop_after):
            seen += consume(plan, step * batch, batch, ranks)
        state = LoaderState.from_json(plan.state_at(stop_after * batch).to_json())
        resumed = SamplePlan(sizes, seed=5)
        position = resumed.position_of(state)
        assert position == stop_after * batch
        while len(seen) < 6 * total:
            seen += consume(resumed, position, resumed_batch, resumed_ranks)
            position += resumed_batch
        for epoch in range(6):
            assert Counter(seen[epoch * total : (epoch + 1) * total]) == everything(sizes)


def consume(plan: SamplePlan, position: int, batch: int, ranks: int) -> list[tuple[int, int]]:
    """A global batch as the ranks take it, in the order of ranks."""
    taken = []
    for rank in range(ranks):
        start, stop = rank_share(batch, rank, ranks)
        taken += pairs(plan, position + start, position + stop)
    return taken


def test_state_at_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    plan = SamplePlan([10, 10, 7], seed=0)
    assert plan.state_at(27) == LoaderState(1, 0)
    assert plan.state_at(26) == LoaderState(0, 26)


def test_steps_cover_the_samples() -> None:
    assert num_steps(270, 27) == 10
    assert num_steps(271, 27) == 11


@pytest.mark.parametrize("num_ranks", range(1, 6))
@pytest.mark.parametrize("batch_size", [1, 4, 27, 100])
def test_evaluation_sees_each_sample_once_in_equal_steps(num_ranks: int, batch_size: int) -> None:
    ranges = [evaluation_ranges(27, batch_size, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(of_rank) for of_rank in ranges}) == 1
    seen = [i for of_rank in ranges for start, stop in of_rank for i in range(start, stop)]
    assert sorted(seen) == list(range(27))


def test_many_shards_are_planned_quickly() -> None:
    plan = SamplePlan([1024] * 100_000, seed=0)
    shards, rows = plan.take(50_000_000, 50_000_256)
    assert len(shards) == len(rows) == 256
