"""Ray: a pool of workers, each with one item at a time, that outlives the death of a worker."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from distpc.config.schema import ParallelConfig
from distpc.errors import ResourceError
from distpc.parallel import reaper
from distpc.parallel.gauges import Gauges, RankGauges
from distpc.parallel.mesh import RANK_VARIABLES
from distpc.parallel.placement import RankHosts
from distpc.parallel.pool import Pool
from distpc.parallel.processes import python_path
from distpc.parallel.room import count_places
from distpc.parallel.tally import Tally
from distpc.parallel.worker import WorkerHost

_KNOCK_SECONDS = 5.0
# Unix sockets have paths of at most 107 bytes, of which Ray uses these below the cluster's folder.
_SOCKET_BYTES = 107 - len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")

_QUIET: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}


class Cluster:
    """A connection to Ray, as a context manager.

    With RAY_ADDRESS in the environment it joins that cluster; else it starts one on this machine
    that ends with this process, however that ends.
    """

    _in_session = False
    _shared: Cluster | None = None

    def __init__(
        self, parallel: ParallelConfig, own: tuple[Path, subprocess.Popen[bytes]] | None = None
    ) -> None:
        self.parallel = parallel
        # Folder and reaper of a cluster that this process started.
        self._own = own

    @classmethod
    def connect(cls, parallel: ParallelConfig) -> Cluster:
        """Join or start a cluster that has room for the workers that `parallel` asks for.

        In a session that has a cluster, that one, with the workers that this call asks for.

        Raises:
            ResourceError: it has not, or RAY_ADDRESS names no cluster.
        """
        if cls._shared is not None:
            return cls(parallel, cls._shared._own)
        address = os.environ.get("RAY_ADDRESS")
        cluster = _join(parallel, address) if address else _start(parallel)
        if cls._in_session:
            cls._shared = cluster
        return cluster

    @classmethod
    @contextlib.contextmanager
    def session(cls) -> Iterator[None]:
        """Let all connections of one configuration made inside share a cluster.

        The first `connect` starts it, and it ends with the session: starting Ray takes seconds,
        and the stages of a run need it one after the other.
        """
        cls._in_session = True
        try:
            yield
        finally:
            shared, cls._in_session, cls._shared = cls._shared, False, None
            if shared is not None:
                shared.close()

    def pool(
        self, worker: str, kwargs: dict[str, Any], *, ahead: int = 0, tally: Tally | None = None
    ) -> Pool:
        """Workers that keep living, with what they cached, over several `map` calls.

        Args:
            ahead: items that a worker is given beside the one that it works on; then its methods
                are called from several threads at a time.
            tally: of the time that the workers spend; shown in Ray's dashboard, too.
        """
        if tally is not None:
            tally.show_in(Gauges(_gauge(), tally.stage))
        return Pool(_ray(), _Host, worker, kwargs, self.parallel, ahead, _ask_autoscaler, tally)

    def map(
        self,
        worker: str,
        kwargs: dict[str, Any],
        items: Sequence[Any],
        *,
        method: str = "__call__",
        label: str = "",
        retries: int | None = None,
        tally: Tally | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of every item as it is finished; see `Pool.map`.

        Args:
            worker: `module:Class`; every worker process constructs `Class(**kwargs)` once.
            kwargs: of the constructor; handles of `put` arrive as their values.
            tally: see `pool`.
        """
        with contextlib.closing(self.pool(worker, kwargs, tally=tally)) as pool:
            yield from pool.map(items, method=method, label=label, retries=retries, release=True)

    def put(self, value: Any) -> Any:
        """Store `value` once for all workers; the handle goes inside items or kwargs."""
        return _ray().put(value)

    def rank_hosts(self, num_ranks: int, num_cpus: int, seconds: float) -> RankHosts:
        """Places for `num_ranks` training ranks of `num_cpus` CPUs each; see `RankHosts`."""
        return RankHosts(_ray(), num_ranks, num_cpus, seconds)

    def gauges(self, path: Path, stage: str) -> RankGauges:
        """What shows the figures that ranks leave in a file in Ray's dashboard."""
        return RankGauges(_gauge(), path, stage)

    def address(self) -> str:
        """The address of this machine by which others of the cluster reach it."""
        return str(_ray().util.get_node_ip_address())

    def environment(self) -> dict[str, str]:
        """Variables with which a process that this one starts joins the same cluster."""
        return {"RAY_ADDRESS": str(_ray().get_runtime_context().gcs_address)}

    @property
    def is_own(self) -> bool:
        """Whether this process started it, so that it is this machine alone."""
        return self._own is not None

    def num_runs(self, parallel: ParallelConfig) -> int:
        """How many runs as `parallel` describes them the cluster has room for at a time."""
        total = _ray().cluster_resources()
        workers = parallel.num_workers * parallel.cpus_per_worker
        cpus = max(workers, parallel.total_ranks * parallel.threads_per_rank)
        room = total.get("CPU", 0) / cpus
        if total.get("GPU", 0) > 0:
            # Every training rank takes a GPU where there are any.
            room = min(room, total["GPU"] / parallel.total_ranks)
        return max(1, int(room + 1e-6))

    def close(self) -> None:
        """Leave the cluster; end it if it is this process's own. Idempotent.

        A cluster that a session shares stays until the session ends.
        """
        if Cluster._shared is not None:
            return
        _ray().shutdown()
        if self._own is not None:
            folder, keeper = self._own
            self._own = None
            reaper.sweep(folder, spared=reaper.command_line(os.getpid()))
            keeper.kill()
            keeper.wait()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Host(WorkerHost):
    def gpu_ids(self) -> list[Any]:
        return _ray().get_gpu_ids()


