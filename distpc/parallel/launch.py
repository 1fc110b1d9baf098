"""Start the training ranks of this machine, watch them, and leave none behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distpc.artifacts.files import write_json
from distpc.errors import DistpcError
from distpc.parallel.failures import Failure, first_own, first_rank, rank_failed, read_failure
from distpc.parallel.mesh import check_devices, is_rank
from distpc.parallel.processes import python_path
from distpc.parallel.rank import error_file, import_target, joined_mesh, log_file
from distpc.parallel.world import World

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 2.0


def run_ranks(
    target: str,
    payload: dict[str, Any],
    *,
    num_ranks: int,
    threads_per_rank: int,
    log_folder: Path,
) -> None:
    """Run `target` in R = `num_ranks` processes of this machine, joined in a process group.

    The target is called as `function(payload, mesh)` on every rank; the process group is joined
    before and left after it. Where a launcher (torchrun, deepspeed) started this process as a
    rank already, the target runs in the ranks that it started: rank 0 of a `World` calls it on all
    of them; without a `World` every rank calls this function.

    The ranks die with this process, however it dies. Rank 0 writes to this process's terminal,
    the others to `log_folder`/rank-N.log.

    Args:
        target: `module:function`, importable from this process's sys.path.
        payload: JSON values.
        num_ranks: processes to start.
        threads_per_rank: CPU threads of each.
        log_folder: for logs and errors; made if missing.

    Raises:
        DistpcError: of the kind and with the fields that a rank raised.
        TrainingError: a rank failed in another way or was killed; the other ranks are gone.
        ResourceError: more ranks than GPUs.
    """
    payload = json.loads(json.dumps(payload))
    if World.current is not None:
        log_folder.mkdir(parents=True, exist_ok=True)
        World.current.call(target, payload, threads_per_rank, log_folder)
        return
    if is_rank():
        with joined_mesh() as mesh:
            import_target(target)(payload, mesh)
        return
    check_devices(num_ranks)
    log_folder.mkdir(parents=True, exist_ok=True)
    for stale in [*log_folder.glob("error-*.json"), *log_folder.glob("rank-*.log")]:
        stale.unlink()
    payload_file = log_folder / "payload.json"
    write_json(payload_file, payload)

    # This process holds the ranks' store, on a port that the kernel chose: no race for a free
    # port, and the port closes with this process.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            arguments = [target, str(payload_file), str(log_folder), str(rank)]
            arguments += [str(threads_per_rank), str(os.getpid())]
            environment = _environment(rank, num_ranks, threads_per_rank, store.port)
            ranks.append(_start(arguments, environment, log_folder, rank))
        failed = _wait(ranks)
    finally:
        _kill(ranks)
        del store
    if failed:
        raise _error(failed, num_ranks, log_folder)


def _environment(rank: int, num_ranks: int, num_threads: int, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
    }
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _start(
    arguments: list[str], environment: dict[str, str], log_folder: Path, rank: int
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distpc.parallel.rank", *arguments]
    with contextlib.ExitStack() as stack:
        output = None
        if rank > 0:
            output = stack.enter_context(log_file(log_folder, rank).open("ab"))
        # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks.
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait until all ranks succeeded or one failed; exit codes of the failed, by rank."""
    deadline = None
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(ranks)}
        failed = {rank: code for rank, code in codes.items() if code not in (None, 0)}
        if None not in codes.values():
            return {rank: code for rank, code in failed.items() if code is not None}
        if failed and deadline is None:
            # The first to be seen need not be the first that failed: let the others report.
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            return {rank: code for rank, code in failed.items() if code is not None}
        time.sleep(_POLL_SECONDS)


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        process.wait()


def _error(failed: dict[int, int], num_ranks: int, log_folder: Path) -> DistpcError:
    """The error to raise: the cause, not what the loss of the first rank did to the others."""
    failures: dict[int, Failure] = {}
    for rank in range(num_ranks):
        failure = read_failure(error_file(log_folder, rank))
        if failure is not None:
            failures[rank] = failure
    own = first_own(failures)
    if own is not None:
        return own
    killed = next((rank for rank, code in failed.items() if code < 0), None)
    first = first_rank(failures) if killed is None else killed
    rank = next(iter(failed)) if first is None else first
    log = log_file(log_folder, rank)
    if rank in failures:
        failure = failures[rank]
        return rank_failed(rank, num_ranks, f"failed: {failure.summary}", failure.trace, log)
    return rank_failed(rank, num_ranks, _manner(failed[rank]), _tail(log), log)


def _manner(code: int) -> str:
    if code >= 0:
        return f"ended with exit status {code}"
    hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.strsignal(-code)}{hint})"


def _tail(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
