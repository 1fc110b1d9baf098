"""A Ray cluster of several nodes on this machine whose parts can be killed and replaced."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import psutil

ACTOR = "ray::_Host"
"""How a worker of distpc's is called among processes."""

_STORE_BYTES = 150 * 2**20


def environment(**more: str) -> dict[str, str]:
    """What every process of the cluster finds in its environment, and what this one needs."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        os.environ.pop(name, None)
    os.environ.update(
        OMP_NUM_THREADS="1",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        **more,
    )
    return dict(os.environ)


class Nodes:
    """A head without CPUs and nodes of one CPU each, as a context manager."""

    def __init__(self, num_nodes: int) -> None:
        # Imported late: Ray reads its environment when it is imported.
        from ray.cluster_utils import Cluster

        self._make: Any = Cluster
        self.num_nodes = num_nodes
        self._cluster: Any = None
        self._folder: Path | None = None
        self._replace_at: list[float] = []

    def __enter__(self) -> Nodes:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return str(self._cluster.address)

    def start(self) -> None:
        """Start all nodes and wait until they answer."""
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        head = {
            "num_cpus": 0,
            "object_store_memory": _STORE_BYTES,
            "temp_dir": str(self._folder),
            "include_dashboard": False,
            "include_log_monitor": False,
            "no_monitor": True,
        }
        self._cluster = self._make(initialize_head=True, head_node_args=head)
        for _ in range(self.num_nodes):
            self._add_node(wait=False)
        self._cluster.wait_for_nodes(timeout=120)

    def stop(self) -> None:
        """Kill every process of the cluster and remove its folder."""
        if self._cluster is not None:
            for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
                self._end(node)
        self._cluster, self._replace_at = None, []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def is_alive(self) -> bool:
        """Whether the head still has its raylet: without it drivers cannot join."""
        return self._cluster is not None and _raylet(self._cluster.head_node) is not None

    def mend(self) -> None:
        """Replace nodes that were killed, each when its time has come."""
        now = time.monotonic()
        due = [moment for moment in self._replace_at if moment <= now]
        self._replace_at = [moment for moment in self._replace_at if moment > now]
        for _ in due:
            self._add_node(wait=False)

    def kill_actor(self, random: Random) -> str | None:
        """Kill one worker process; None when there is none."""
        nodes = self._cluster.worker_nodes
        actors = {p.pid: (t, p) for node in nodes for t, p in _actors(_raylet(node))}
        if not actors:
            return None
        title, victim = actors[random.choice(sorted(actors))]
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            # It went by itself since it was looked at.
            return None
        return f"{title.split()[0]} {victim.pid}"

    def kill_raylet(self, random: Random) -> str | None:
        """Kill one node's raylet, the head's included; a new node comes a few seconds later."""
        head = self._cluster.head_node
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
        victim = random.choice([head, *nodes])
        raylet = _raylet(victim)
        if raylet is None:
            return None
        raylet.kill()
        if victim is head:
            return f"raylet {raylet.pid} of the head"
        self._end(victim)
        self._cluster.worker_nodes.discard(victim)
        self._replace_at.append(time.monotonic() + random.uniform(0, 5))
        return f"raylet {raylet.pid} of a worker node"

    def _add_node(self, wait: bool) -> None:
        self._cluster.add_node(wait=wait, num_cpus=1, object_store_memory=_STORE_BYTES)

    def _end(self, node: Any) -> None:
        """Kill a node's processes and their children: workers outlive a killed raylet a while."""
        raylet = _raylet(node)
        left = raylet.children(recursive=True) if raylet is not None else []
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def _raylet(node: Any) -> psutil.Process | None:
    """The node's raylet if it runs."""
    for info in node.all_processes.get("raylet", []):
        if info.process.poll() is None:
            try:
                return psutil.Process(info.process.pid)
            except psutil.NoSuchProcess:
                continue
    return None


def _actors(raylet: psutil.Process | None) -> list[tuple[str, psutil.Process]]:
    """Titles and processes of a node's workers."""
    try:
        children = raylet.children(recursive=True) if raylet is not None else []
    except psutil.NoSuchProcess:
        return []
    titled = [(_title(process), process) for process in children]
    return [(title, process) for title, process in titled if title.startswith(ACTOR)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
