"""Artifacts: fingerprinted stage results that are complete or absent."""

from distpc.artifacts.files import (
    as_json,
    atomic_path,
    file_digest,
    fingerprint,
    read_json,
    remove_partials,
    write_bytes,
    write_json,
)
from distpc.artifacts.lock import RunLock
from distpc.artifacts.manifest import FORMAT_VERSION, Artifact
from distpc.artifacts.stage import Stage, StageContext

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "RunLock",
    "Stage",
    "StageContext",
    "as_json",
    "atomic_path",
    "file_digest",
    "fingerprint",
    "read_json",
    "remove_partials",
    "write_bytes",
    "write_json",
]
