"""One owner a run folder: an advisory lock that the kernel drops when its owner dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from distpc.errors import ArtifactError


class RunLock:
    """Context manager that holds `folder/.lock` for the life of this process.

    Raises:
        ArtifactError: another live process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # os.open gives a descriptor that child processes do not inherit, so an orphan cannot
        # keep the lock of a dead run.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ArtifactError(
                "another process is working in this run folder",
                where=self.path.parent,
                found=f"a lock held by process {owner}",
                expected="one run at a time",
                fix="wait for it, end it, or choose another --out",
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
