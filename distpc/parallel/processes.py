"""Small facts about this process and the ones it starts."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_SIOCGIFADDR = 0x8915
_LAUNCHERS = (b"torchrun", b"torch.distributed", b"deepspeed")


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


def end_process(code: int) -> NoReturn:
    """End this process as Python would, but for the destructors of C++ libraries.

    A rank that has left its process group may still hold threads of gloo, whose destruction at
    exit now and then aborts a process that did everything right ("terminate called without an
    active exception").
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def leave_for_launcher(error: BaseException) -> None:
    """Leave `error` where torchrun, which adds a report of its own, looks for what ended a rank.

    Without it that report, the last thing on the terminal, says only that no reason is known.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or Path(path).exists():
        return
    text = f"{type(error).__name__}: {error}"
    value = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(value))


def loopback_interface() -> str | None:
    """Name of the network interface that leads to this machine itself, if there is one."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), None)


def interface_towards(host: str) -> str | None:
    """Name of the network interface from which this machine speaks to `host` (IPv4), if known."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting a datagram socket only chooses the way.
        probe.connect((host, 9))
        address = probe.getsockname()[0]
        if address.startswith("127."):
            return loopback_interface()
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def launcher_chain() -> list[int]:
    """This process, the one that started it, and those above that are Python launchers too.

    A launcher may work through a process of its own on each machine (deepspeed does), whose
    ranks must not outlive the one that the user started.
    """
    chain = [os.getpid(), os.getppid()]
    while (above := _parent(chain[-1])) > 1 and _is_launcher(above):
        chain.append(above)
    return chain


def still_holds(chain: list[int]) -> bool:
    """Whether every process of `launcher_chain` is still the child of the next."""
    return all(_parent(child) == parent for child, parent in itertools.pairwise(chain))


def _parent(process: int) -> int:
    """The parent's number; 0 if the process is gone or this is no Linux."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    # The name, in parentheses, may hold anything.
    return int(text.rpartition(")")[2].split()[1])


def _is_launcher(process: int) -> bool:
    try:
        name = Path(f"/proc/{process}/exe").readlink().name
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return name.startswith("python") and any(word in words for word in _LAUNCHERS)
