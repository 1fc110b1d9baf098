"""Workers on a cluster with Ray's autoscaler: machines come for them, and go when they are idle.

The machines are processes of this one (Ray's fake provider); the autoscaler is the real one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distpc.config.schema import ParallelConfig
from distpc.parallel import reaper
from distpc.parallel.cluster import Cluster

pytestmark = pytest.mark.slow

_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


@pytest.fixture
def autoscaled() -> Iterator[None]:
    """A cluster of one CPU that may grow by two machines of one CPU each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "cluster_name": "fake_multinode",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "small": {
                "resources": {"CPU": 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in _COMMANDS},
    }
    folder = Path("/tmp", f"ray-scaled-{os.getpid()}")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    hidden = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    environment |= {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=1"]
    command += [f"--autoscaling-config={folder / 'config.json'}", f"--port={port}"]
    command += [f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"]
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            patch.setenv("RAY_AUTH_MODE", "disabled")
            yield
    finally:
        reaper.sweep(folder)


def test_machines_come_and_go(autoscaled: None) -> None:
    parallel = ParallelConfig(num_workers=1, max_workers=3)
    kwargs: dict[str, Any] = {"base": torch.ones(10)}
    with Cluster.connect(parallel) as cluster:
        import ray

        def machines() -> int:
            return sum(node["Alive"] for node in ray.nodes())

        assert machines() == 1
        items = [{"value": value, "seconds": 0.5} for value in range(120)]
        with cluster.pool("parallel_targets:Adder", kwargs) as pool:
            found = dict(pool.map(items, method="slow", release=True))
            assert {index: value for index, (value, _) in found.items()} == {
                index: 10.0 + index for index in range(120)
            }
            assert pool.most_workers == 3
            assert machines() == 3
        deadline = time.monotonic() + 120
        while machines() > 1 and time.monotonic() < deadline:
            time.sleep(1)
        assert machines() == 1