def _ask_autoscaler(places: list[dict[str, float]]) -> None:
    """Say what room is wanted in all; without an autoscaler nobody listens."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=places)


def _start(parallel: ParallelConfig) -> Cluster:
    """A new cluster on this machine, watched by a reaper."""
    num_cpus, num_gpus = check_machine(parallel)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folder = _new_folder()
    # A session of its own, so that neither Ctrl-C nor the end of the terminal reaches it.
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, str(folder), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    cluster = Cluster(parallel, (folder, keeper))
    try:
        # Through the environment, not Ray's runtime environments: those would waste the workers
        # that Ray starts in advance.
        # A rank's cluster is no rank: its workers must not take themselves for it.
        with _environment(PYTHONPATH=python_path(), **dict.fromkeys(RANK_VARIABLES)):
            _ray().init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                _temp_dir=str(folder),
                **_QUIET,
            )
    except BaseException:
        cluster.close()
        raise
    return cluster


def _join(parallel: ParallelConfig, address: str) -> Cluster:
    """The cluster at `address`."""
    ray = _ray()
    try:
        _knock(address)
        ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": python_path()}}, **_QUIET)
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            "no Ray cluster answers at RAY_ADDRESS",
            where=f"RAY_ADDRESS={address}",
            found=f"{type(error).__name__}: {error}",
            expected="the address of a running cluster, such as 10.0.0.1:6379",
            fix="start one with `ray start --head`, or unset RAY_ADDRESS to use this machine",
        ) from error
    cluster = Cluster(parallel)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        check_room(parallel, nodes, f"the Ray cluster at {address}")
    except BaseException:
        cluster.close()
        raise
    return cluster


def _knock(address: str) -> None:
    """Fail at once where nothing listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in address:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def check_machine(parallel: ParallelConfig) -> tuple[int, int]:
    """CPUs and GPUs for a cluster on this machine.

    Raises:
        ResourceError: fewer workers fit than are asked for.
    """
    num_cpus = os.cpu_count() or 1
    num_gpus = torch.cuda.device_count() if parallel.gpus_per_worker > 0 else 0
    check_room(parallel, [{"CPU": num_cpus, "GPU": num_gpus}], "this machine")
    return num_cpus, num_gpus


def check_room(parallel: ParallelConfig, nodes: list[dict[str, float]], place: str) -> None:
    """Refuse a request that Ray would wait for without end.

    Args:
        parallel: what is asked for.
        nodes: "CPU" and "GPU" of every machine; a worker fits on one machine or none.
        place: name of the cluster.

    Raises:
        ResourceError: fewer workers fit than are asked for.
    """
    cpus, gpus = parallel.cpus_per_worker, parallel.gpus_per_worker
    room = count_places(parallel, nodes)
    if room >= parallel.num_workers:
        return
    on_cpus = parallel.model_copy(update={"gpus_per_worker": 0.0})
    lacks_gpus = count_places(on_cpus, nodes) >= parallel.num_workers
    total_cpus = sum(node.get("CPU", 0) for node in nodes)
    total_gpus = sum(node.get("GPU", 0) for node in nodes)
    raise ResourceError(
        f"{place} has no room for {parallel.num_workers} workers",
        where=f"parallel.{'gpus_per_worker' if lacks_gpus else 'num_workers'}",
        found=f"{total_cpus:g} CPUs and {total_gpus:g} GPUs on {len(nodes)} machine(s): "
        f"room for {room} workers",
        expected=f"{parallel.num_workers} workers x {cpus:g} CPUs and {gpus:g} GPUs = "
        f"{parallel.num_workers * cpus:g} CPUs and {parallel.num_workers * gpus:g} GPUs",
        fix=f"set parallel.num_workers={room}"
        if room
        else "lower parallel.cpus_per_worker or parallel.gpus_per_worker",
    )


def _new_folder() -> Path:
    """A folder for one cluster: private, and short enough for sockets in it."""
    parent = Path(tempfile.gettempdir())
    prefix = f"ray-{os.getuid()}-"
    if len(os.fsencode(parent / f"{prefix}12345678")) > _SOCKET_BYTES:
        parent = Path("/tmp")
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Environment variables, unset where None, for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _gauge() -> Any:
    """Ray's class of gauges."""
    from ray.util.metrics import Gauge

    return Gauge


def _ray() -> Any:
    """The ray module, imported after the settings that it reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    return ray
