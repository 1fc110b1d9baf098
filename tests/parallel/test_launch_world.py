"""Ranks that a launcher started: they meet, do what rank 0 calls, and end together."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel_processes import wait_until

import distpc
from distpc.parallel.processes import interface_towards, loopback_interface, python_path

RANK = Path(__file__).with_name("world_rank.py")


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator["Ranks"]:
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.started:
        process.kill()
        process.wait()


class Ranks:
    """Processes with the variables that launchers set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self, rank: int, what: str, *facts: str, world_size: int = 2) -> None:
        self._start([str(RANK), what, str(self.folder), *facts], rank, python_path(), world_size)

    def run_distpc(self, rank: int, package_root: Path) -> None:
        config = Path(__file__).parents[2] / "configs" / "digits_hclt.yaml"
        command = ["-m", "distpc", "run", str(config), "--out", str(self.folder / "run")]
        self._start(command, rank, str(package_root), 2)

    def _start(self, command: list[str], rank: int, path: str, world_size: int) -> None:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
        }
        self.started.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def ends(self, seconds: float = 90) -> list[tuple[int, str]]:
        """Exit status and output of each, in the order of their start."""
        deadline = time.monotonic() + seconds
        outputs = []
        for process in self.started:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            outputs.append((process.returncode, output))
        return outputs


def test_all_ranks_run_what_rank_0_calls(ranks: Ranks) -> None:
    for rank in (1, 0):
        ranks.start(rank, "calls")
    assert ranks.ends() == [(0, ""), (0, "")]
    for call in ("first", "second"):
        found = sorted(path.name for path in (ranks.folder / call).glob("*.json"))
        assert found == ["0.json", "1.json"]


@pytest.mark.parametrize("what", ["stage fails", "call fails"])
def test_an_error_anywhere_ends_all_and_is_told_once(ranks: Ranks, what: str) -> None:
    for rank in (0, 1):
        ranks.start(rank, what)
    (first, told), (second, silent) = ranks.ends()
    assert (first, second, silent) == (2, 2, "")
    assert told.startswith("DataError: a shard is cut\n  where:    train-7")
    assert "write it anew" in told and told.count("DataError") == 1


def test_ranks_in_different_operations_end(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.start(rank, "call skips")
    (first, told), (second, silent) = ranks.ends()
    assert (first, second, silent) == (2, 2, "")
    assert re.match("TrainingError: rank [01] of 2 waited in vain for the others", told)
    assert "within 2.5 s (parallel.collective_seconds)" in told and "in skip_a_coll" in told


def test_ranks_that_were_started_differently_are_refused(ranks: Ranks) -> None:
    ranks.start(0, "calls", "4")
    ranks.start(1, "calls", "3")
    (first, told), (second, silent) = ranks.ends()
    assert (first, second, silent) == (2, 2, "")
    assert told.startswith("ConfigError: rank 1 was started differently from rank 0")
    assert "found:    config.finetune.num_epochs=3\n" in told
    assert "expected: config.finetune.num_epochs=4\n" in told


@pytest.mark.slow
def test_ranks_of_other_code_are_refused(ranks: Ranks) -> None:
    """`distpc run` twice, once from a copy of the package with one more comment."""
    package, copy = Path(distpc.__file__).parent, ranks.folder / "copy"
    shutil.copytree(package, copy / "distpc", ignore=shutil.ignore_patterns("*.pyc"))
    with (copy / "distpc" / "cli.py").open("a") as file:
        file.write("# another\n")
    for rank, path in enumerate([package.parent, copy]):
        ranks.run_distpc(rank, path)
    (first, told), (second, silent) = ranks.ends()
    assert (first, second, silent) == (2, 2, "")
    assert "ConfigError: rank 1 was started differently from rank 0" in told
    assert "found:    code of distpc=" in told and "same installation" in told


def test_a_rank_that_never_joins_ends_the_wait(ranks: Ranks) -> None:
    for rank in (0, 2):
        ranks.start(rank, "joins", world_size=3)
    (first, told), (second, silent) = ranks.ends()
    assert (first, second, silent) == (2, 2, "")
    assert told.startswith("TrainingError: rank 1 never joined")
    assert "parallel.join_seconds" in told


@pytest.mark.parametrize(("victim", "how"), [(1, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_a_lost_rank_ends_the_others(ranks: Ranks, victim: int, how: signal.Signals) -> None:
    for rank in (0, 1):
        ranks.start(rank, "waits")
    for name in ("leads", "follows"):
        wait_until((ranks.folder / name).is_file, 90, name)
    ranks.started[victim].send_signal(how)
    survivor = ranks.started[1 - victim]
    output, _ = survivor.communicate(timeout=40)
    assert survivor.returncode == 2
    assert f"TrainingError: rank {victim} of 2 is lost" in output
    assert "finished work is kept" in output


def test_the_interface_that_leads_to_this_machine() -> None:
    assert interface_towards("127.0.0.1") == loopback_interface()
    assert interface_towards("no such host") is None
