"""Start the training ranks, here or on a Ray cluster, watch them, and leave none behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from distpc.artifacts.files import no_space, write_json
from distpc.config.schema import ParallelConfig
from distpc.errors import DistpcError, TrainingError
from distpc.parallel.collectives import COLLECTIVE_SECONDS
from distpc.parallel.failures import (
    DISK_FULL,
    Failure,
    first_own,
    first_rank,
    rank_failed,
    read_failure,
)
from distpc.parallel.mesh import check_devices, crowded, is_rank, launcher_name
from distpc.parallel.meter import FIGURES
from distpc.parallel.placement import LOST
from distpc.parallel.processes import python_path
from distpc.parallel.pulse import Lookout
from distpc.parallel.rank import call, error_file, joined_mesh, log_file
from distpc.parallel.world import World

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 2.0
# A cluster takes its time to notice that a machine is lost; ranks that miss it fail sooner.
_LOST_SECONDS = 60.0
_PAYLOAD = "payload.json"


def run_ranks(
    target: str,
    payload: dict[str, Any],
    *,
    num_ranks: int,
    threads_per_rank: int,
    log_folder: Path,
    join_seconds: float = 300.0,
    lost_seconds: float = 120.0,
    collective_seconds: float = COLLECTIVE_SECONDS,
) -> None:
    """Run `target` in R = `num_ranks` processes, joined in a process group.

    The target is called as `function(payload, mesh)` on every rank; the process group is joined
    before and left after it. Where a launcher (torchrun, deepspeed) started this process as a
    rank already, the target runs in the ranks that it started: rank 0 of a `World` calls it on all
    of them; without a `World` every rank calls this function.

    With RAY_ADDRESS in the environment the ranks run on that Ray cluster, which has to see
    `log_folder`; otherwise on this machine. They die with this process, however it dies. Rank 0
    writes to this process's terminal, the others to `log_folder`/rank-N.log.

    Args:
        target: `module:function`, importable from this process's sys.path.
        payload: JSON values.
        num_ranks: processes to start.
        threads_per_rank: CPU threads of each.
        log_folder: for logs and errors; made if missing.
        join_seconds: to wait for places on a Ray cluster, and for a rank's first sign of life.
        lost_seconds: after which a rank that hangs is given up, see `pulse`.
        collective_seconds: that a rank may wait for others in one collective operation.

    Raises:
        DistpcError: of the kind and with the fields that a rank raised.
        TrainingError: a rank failed in another way, was killed or hangs; the other ranks are gone.
        ResourceError: more ranks than GPUs, or no room on the cluster.
    """
    payload = json.loads(json.dumps(payload))
    if World.current is not None:
        log_folder.mkdir(parents=True, exist_ok=True)
        World.current.call(target, payload, threads_per_rank, log_folder)
        return
    if is_rank():
        with joined_mesh(collective_seconds) as mesh:
            call(target, payload, mesh)
        return
    log_folder.mkdir(parents=True, exist_ok=True)
    for stale in [*log_folder.glob("error-*.json"), *log_folder.glob("rank-*.log")]:
        stale.unlink()
    write_json(log_folder / _PAYLOAD, payload)
    limits = join_seconds, lost_seconds, collective_seconds
    job = _Job(target, num_ranks, threads_per_rank, log_folder, *limits)
    on_cluster = launcher_name() == "ray"
    failed = _run_on_cluster(job) if on_cluster else _run_here(job)
    if failed:
        raise _error(failed, job)


def alone() -> dict[str, str]:
    """Variables with which a process is its own only rank, so that it needs no other for training.

    Raises:
        OSError: no port is free.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@dataclass(frozen=True)
class _Job:
    """What `run_ranks` was asked for."""

    target: str
    num_ranks: int
    num_threads: int
    log_folder: Path
    join_seconds: float
    lost_seconds: float
    collective_seconds: float

    def arguments(self, rank: int) -> list[str]:
        """Those of distpc.parallel.rank, but for the last: the parent's process id."""
        folder = self.log_folder.absolute()
        numbers = rank, self.num_threads, self.lost_seconds, self.collective_seconds
        return [self.target, str(folder / _PAYLOAD), str(folder), *map(str, numbers)]

    def lookout(self, store: dist.Store) -> Lookout:
        """Sees which of the ranks hang."""
        return Lookout(store, self.num_ranks, self.lost_seconds, self.join_seconds)

    def environment(self, rank: int, local_rank: int, host: str, port: int) -> dict[str, str]:
        """Variables of a rank, beside those of the process that starts it."""
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": str(self.num_threads),
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
        }
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        return environment


def _run_here(job: _Job) -> dict[int, int]:
    """Run the ranks on this machine; exit codes of the failed."""
    check_devices(job.num_ranks)
    warning = crowded(job.num_ranks, job.num_threads)
    if warning is not None:
        print(f"distpc: warning: {warning}", file=sys.stderr, flush=True)
    # This process holds the ranks' store, on a port that the kernel chose: no race for a free
    # port, and the port closes with this process.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_LocalRank] = []
    try:
        for rank in range(job.num_ranks):
            environment = job.environment(rank, rank, "127.0.0.1", store.port)
            environment["LOCAL_WORLD_SIZE"] = str(job.num_ranks)
            output = log_file(job.log_folder, rank) if rank > 0 else None
            ranks.append(_LocalRank(job.arguments(rank), environment, output))
        return _wait(ranks, job, job.lookout(store))
    finally:
        for started in ranks:
            started.end()
        del store


