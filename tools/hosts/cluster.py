"""A Ray cluster over hosts, a run on it, and what becomes of it when a host is cut off."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from checks import (
    HELD,
    STATISTICS_TOLERANCE,
    Failed,
    check,
    fresh,
    has_trained,
    read_report,
    resumed_at_step,
    same_result,
    wait_for,
    wait_for_ends,
)
from network import Host
from safetensors.torch import load_file

_PORT = 6379
_RUN_SECONDS = 900.0
_NOTICE_SECONDS = 90.0
"""Most that may pass until Ray has noticed that a host is lost."""
_TAUGHT = ("shards", "index", "teacher")
_BEFORE_TRAINING = (*_TAUGHT, "features", "fit", "assign", "structure", "distill")
_COMPUTES = re.compile(rb"ray::_Host\.(?!__init__)")
_VARIABLES = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    # How soon a silent host is given up; by default after about half a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}


class Clusters:
    """Runs of one configuration on Ray clusters of one CPU a host.

    Args:
        arguments: of `distpc run`, the configuration first.
        folder: of the clusters' own files.
        runs: of run folders; a finished undisturbed run there is taken as it is.
    """

    def __init__(self, arguments: list[str], folder: Path, runs: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._runs = runs

    def undisturbed(self, hosts: list[Host], name: str) -> Path:
        """The whole run, workers and training ranks on all hosts."""
        out = self._runs / name
        if (out / HELD).exists():
            return out
        fresh(out)
        workers: dict[str, set[str]] = {host.name: set() for host in hosts}
        with self._cluster(hosts, name):
            run = self._run(hosts, out, name, workers=len(hosts), ranks=len(hosts))

            def ended() -> bool:
                for host in hosts:
                    workers[host.name] |= _kinds(host)
                return run.poll() is not None

            wait_for(ended, _RUN_SECONDS, f"{name} to end")
        wait_for_ends({hosts[0].name: run}, 0)
        for host, kinds in workers.items():
            check(
                kinds == {"workers", "ranks"},
                f"{host} works and trains for the Ray cluster",
                f"ran {' and '.join(sorted(kinds)) or 'nothing'}",
            )
        report = read_report(out)
        check(
            report["ranks"] | {"configured": 0}
            == {"started_by": "ray", "num_ranks": len(hosts), "configured": 0},
            f"a Ray cluster over {len(hosts)} hosts extracts, clusters, assigns, distils, trains",
            f"test_bpd {report['test_bpd']:.7f}",
        )
        (out / HELD).touch()
        return out

    def cut_off(self, hosts: list[Host], name: str, whole: Path) -> None:
        """Pull the last host's cable during extraction; the rest finishes the run."""
        out = fresh(self._runs / name)
        # The same teacher: two ranks train one that a single rank only matches up to rounding.
        _begin_with(out, whole, *_TAUGHT)
        lost, rest = hosts[-1], hosts[:-1]
        expected = len(list((whole / "features").glob("*.safetensors")))
        with self._cluster(hosts, name):
            run = self._run(hosts, out, name, workers=len(hosts), ranks=len(rest))

            def finished() -> int:
                return len(list((out / "features").glob("*.safetensors")))

            def in_the_middle() -> bool:
                if run.poll() is not None:
                    raise Failed("the run ended before a host was cut off")
                return finished() >= expected // 8

            wait_for(in_the_middle, _RUN_SECONDS, "extraction")
            # The host's worker may start later than the others can finish: they wait for it.
            with _paused(rest):
                wait_for(lambda: _computes(lost), _RUN_SECONDS, f"{lost.name} to take part")
                lost.unplug()
            check(
                finished() < expected,
                f"{lost.name} is cut off during extraction",
                f"{finished()} of {expected} shards are there",
            )
            wait_for_ends({hosts[0].name: run}, _RUN_SECONDS)
        lost.plug()
        told = hosts[0].log(name).read_text()
        lines = [line for line in told.splitlines() if "died over item" in line]
        check(bool(lines), "the lost worker's item was done by another", "; ".join(lines))
        _same_files(out, whole, "features")
        _same_files(out, whole, "assign")
        _near(out, whole, Path("fit", "centroids.safetensors"))
        same_result(out, whole)

    def lose(self, hosts: list[Host], name: str, whole: Path) -> None:
        """Switch the last host off during fine-tuning; the rest resumes."""
        out = fresh(self._runs / name)
        _begin_with(out, whole, *_BEFORE_TRAINING)
        lost, rest = hosts[-1], hosts[:-1]
        with self._cluster(hosts, name):
            run = self._run(hosts, out, name, workers=len(hosts), ranks=len(hosts))
            wait_for(lambda: has_trained(out), _RUN_SECONDS, "a checkpoint")
            # Ray chooses which host has which rank.
            rank = _rank_on(lost)
            lost.kill_all()
            begun = time.monotonic()
            wait_for(lambda: run.poll() is not None, _NOTICE_SECONDS, "training to stop")
            told = hosts[0].log(name).read_text()
            check(
                f"rank {rank} of {len(hosts)} is lost" in told and run.returncode == 2,
                f"{lost.name} is switched off in training on Ray: the error names the rank",
                f"rank {rank}, after {time.monotonic() - begun:.1f} s",
            )
            again = self._run(rest, out, f"{name}-rest", workers=len(rest), ranks=len(rest))
            wait_for_ends({hosts[0].name: again}, _RUN_SECONDS)
        step = resumed_at_step(out)
        check(step > 0, "the rest resumes", f"from the checkpoint of step {step}")
        same_result(out, whole)

    def _run(
        self, hosts: list[Host], out: Path, log: str, *, workers: int, ranks: int
    ) -> subprocess.Popen[bytes]:
        arguments = [*self._arguments, "--out", str(out), "parallel.join_seconds=60"]
        arguments += ["parallel.zero_stage=3", "finetune.checkpoint_every_seconds=0"]
        arguments += [f"parallel.num_workers={workers}", f"parallel.num_ranks={ranks}"]
        return hosts[0].start(
            log,
            [sys.executable, "-m", "distpc", "run", *arguments],
            RAY_ADDRESS=f"{hosts[0].address}:{_PORT}",
            **_VARIABLES,
        )

    @contextmanager
    def _cluster(self, hosts: list[Host], name: str) -> Iterator[None]:
        """Ray on all hosts, with one CPU each; the first is the head."""
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        start += ["--num-gpus=0", f"--object-store-memory={100 * 2**20}"]
        head, address = hosts[0], f"{hosts[0].address}:{_PORT}"
        try:
            for host in hosts:
                # Sockets need short paths.
                folder = self._folder / name[-9:] / host.name[-1]
                command = [*start, "--node-ip-address", host.address, "--temp-dir", str(folder)]
                command += (
                    ["--head", f"--port={_PORT}", "--include-dashboard=false"]
                    if host is head
                    else ["--address", address]
                )
                host.start(f"{name}-node", command, **_VARIABLES)
                log = host.log(f"{name}-node")
                wait_for(lambda log=log: "Ray runtime started" in log.read_text(), 120, "Ray")
            yield
        finally:
            for host in hosts:
                host.kill_all()


