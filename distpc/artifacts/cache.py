"""Copies of files from object stores on a local disk: bounded, shared by a machine's processes.

A copy is named by its SHA-256, so that it can never be taken for another content. Locks are the
kernel's (flock) on the copies themselves and vanish with the process that holds them:

- who reads a copy holds it shared, and only what nobody holds is evicted, least recently used
  first;
- who downloads holds a reservation, an empty file as long as what will come; one that nobody holds
  is the leftover of a process that died;
- the folder's own lock is held for the moments in which space is shared out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distpc.artifacts.files import PARTIAL_SUFFIX, file_digest
from distpc.artifacts.place import Place
from distpc.errors import PlaceError, ResourceError

WAIT_SECONDS = 60.0
"""Time that a file waits for room while others are in use."""
_POLL_SECONDS = 0.05
_RESERVED = ".reserved"


def default_folder() -> Path:
    """Where copies lie unless `artifacts.cache_folder` says otherwise."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "distpc" if home else Path.home() / ".cache" / "distpc"


@dataclass(frozen=True)
class Cache:
    """A folder of copies.

    Attributes:
        folder: on a disk of this machine; None: `default_folder()` of the machine that reads.
        max_bytes: bound on all copies together, those that are being downloaded included.
    """

    folder: str | None = None
    max_bytes: int = 10 * 2**30

    @contextlib.contextmanager
    def hold(
        self, place: Place, name: str, num_bytes: int, sha256: str | None = None
    ) -> Iterator[tuple[Path, str | None]]:
        """Yield a local path of a place's file, which stays while the block runs, and its SHA-256.

        A file of a local place is given as it is, its digest unknown.

        Args:
            num_bytes: the file's length.
            sha256: of its content, if known; unknown ones are downloaded each time.

        Raises:
            PlaceError: the file is missing, has another content, or cannot be reached.
            ResourceError: it does not fit into the cache, or the disk is full.
        """
        if place.is_local:
            yield Path(place.at(name)), sha256
            return
        folder = Path(self.folder) if self.folder else default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + WAIT_SECONDS
        while (descriptor := _held(folder / sha256 if sha256 else None, num_bytes)) is None:
            sha256 = self._download(folder, place, name, num_bytes, sha256, deadline)
        try:
            assert sha256 is not None
            os.utime(descriptor)
            yield folder / sha256, sha256
        finally:
            os.close(descriptor)

    def _download(
        self,
        folder: Path,
        place: Place,
        name: str,
        num_bytes: int,
        sha256: str | None,
        deadline: float,
    ) -> str | None:
        """Bring a file into the cache, or wait for who is doing it; its digest, if now known."""
        reserved = folder / f".{sha256 or secrets.token_hex(32)}{_RESERVED}"
        descriptor = self._reserve(folder, reserved, num_bytes, place.at(name), deadline)
        if descriptor is None:
            return sha256
        partial = reserved.with_suffix(PARTIAL_SUFFIX)
        try:
            place.fetch(name, partial)
            size, found = partial.stat().st_size, file_digest(partial)
            if size != num_bytes or sha256 not in (None, found):
                raise PlaceError(
                    "a file in an object store has another content than expected",
                    where=place.at(name),
                    found=f"{size} bytes with SHA-256 {found}",
                    expected=f"{num_bytes} bytes with SHA-256 {sha256 or '(any)'}",
                    fix="it was replaced while in use: remove what was made from it (of a run: "
                    "the shards and index stages' folders) and run the same command again",
                )
            partial.replace(folder / found)
            return found
        finally:
            partial.unlink(missing_ok=True)
            reserved.unlink(missing_ok=True)
            os.close(descriptor)

    def _reserve(
        self, folder: Path, reserved: Path, num_bytes: int, name: str, deadline: float
    ) -> int | None:
        """A locked reservation of `num_bytes`; None where another process had one for the file."""
        while True:
            with _locked(folder / ".lock"):
                used = _tidy(folder, self.max_bytes - num_bytes)
                busy = reserved.exists()
                if not busy and used + num_bytes <= self.max_bytes:
                    descriptor = os.open(reserved, os.O_RDWR | os.O_CREAT, 0o644)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    os.truncate(descriptor, num_bytes)
                    return descriptor
            if busy:
                # Until its owner is done, or dead.
                with contextlib.suppress(FileNotFoundError), _locked(reserved, create=False):
                    return None
                return None
            if num_bytes > self.max_bytes or time.monotonic() > deadline:
                raise ResourceError(
                    "the cache of object stores is too small",
                    where=f"{folder}, for {name}",
                    found=f"{self.max_bytes} bytes, {used} of them in use",
                    expected=f"room for {num_bytes} bytes more",
                    fix="raise artifacts.cache_bytes, or lower parallel.num_workers",
                )
            time.sleep(_POLL_SECONDS)


_current = Cache()


def use(cache: Cache) -> None:
    """Let this process keep its copies in `cache` from now on."""
    global _current
    _current = cache


def current() -> Cache:
    """The cache of this process."""
    return _current


def _held(path: Path | None, num_bytes: int) -> int | None:
    """A descriptor that keeps a whole copy from being evicted; None where there is no such copy."""
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    status = os.fstat(descriptor)
    if status.st_nlink and status.st_size == num_bytes:
        return descriptor
    os.close(descriptor)
    # Without a name: evicted between the two calls. With one: cut by others than us.
    if status.st_nlink:
        path.unlink(missing_ok=True)
    return None


def _tidy(folder: Path, max_bytes: int) -> int:
    """Remove leftovers, then what nobody holds until `max_bytes` remain; the bytes that do."""
    used = 0
    copies = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.suffix == _RESERVED:
            if _remove_unheld(path):
                path.with_suffix(PARTIAL_SUFFIX).unlink(missing_ok=True)
            else:
                used += status.st_size
        elif not path.name.startswith("."):
            used += status.st_size
            copies.append((status.st_mtime_ns, status.st_size, path))
    for _, size, path in sorted(copies):
        if used <= max_bytes:
            break
        if _remove_unheld(path):
            used -= size
    return used


def _remove_unheld(path: Path) -> bool:
    """Remove a file unless a process holds it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def _locked(path: Path, create: bool = True) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
