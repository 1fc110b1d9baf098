"""A finished stage's folder and the manifest that vouches for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distpc.artifacts.files import file_digest, read_json, write_json
from distpc.errors import ArtifactError, FormatVersionError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOGS = "logs"
_DIGEST_THREADS = 4


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
        sha256: digest of every file, in hexadecimal digits; empty in results of older code.
        made_from: what the fingerprint was computed from, so that two results can be compared.
        created: when it was finished, in UTC.
        taken_from: the place that it was copied from; None where the stage ran here.
    """

    path: Path
    stage: str
    fingerprint: str
    seconds: float
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    made_from: Any = None
    created: str = ""
    taken_from: str | None = None

    @classmethod
    def seal(
        cls,
        path: Path,
        stage: str,
        fingerprint: str,
        seconds: float,
        metadata: dict[str, Any],
        made_from: Any = None,
    ) -> Artifact:
        """Write the manifest: from here on the folder counts as complete.

        Logs and dot files are not vouched for.
        """
        names = [
            str(file.relative_to(path))
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name != MANIFEST and not _is_aside(file.relative_to(path))
        ]
        with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
            digests = list(pool.map(lambda name: file_digest(path / name), names))
        artifact = cls(
            path,
            stage,
            fingerprint,
            round(seconds, 3),
            metadata,
            {name: (path / name).stat().st_size for name in names},
            dict(zip(names, digests, strict=True)),
            made_from,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_json(path / MANIFEST, artifact.to_json())
        return artifact

    def to_json(self) -> dict[str, Any]:
        """The manifest: plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "created": self.created,
            "seconds": self.seconds,
            **({"taken_from": self.taken_from} if self.taken_from else {}),
            "made_from": self.made_from,
            "metadata": self.metadata,
            "files": self.files,
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, path: Path, manifest: Any, where: Any) -> Artifact:
        """The artifact that a manifest describes, its files not looked at.

        Args:
            path: its folder.
            manifest: what `to_json` gave.
            where: names the manifest in errors.

        Raises:
            FormatVersionError: another version of distpc wrote it.
        """
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                "an artifact has a format version that this code does not read",
                where=where,
                found=version,
                expected=FORMAT_VERSION,
                fix="use the distpc that wrote it, or remove the folder and run the stage again",
            )
        return cls(
            path,
            manifest["stage"],
            manifest["fingerprint"],
            manifest["seconds"],
            manifest["metadata"],
            manifest["files"],
            manifest.get("sha256", {}),
            manifest.get("made_from"),
            manifest.get("created", ""),
            manifest.get("taken_from"),
        )

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
        artifact = cls.from_json(path, read_json(path / MANIFEST), path / MANIFEST)
        for name, size in artifact.files.items():
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
        return artifact


def _is_aside(path: Path) -> bool:
    return path.parts[0] == LOGS or path.name.startswith(".")