def _run_on_cluster(job: _Job) -> dict[int, int]:
    """Run the ranks on the cluster at RAY_ADDRESS; exit codes of the failed."""
    from distpc.parallel.cluster import Cluster

    request = ParallelConfig(num_workers=1, cpus_per_worker=job.num_threads)
    spoken = job.log_folder / "terminal.txt"
    spoken.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster.connect(request))
        host = cluster.address()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        hosts = cluster.rank_hosts(job.num_ranks, job.num_threads, job.join_seconds)
        stack.callback(hosts.close)
        ranks = []
        for rank in range(job.num_ranks):
            # Ray shows a rank no GPU but its own: that is number 0 for each.
            environment = job.environment(rank, 0, host, store.port)
            output = log_file(job.log_folder, rank) if rank > 0 else spoken
            ranks.append(hosts.start(job.arguments(rank), environment, output.absolute()))
            stack.callback(ranks[-1].end)
        gauges = cluster.gauges(job.log_folder / FIGURES, job.log_folder.parent.name)
        with _Relay(spoken) as relay:

            def is_clear(failed: dict[int, int]) -> bool:
                return LOST in failed.values() or first_own(_failures(job)) is not None

            meanwhile = relay.pass_on, gauges.pass_on
            failed = _wait(ranks, job, job.lookout(store), *meanwhile, is_clear=is_clear)
        gauges.lost(list(failed))
        del store
    return failed


class _Rank(Protocol):
    """A rank that was started somewhere."""

    def poll(self) -> int | None:
        """Its exit status, negative if a signal ended it; None while it runs."""

    def end(self) -> None:
        """Kill it if it runs."""


class _LocalRank:
    """A rank as a process of this machine."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path | None) -> None:
        command = [sys.executable, "-m", "distpc.parallel.rank", *arguments, str(os.getpid())]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("ab")) if log is not None else None
            # A session of its own: Ctrl-C reaches the parent alone, which then ends the ranks.
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Relay:
    """Passes on what a rank elsewhere writes into a file, to this process's stderr."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def pass_on(self) -> None:
        """Pass on what is new."""
        if self._path.is_file():
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
            self._at += len(text)
            sys.stderr.write(text.decode(errors="replace"))
            sys.stderr.flush()

    def __enter__(self) -> _Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.pass_on()


def _wait(
    ranks: Sequence[_Rank],
    job: _Job,
    lookout: Lookout,
    *meanwhile: Callable[[], None],
    is_clear: Callable[[dict[int, int]], bool] = lambda failed: True,
) -> dict[int, int]:
    """Wait until all ranks succeeded or one failed; exit codes of the failed, by rank.

    The first that is seen to fail need not be the first that failed: the others have a moment to
    report, and longer while it is not clear what began it.

    Raises:
        TrainingError: a rank hangs.
    """
    since = None
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(ranks)}
        failed = {rank: code for rank, code in codes.items() if code is not None and code != 0}
        if None not in codes.values():
            return failed
        if failed:
            since = since or time.monotonic()
            waited = time.monotonic() - since
            if waited > _LOST_SECONDS or (waited > _GRACE_SECONDS and is_clear(failed)):
                return failed
        elif hanging := lookout.hanging([rank for rank, code in codes.items() if code is None]):
            raise _hangs(*hanging, job)
        for action in meanwhile:
            action()
        time.sleep(_POLL_SECONDS)


def _failures(job: _Job) -> dict[int, Failure]:
    """The errors that ranks left, by rank."""
    found = {rank: read_failure(error_file(job.log_folder, rank)) for rank in range(job.num_ranks)}
    return {rank: failure for rank, failure in found.items() if failure is not None}


def _error(failed: dict[int, int], job: _Job) -> DistpcError:
    """The error to raise: the cause, not what the loss of the first rank did to the others."""
    failures = _failures(job)
    own = first_own(failures)
    if own is not None:
        return own
    if DISK_FULL in failed.values():
        return no_space(job.log_folder)
    killed = next((rank for rank, code in failed.items() if code < 0), None)
    first = first_rank(failures) if killed is None else killed
    rank = next(iter(failed)) if first is None else first
    log = log_file(job.log_folder, rank)
    if rank in failures:
        failure = failures[rank]
        how = f"failed: {failure.summary}"
        return rank_failed(rank, job.num_ranks, how, failure.trace, log)
    return rank_failed(rank, job.num_ranks, _manner(failed[rank]), _tail(log), log)


def _hangs(rank: int, how: str, where: str, job: _Job) -> TrainingError:
    return TrainingError(
        f"training rank {rank} of {job.num_ranks} {how}",
        where=log_file(job.log_folder, rank),
        found=f"\n{where}" if where else "silence",
        expected=f"a rank that moves within {job.lost_seconds:g} s (parallel.lost_seconds)",
        fix="look for a stopped process, or a disk or network that does not answer, and run the "
        "same command again: finished work is kept; if it was only slow, raise the limit",
    )


def _manner(code: int) -> str:
    if code == LOST:
        return "is lost: its machine, or what started it there, does not answer"
    if code >= 0:
        return f"ended with exit status {code}"
    hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.strsignal(-code)}{hint})"


def _tail(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
