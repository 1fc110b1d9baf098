"""Hosts on one machine: network namespaces that a bridge joins, each with an address of its own.

Everything lives in namespaces of users, processes, mounts and networks that one call of `enclose`
makes. When its first process ends, however that happens, the kernel ends all other processes in
them and removes interfaces, bridge and namespaces: nothing is left, and nothing outside is touched.
Storage stands for the disk that hosts of a cluster share.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

NOT_PERMITTED = 77
"""Exit status where this user may make no namespaces."""
_UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork"]
_UNSHARE += ["--kill-child", "--mount-proc"]
# The first process of a process namespace inherits all orphans: a shell buries them.
_FIRST = 'mount -t tmpfs none /run && mkdir -p /run/netns && "$@"; exit $?'
_TRY = "mount -t tmpfs none /run && mkdir /run/netns && ip netns add one"
_TRY += " && ip link add switch type bridge && ip netns exec one ip link set lo up"
_NETWORK = "10.77.0"


def enclose(program: Path) -> int:
    """Run `program` with this process's arguments inside namespaces of its own, then clean up.

    The first argument it gets is a folder, which is removed afterwards.

    Returns:
        its exit status; NOT_PERMITTED where there can be no namespaces.
    """
    try:
        tried = subprocess.run([*_UNSHARE, "sh", "-c", _TRY], capture_output=True, text=True)
        refusal = tried.stderr.strip() if tried.returncode else ""
    except FileNotFoundError as error:
        refusal = str(error)
    if refusal:
        print(f"hosts: no network namespaces here: {refusal}", file=sys.stderr)
        return NOT_PERMITTED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="distpc-hosts-") as folder:
        command = [*_UNSHARE, "bash", "-c", _FIRST, "bash"]
        command += [sys.executable, str(program), folder, *sys.argv[1:]]
        inside = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            return inside.wait()
        finally:
            inside.kill()
            inside.wait()


def end_with_parent() -> None:
    """Inside: end when the process outside ends, whose end of a pipe closes then."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Host:
    """A machine: its own interfaces, address and name.

    Attributes:
        name: of its network namespace and of itself.
        address: IPv4.
        log_folder: where its programs' output goes.
    """

    def __init__(self, number: int, log_folder: Path) -> None:
        self.name = f"host{number}"
        self.address = f"{_NETWORK}.{number}"
        self.log_folder = log_folder
        self._port = f"port{number}"
        _ip("netns", "add", self.name)
        _ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self._port, "master", "switch", "up")
        for interface in ("lo", "eth0"):
            _ip("-n", self.name, "link", "set", interface, "up")
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")

    def start(self, log: str, command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        """Start `command` on this host; its output goes to the file `log`."""
        in_place = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c"]
        in_place += [f'hostname {self.name}; exec "$@"', "sh", *command]
        with self.log(log).open("wb") as output:
            return subprocess.Popen(
                in_place,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def log(self, name: str) -> Path:
        """The file for a program's output."""
        return self.log_folder / f"{self.name}-{name}.log"

    def unplug(self) -> None:
        """Pull the cable: nothing is delivered, nobody is told."""
        _ip("link", "set", self._port, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self._port, "up")

    def processes(self) -> list[int]:
        """Numbers of the processes that run on this host."""
        return [int(line) for line in _ip("netns", "pids", self.name).split()]

    def sent_bytes(self) -> int:
        """What its interface has sent to other hosts, in bytes."""
        shown: list[dict[str, Any]] = json.loads(
            _ip("-n", self.name, "-s", "-j", "link", "show", "eth0")
        )
        return int(shown[0]["stats64"]["tx"]["bytes"])

    def kill_all(self) -> None:
        """End all of its processes, by number."""
        for process in self.processes():
            try:
                os.kill(process, 9)
            except ProcessLookupError:
                continue


def make_hosts(number: int, log_folder: Path) -> list[Host]:
    """`number` hosts on one switch."""
    log_folder.mkdir(parents=True, exist_ok=True)
    _ip("link", "add", "switch", "type", "bridge")
    _ip("link", "set", "switch", "up")
    return [Host(index + 1, log_folder) for index in range(number)]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
