"""Training ranks on a Ray cluster: each in a process of its own, in a place reserved for all."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distpc.errors import ResourceError

LOST = -1000
"""In place of an exit status: the cluster has lost the machine or the process that kept it."""


class RankHost:
    """Runs in a Ray worker: starts one rank, which dies with it, and waits for its end."""

    def run(self, arguments: list[str], environment: dict[str, str], log: str) -> int:
        """Exit status of a rank whose output is appended to `log`."""
        command = [sys.executable, "-m", "distpc.parallel.rank", *arguments, str(os.getpid())]
        with Path(log).open("ab") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            return process.wait()


class RankHosts:
    """R places on a cluster, all or none, as near to each other as they can be.

    Args:
        ray: the ray module, connected.
        num_ranks: places R.
        num_cpus: CPUs of each; a GPU comes with them where the cluster has any.
        seconds: to wait for the places.

    Raises:
        ResourceError: the cluster has not that much room, or others hold it.
    """

    def __init__(self, ray: Any, num_ranks: int, num_cpus: int, seconds: float) -> None:
        self._ray = ray
        self._hosts: list[Any] = []
        total = ray.cluster_resources()
        num_gpus = 1 if total.get("GPU", 0) > 0 else 0
        place = {"CPU": num_cpus} | ({"GPU": num_gpus} if num_gpus else {})
        self._num_gpus, self._num_cpus = num_gpus, num_cpus
        self._group = ray.util.placement_group([place] * num_ranks, strategy="PACK")
        if not self._group.wait(timeout_seconds=seconds):
            self.close()
            free = ray.available_resources()
            raise ResourceError(
                f"the Ray cluster gave no place to {num_ranks} training ranks",
                where="parallel.num_ranks",
                found=f"{total.get('CPU', 0):g} CPUs, {free.get('CPU', 0):g} of them free; "
                f"{total.get('GPU', 0):g} GPUs, {free.get('GPU', 0):g} of them free",
                expected=f"{num_ranks} x {place} within parallel.join_seconds={seconds:g}",
                fix="lower parallel.num_ranks or parallel.threads_per_rank, wait for other jobs, "
                "or raise parallel.join_seconds",
            )

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> PlacedRank:
        """Start the next rank; `arguments` lack the parent's number."""
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=len(self._hosts)
        )
        host_class = self._ray.remote(RankHost).options(
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
            max_restarts=0,
            scheduling_strategy=strategy,
        )
        host = host_class.remote()
        self._hosts.append(host)
        return PlacedRank(self._ray, host, host.run.remote(arguments, environment, str(log)))

    def close(self) -> None:
        """Give the places back; what still runs there ends."""
        self._ray.util.remove_placement_group(self._group)


class PlacedRank:
    """A rank on the cluster, watched like a process of this machine."""

    def __init__(self, ray: Any, host: Any, outcome: Any) -> None:
        self._ray = ray
        self._host = host
        self._outcome = outcome
        self._code: int | None = None

    def poll(self) -> int | None:
        """Exit status of the rank; None while it runs, LOST when it went with its machine."""
        if self._code is None and self._ray.wait([self._outcome], timeout=0)[0]:
            try:
                self._code = int(self._ray.get(self._outcome))
            except self._ray.exceptions.RayError:
                self._code = LOST
        return self._code

    def end(self) -> None:
        """Kill the rank if it runs."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._host, no_restart=True)
