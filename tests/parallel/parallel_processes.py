"""Watching processes in tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

DRIVERS = Path(__file__).with_name("parallel_drivers.py")


def start_driver(*arguments: str, cwd: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`parallel_drivers.py` with `arguments`, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, str(DRIVERS), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)


def descendants(process: int) -> list[psutil.Process]:
    """All processes below `process`."""
    return psutil.Process(process).children(recursive=True)


def ports_of(processes: list[psutil.Process]) -> set[int]:
    """TCP ports on which `processes` listen."""
    ports = set()
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                ports.add(connection.laddr.port)
    return ports


def listening() -> set[int]:
    """TCP ports on which anything of this machine listens."""
    return {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def alive(processes: list[psutil.Process]) -> list[str]:
    """Those of `processes` that still run, as text."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.NoSuchProcess:
            continue
    return found