def _begin_with(out: Path, whole: Path, *stages: str) -> None:
    """Make a run folder in which `stages` are done, as in `whole`."""
    for stage in stages:
        shutil.copytree(whole / stage, out / stage)


def _kinds(host: Host) -> set[str]:
    """What of a run runs on `host` now: Ray workers, training ranks."""
    kinds = set()
    for process in host.processes():
        words = _read(process, "cmdline")
        if words.startswith(b"ray::_Host"):
            kinds.add("workers")
        if b"distpc.parallel.rank" in words:
            kinds.add("ranks")
    return kinds


def _computes(host: Host) -> bool:
    """Whether a Ray worker on `host` has work now: Ray shows the method in the process's name."""
    return any(_COMPUTES.match(_read(process, "cmdline")) for process in host.processes())


@contextmanager
def _paused(hosts: list[Host]) -> Iterator[None]:
    """Ray workers on `hosts` stand still in here."""
    workers = [
        process
        for host in hosts
        for process in host.processes()
        if _read(process, "cmdline").startswith(b"ray::_Host")
    ]
    try:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        yield
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)


def _rank_on(host: Host) -> int:
    """Which training rank runs on `host`.

    Raises:
        Failed: none does.
    """
    for process in host.processes():
        if b"distpc.parallel.rank" in _read(process, "cmdline"):
            found = re.search(rb"(?:^|\0)RANK=(\d+)", _read(process, "environ"))
            if found:
                return int(found[1])
    raise Failed(f"no rank trains on {host.name}")


def _read(process: int, name: str) -> bytes:
    """A file of /proc about a process; empty where it has just ended."""
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def _same_files(out: Path, whole: Path, stage: str) -> None:
    names = [{path.name for path in (run / stage).glob("*.safetensors")} for run in (out, whole)]
    check(names[0] == names[1] and bool(names[0]), f"{stage} wrote the same {len(names[0])} files")
    for name in sorted(names[0]):
        found, expected = (load_file(run / stage / name) for run in (out, whole))
        same = found.keys() == expected.keys()
        if not same or not all(torch.equal(found[key], expected[key]) for key in expected):
            raise Failed(f"{stage}/{name} differs from the undisturbed run's")


def _near(out: Path, whole: Path, file: Path) -> None:
    found, expected = (load_file(run / file) for run in (out, whole))
    worst = max(
        float((found[key] - expected[key]).abs().max() / expected[key].abs().max())
        for key in expected
    )
    check(worst <= STATISTICS_TOLERANCE, f"{file} agrees", f"within {worst:.1e}")
