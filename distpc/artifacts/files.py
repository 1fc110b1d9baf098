"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distpc.errors import ArtifactError, ResourceError

PARTIAL_SUFFIX = ".partial"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    The temporary name carries the process id and random digits, so that a restarted worker and the
    one it replaces, or containers that share a disk and count processes alike, never write into
    the same file.

    Raises:
        ResourceError: the disk is full.
    """
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{unique}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    except OSError as error:
        if is_disk_full(error):
            raise no_space(path) from error
        raise
    finally:
        # Where the folder could not be made, there is nothing to remove either.
        with contextlib.suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


def is_disk_full(error: OSError) -> bool:
    """Whether a write met a full disk, an exhausted quota, or a limit on the size of files."""
    return error.errno in _DISK_ERRORS


def no_space(path: Path) -> ResourceError:
    """The error for a write that met a full disk."""
    return ResourceError(
        "no space left on the disk",
        where=path,
        found="the disk or quota is full, or files may not become that large (ulimit -f)",
        expected="room for this file",
        fix="free some space or choose another --out, then run the same command again",
    )


def remove_partials(folder: Path) -> None:
    """Remove what writers that died left behind; safe because a run folder has one owner."""
    for partial in folder.rglob(f".*{PARTIAL_SUFFIX}"):
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON from `path`.

    Raises:
        ArtifactError: the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError("a file is missing", where=path) from error
    except ValueError as error:
        raise ArtifactError(
            "a file is not valid JSON",
            where=path,
            found=str(error),
            expected="a JSON document written by distpc",
            fix="remove the stage's folder and run the same command again",
        ) from error


def as_json(value: Any) -> Any:
    """`value` as it is read back from JSON: tuples as lists, what JSON lacks as text."""
    return json.loads(json.dumps(value, default=str))


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
