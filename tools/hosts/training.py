"""Training over hosts by launch/torchrun.sh, and what becomes of it when a host is cut off."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from checks import (
    HELD,
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

REPO = Path(__file__).resolve().parents[2]
LOST_SECONDS = 5.0
_DETECTION_SECONDS = 45.0
"""Most that may pass until all ranks have ended: lost_seconds and what a busy machine adds."""
_AGENT_SECONDS = 60.0
"""Most that may pass until their launchers have."""


class Trainings:
    """Runs of one configuration on changing hosts.

    Args:
        arguments: of `distpc run`, the configuration first.
        folder: of all run folders; a finished undisturbed run there is taken as it is.
    """

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._arguments = [*arguments, "parallel.zero_stage=3", "parallel.join_seconds=60"]
        self._arguments += [f"parallel.lost_seconds={LOST_SECONDS:g}"]
        self._arguments += ["finetune.checkpoint_every_seconds=0"]
        self._folder = folder

    def undisturbed(self, hosts: list[Host], name: str) -> Path:
        """Train on all hosts, to the end."""
        out = self._folder / name
        if (out / HELD).exists():
            return out
        wait_for_ends(self._start(hosts, fresh(out), name), 600)
        report = read_report(out)
        check(
            report["ranks"]["num_ranks"] == len(hosts),
            f"torchrun trains over {len(hosts)} host(s) with ZeRO-3",
            f"test_bpd {report['test_bpd']:.7f}",
        )
        (out / HELD).touch()
        return out

    def cut_off(self, hosts: list[Host], name: str, whole: Path) -> None:
        """Pull the last host's cable during training; the others stop, then finish without it."""
        out = fresh(self._folder / name)
        lost, rest = hosts[-1], hosts[:-1]
        started = self._start(hosts, out, name)
        self._wait_for_training(out, started)
        lost.unplug()
        cut = time.monotonic()
        for host in hosts:
            wait_for(
                lambda host=host: not _ranks_of(host),
                _DETECTION_SECONDS,
                f"the rank on {host.name} to end",
            )
        seconds = time.monotonic() - cut
        check(
            seconds < _DETECTION_SECONDS,
            f"{lost.name} is cut off: training stops on all hosts",
            f"after {seconds:.1f} s (parallel.lost_seconds={LOST_SECONDS:g})",
        )
        number = len(hosts) - 1
        told = rest[0].log(name).read_text()
        check(
            f"rank {number} of {len(hosts)} is lost" in told,
            "the error names the lost rank",
            next((line for line in told.splitlines() if "is lost" in line), told[-2000:]),
        )
        wait_for(
            lambda: all(started[host.name].poll() is not None for host in rest),
            _AGENT_SECONDS,
            "the launchers to end",
        )
        check(
            all(started[host.name].returncode != 0 for host in rest),
            "the launchers end with an error",
        )
        # The launcher there would try for minutes to reach the others.
        lost.kill_all()
        lost.plug()
        self._continue(rest, out, f"{name}-rest", whole)

    def goes_on(self, hosts: list[Host], name: str, whole: Path) -> None:
        """Pull the last host's cable; the launchers of the others start again without it."""
        out = fresh(self._folder / name)
        started = self._start(hosts, out, name, NNODES=f"1:{len(hosts)}", MAX_RESTARTS="3")
        self._wait_for_training(out, started)
        hosts[-1].unplug()
        del started[hosts[-1].name]
        wait_for_ends(started, 300)
        hosts[-1].kill_all()
        hosts[-1].plug()
        self._compare(out, whole, len(hosts) - 1, "elastic restart goes on without the lost host")

    def _continue(self, hosts: list[Host], out: Path, name: str, whole: Path) -> None:
        wait_for_ends(self._start(hosts, out, name), 600)
        self._compare(out, whole, len(hosts), "the same command resumes on the remaining hosts")

    def _compare(self, out: Path, whole: Path, num_ranks: int, what: str) -> None:
        report = read_report(out)
        step = resumed_at_step(out)
        check(
            report["ranks"]["num_ranks"] == num_ranks and step > 0,
            what,
            f"{num_ranks} rank(s), from the checkpoint of step {step}",
        )
        same_result(out, whole)

    def _start(
        self, hosts: list[Host], out: Path, log: str, **variables: str
    ) -> dict[str, subprocess.Popen[bytes]]:
        command = [str(REPO / "launch" / "torchrun.sh"), *self._arguments, "--out", str(out)]
        shared = {
            "NNODES": str(len(hosts)),
            "NPROC": "1",
            "RDZV": f"{hosts[0].address}:29400",
            "MAX_RESTARTS": "0",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        alone = shared["NNODES"] == "1"
        return {
            host.name: host.start(
                log, command, LOCAL_ADDR="127.0.0.1" if alone else host.address, **shared
            )
            for host in hosts
        }

    def _wait_for_training(self, out: Path, started: dict[str, subprocess.Popen[bytes]]) -> None:
        def in_the_middle() -> bool:
            ended = [name for name, process in started.items() if process.poll() is not None]
            if ended:
                raise Failed(f"{ended} ended before a checkpoint was there")
            return has_trained(out)

        wait_for(in_the_middle, 300, "the first checkpoint")


def _ranks_of(host: Host) -> list[int]:
    """Processes of `host` that run distpc under torchrun."""
    found = []
    for process in host.processes():
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"run" in words and b"distpc" in words and b"torch.distributed.run" not in words:
            found.append(process)
    return found
