"""A machine of the cluster is lost in the middle of a sum: the clustering goes on without it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.config.schema import LatentsConfig
from distpc.latents.holder import View
from distpc.latents.kmeans import grid_bits
from distpc.latents.lloyd import Lloyd
from distpc.latents.state import FitState

from .jobs import local_job, write_features

# K x D x 8 bytes: above what Ray sends by value, so that sums live on the machines of workers.
CLUSTERS, WIDTH = 512, 32


def serve() -> None:
    """A cluster of a head without CPUs and two machines; each line read loses one of them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    machines = [cluster.add_node(num_cpus=1, wait=False) for _ in range(2)]
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        lost = machines.pop(0)
        os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        cluster.remove_node(lost, allow_graceful=False)
        machines.append(cluster.add_node(num_cpus=1, wait=False))
        print("lost", flush=True)
    cluster.shutdown()


@pytest.mark.slow
def test_sums_on_a_lost_machine_are_made_again(tmp_path, monkeypatch):
    from distpc.artifacts import StageContext
    from distpc.config import RunConfig
    from distpc.latents.fit import holders_of
    from distpc.parallel.cluster import Cluster

    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    names = write_features(tmp_path / "features", [rng.normal(size=(600, WIDTH))] * 4, "f")
    config = LatentsConfig(num_clusters=CLUSTERS, num_rounds=3, tolerance=0.0, init="random")
    alone = local_job(tmp_path / "features", names, config)[0].run(FitState())
    run = RunConfig.model_validate(
        {"name": "lost", "data": {"source": {"kind": "digits"}}, "latents": config.model_dump()}
    )

    class Features:
        path, fingerprint = tmp_path / "features", "f"

    ctx = StageContext(run, tmp_path, {"features": Features()}, "fit", tmp_path / "tb")
    # Ray reads these once a process, so they stay: tests that come after this one need them.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    root = Path(__file__).parents[2]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.latents.test_lost_machine"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    with server:
        monkeypatch.setenv("RAY_ADDRESS", server.stdout.readline().strip())
        rounds_lost = set()

        def lose(held):
            """After two rounds a machine is lost, between the sums of shards and their addition."""
            if len(state.inertia[0]) == 2 and not rounds_lost:
                rounds_lost.add(2)
                print(file=server.stdin, flush=True)
                assert server.stdout.readline().strip() == "lost"
            return held

        with Cluster.connect(run.parallel) as cluster, holders_of(cluster, ctx) as holders:
            facts = holders.each("describe", names)
            sizes = [fact.points for fact in facts]
            bits = grid_bits(sum(sizes), max(fact.largest for fact in facts))
            asked = holders.hold

            def hold(method, items):
                held = asked(method, items)
                return lose(held) if method == "sum_each" else held

            losing = replace(holders, hold=hold)
            state = FitState()
            Lloyd(losing, [View(name) for name in names], sizes, bits, config, 0).run(state)
        server.stdin.close()
    assert rounds_lost
    assert torch.equal(state.best, alone.best)
    assert state.inertia == alone.inertia


if __name__ == "__main__":
    serve()
