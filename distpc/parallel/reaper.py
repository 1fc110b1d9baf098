"""Ends what is left of a local Ray cluster once its driver is gone.

Run as a script, with the standard library alone, beside the driver:

    python reaper.py FOLDER DRIVER_PID

Ray's main services die with the driver, but its agents wait a minute for the services to come
back. Every process of a cluster keeps a log file open for writing in the cluster's own folder:
that is how they are found here, and nothing else can be.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

_POLL_SECONDS = 0.25
_SWEEP_SECONDS = 20.0
_QUIET_SCANS = 3


def writers(folder: Path, spared: bytes | None = None) -> list[int]:
    """Processes that hold a file in `folder` open for writing.

    Args:
        folder: an absolute path without links.
        spared: command line of processes that do not count.
    """
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _writes(process, folder):
            number = int(process.name)
            if spared is None or command_line(number) != spared:
                found.append(number)
    return found


def sweep(folder: Path, spared: bytes | None = None) -> None:
    """Kill the writers of `folder` until there are none, then remove it.

    A living driver writes there too: it spares its own command line, which its forks share and
    Ray's processes do not.
    """
    deadline = time.monotonic() + _SWEEP_SECONDS
    quiet = 0
    while quiet < _QUIET_SCANS and time.monotonic() < deadline:
        found = writers(folder, spared)
        quiet = 0 if found else quiet + 1
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def command_line(process: int) -> bytes:
    """The command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def main(folder: Path, driver: int) -> None:
    """Wait until the driver is dead, then sweep."""
    while os.getppid() == driver:
        time.sleep(_POLL_SECONDS)
    sweep(folder)


def _writes(process: Path, folder: Path) -> bool:
    prefix = f"{folder}{os.sep}"
    try:
        for descriptor in (process / "fd").iterdir():
            if str(descriptor.readlink()).startswith(prefix):
                text = (process / "fdinfo" / descriptor.name).read_text()
                flags = next(line for line in text.splitlines() if line.startswith("flags:"))
                if int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    except OSError:
        # Another user's process, or one that ended meanwhile.
        return False
    return False


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
