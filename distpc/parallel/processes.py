"""Small facts about this process and the ones it starts."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def python_path() -> str:
    """A PYTHONPATH under which another interpreter imports what this one does.

    The package may be on this process's sys.path alone, so the environment's own value will
    not do.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    entries = [package_root, *(str(Path(entry).absolute()) for entry in sys.path)]
    return os.pathsep.join(dict.fromkeys(entry for entry in entries if Path(entry).exists()))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process (SIGKILL) when process `parent`, which started it, dies.

    Called in the child, not between fork and exec, which is unsafe in a parent with threads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def loopback_interface() -> str | None:
    """Name of the network interface that leads to this machine itself, if there is one."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), None)
