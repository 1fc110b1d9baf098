import pytest
import torch

from distpc.config.schema import ParallelConfig
from distpc.parallel.cluster import Cluster


def test_connections_of_a_session_share_one_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    parallel = ParallelConfig(num_workers=1, cpus_per_worker=0.5)
    items = [{"value": 1.0, "more": []}]
    with Cluster.session():
        with Cluster.connect(parallel) as first:
            handle = first.put(torch.full((2,), 3.0))
            sums = dict(first.map("parallel_targets:Adder", {"base": torch.zeros(2)}, items))
            started = Cluster._shared
        two = parallel.model_copy(update={"num_workers": 2})
        with Cluster.connect(two) as second:
            assert Cluster._shared is started
            with second.pool("parallel_targets:Adder", {"base": handle}) as pool:
                again = dict(pool.map([*items, *items]))
                # As many as this connection asks for, whatever the first did.
                assert pool.num_workers == 2
    assert again[0] - sums[0] == pytest.approx(6.0)
    assert Cluster._shared is None


def test_a_session_that_nobody_uses_starts_nothing() -> None:
    with Cluster.session():
        assert Cluster._shared is None
