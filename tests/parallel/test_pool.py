"""Pools on a real cluster of several nodes: workers join and leave with them, and may die."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distpc.config.schema import ParallelConfig
from distpc.errors import DataError, DistpcError, ResourceError
from distpc.parallel.cluster import Cluster
from distpc.parallel.items import ItemQueue
from distpc.parallel.pool import Lost

ADDER = "parallel_targets:Adder"
KWARGS: dict[str, Any] = {"base": torch.ones(10)}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of one node with one CPU; more can be added."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:
        made = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()


def test_workers_join_and_leave_with_machines(nodes: Any, tmp_path: Path) -> None:
    parallel = ParallelConfig(num_workers=1, max_workers=3)
    items = [{"value": value, "seconds": 0.05, "log": str(tmp_path)} for value in range(500)]
    pids: dict[int, int] = {}
    added: Any = None
    with Cluster.connect(parallel) as cluster, cluster.pool(ADDER, KWARGS, ahead=1) as pool:
        for index, (value, pid) in pool.map(items, method="slow", release=True):
            assert value == 10.0 + index
            pids[index] = pid
            if added is None:
                assert pool.num_workers == 1
                added = nodes.add_node(num_cpus=1, wait=True)
            elif len(set(pids.values())) == 1:
                # Starting a worker takes as long as it takes: items are not to run out meanwhile.
                time.sleep(1.0)
            elif added and list(pids.values()).count(pid) == 3:
                assert pool.most_workers == 2
                nodes.remove_node(added, allow_graceful=False)
                added = False
        assert pool.num_workers == 0
        assert pool.most_workers == 2
        assert pool.ready_seconds is not None and pool.ready_seconds > 0
    assert added is False
    assert sorted(pids) == list(range(500))
    # The worker of the machine that left had a few items, the one that stayed the rest.
    last = list(pids.values())[-100:]
    assert len(set(last)) == 1 and len(set(pids.values())) == 2
    # Nothing that was finished was computed again: only what the lost machine held.
    runs = [int(path.name.split("-")[0]) for path in tmp_path.iterdir()]
    assert 500 <= len(runs) <= 502


def test_a_worker_has_the_next_item_while_it_works(nodes: Any) -> None:
    items = [{"value": v, "seconds": 0.2} for v in range(6)]

    def most_at_a_time(found: dict[int, Any]) -> int:
        spans = [times for _, times in found.values()]
        return max(sum(a <= start < b for a, b in spans) for start, _ in spans)

    with (
        Cluster.connect(ParallelConfig(num_workers=1)) as cluster,
        cluster.pool(ADDER, KWARGS, ahead=1) as pool,
    ):
        assert most_at_a_time(dict(pool.map(items, method="timed"))) == 2
        # The same pool, one at a time where that is asked for.
        assert most_at_a_time(dict(pool.map(items, method="timed", ahead=0))) == 1


def test_the_item_that_kills_is_told_from_the_one_beside_it(nodes: Any) -> None:
    items: list[dict[str, Any]] = [{"value": value} for value in range(6)]
    items[2]["error"] = "death"
    with (
        Cluster.connect(ParallelConfig(num_workers=1)) as cluster,
        cluster.pool(ADDER, KWARGS, ahead=1) as pool,
    ):
        found = dict(pool.map(items, retries=1, lost="yield"))
    assert isinstance(found[2], Lost) and found[2].deaths == 2 and found[2].cause
    assert {i: v for i, v in found.items() if i != 2} == {i: 10.0 + i for i in (0, 1, 3, 4, 5)}


def test_a_call_that_ended_early_leaves_its_workers_free(nodes: Any) -> None:
    """Or a later call would wait for ever, for workers that seem to have work."""
    bad: list[dict[str, Any]] = [{"value": 0, "error": "own"}, *({"value": v} for v in range(5))]
    found: list[tuple[int, float]] = []
    with (
        Cluster.connect(ParallelConfig(num_workers=1)) as cluster,
        cluster.pool(ADDER, KWARGS, ahead=1) as pool,
    ):
        with pytest.raises(DataError, match="a shard is cut"):
            list(pool.map(bad))
        with pytest.raises(DistpcError, match="cannot travel"):
            list(pool.map([{}], method="lock"))
        for _ in pool.map([{"value": v} for v in range(9)]):
            break

        def go_on() -> None:
            # One item at a time: a single one that is left over keeps the worker from it.
            found.extend(pool.map([{"value": v} for v in range(3)], ahead=0))

        later = threading.Thread(target=go_on, daemon=True)
        later.start()
        later.join(60)
        assert not later.is_alive()
    assert sorted(found) == [(v, 10.0 + v) for v in range(3)]


def test_a_cluster_that_lost_all_its_room_is_an_error_with_both_numbers(nodes: Any) -> None:
    parallel = ParallelConfig(num_workers=1, cpus_per_worker=2, join_seconds=3)
    with pytest.raises(ResourceError, match="no room for 1 workers"):
        Cluster.connect(parallel)
    large = nodes.add_node(num_cpus=2, wait=True)
    with Cluster.connect(parallel) as cluster:
        threading.Timer(4.0, lambda: nodes.remove_node(large, allow_graceful=False)).start()
        with pytest.raises(ResourceError, match="the cluster shrank") as caught:
            list(cluster.map(ADDER, KWARGS, [{"value": 0, "seconds": 60}], method="slow"))
    assert caught.value.found == "1 CPUs and 0 GPUs on 1 machine(s)"
    assert str(caught.value.expected).startswith("2 CPUs")


def test_suspects_are_given_out_by_themselves() -> None:
    queue = ItemQueue(4, {})
    assert [queue.next_for(0), queue.next_for(0, [0])] == [0, 1]
    queue.put_back(0)
    queue.put_back(1)
    assert len(queue) == 4
    # A worker with an item waits for its end; one without is given a suspect, and nothing else.
    assert queue.next_for(1, [3]) is None
    assert queue.next_for(0) == 0
    assert queue.next_for(0, [0]) is None
    assert [queue.next_for(1), queue.next_for(1, [1])] == [1, None]
    assert [queue.next_for(1), queue.next_for(1, [2])] == [2, 3]
