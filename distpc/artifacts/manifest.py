"""A finished stage's folder and the manifest that vouches for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distpc.artifacts.files import read_json, write_json
from distpc.errors import ArtifactError, FormatVersionError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOGS = "logs"


@dataclass(frozen=True)
class Artifact:
    """A stage's complete result.

    Attributes:
        path: the stage's folder.
        stage: the stage that made it.
        fingerprint: of the config fields and inputs that it was made from.
        seconds: how long making it took.
        metadata: what the stage recorded about its result (JSON values).
        files: bytes of every file, by path relative to the folder.
    """

    path: Path
    stage: str
    fingerprint: str
    seconds: float
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def seal(
        cls, path: Path, stage: str, fingerprint: str, seconds: float, metadata: dict[str, Any]
    ) -> Artifact:
        """Write the manifest: from here on the folder counts as complete.

        Logs and dot files are not vouched for.
        """
        files = {
            str(file.relative_to(path)): file.stat().st_size
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name != MANIFEST and not _is_aside(file.relative_to(path))
        }
        artifact = cls(path, stage, fingerprint, seconds, metadata, files)
        write_json(
            path / MANIFEST,
            {
                "format_version": FORMAT_VERSION,
                "stage": stage,
                "fingerprint": fingerprint,
                "seconds": round(seconds, 3),
                "metadata": metadata,
                "files": files,
            },
        )
        return artifact

    @classmethod
    def find(cls, path: Path) -> Artifact | None:
        """The artifact in folder `path`, or None where there is no manifest."""
        return cls.open(path) if (path / MANIFEST).is_file() else None

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read and check the artifact in folder `path`.

        Raises:
            FormatVersionError: another version of distpc wrote it.
            ArtifactError: no manifest, or a file missing or cut.
        """
        manifest = read_json(path / MANIFEST)
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                "an artifact has a format version that this code does not read",
                where=path / MANIFEST,
                found=version,
                expected=FORMAT_VERSION,
                fix="use the distpc that wrote it, or remove the folder and run the stage again",
            )
        for name, size in manifest["files"].items():
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise ArtifactError(
                    "an artifact's file is missing or cut",
                    where=file,
                    found="no file" if found is None else f"{found} bytes",
                    expected=f"{size} bytes",
                    fix="remove the stage's folder and run the same command again",
                )
        return cls(
            path,
            manifest["stage"],
            manifest["fingerprint"],
            manifest["seconds"],
            manifest["metadata"],
            manifest["files"],
        )


def _is_aside(path: Path) -> bool:
    return path.parts[0] == LOGS or path.name.startswith(".")
