"""The errors distpc raises for its users: each says what is wrong, where, and how to mend it."""

from __future__ import annotations

from typing import Any


class DistpcError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        what: one sentence that says what is wrong.
        where: the file, config key, field, layer or row concerned.
        found: what was there.
        expected: what should have been there.
        fix: what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: Any = None,
        found: Any = None,
        expected: Any = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        details = {
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }
        lines = [self.what]
        lines += [f"  {name + ':':<10}{text}" for name, text in details.items() if text is not None]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders (Ray tasks, training ranks), keyword arguments included.
        return (
            _rebuild,
            (type(self), self.what, self.where, self.found, self.expected, self.fix),
        )


def _rebuild(
    kind: type[DistpcError],
    what: str,
    where: str | None,
    found: str | None,
    expected: str | None,
    fix: str | None,
) -> DistpcError:
    return kind(what, where=where, found=found, expected=expected, fix=fix)


class ConfigError(DistpcError):
    """A run's configuration has an unknown key, a wrong value or a contradiction."""


class ArtifactError(DistpcError):
    """A stage's result is missing, cut, of another format version or of another run."""


class FormatVersionError(ArtifactError):
    """A file was written by another version of distpc, in a format that this one does not read."""


class DataError(DistpcError):
    """Source data, a shard or a sample is not what it claims to be."""


class TeacherError(DistpcError):
    """A teacher is unknown, or its weights do not fit the data."""


class LatentError(DistpcError):
    """Features, centroids or latent values are inconsistent, or the codebook collapsed."""


class StructureError(DistpcError):
    """A region graph is not smooth, not decomposable, or does not fit the data."""


class EvidenceError(DistpcError):
    """A query's values, mask or latents do not fit the circuit."""


class ConstraintError(EvidenceError):
    """A constraint on a text cannot be met in the tokens that are left, or is none."""


class ModelFileError(DistpcError):
    """A model folder is missing a file, cut, or of a version this code cannot read."""


class TrainingError(DistpcError):
    """Training met a NaN, diverged, or lost a rank."""


class ResourceError(DistpcError):
    """The cluster, the machine or the disk has less than the run asks for."""


class HeldLostError(ResourceError):
    """A machine of the cluster was lost, and with it results that later work was to build on."""


class PlaceError(DistpcError):
    """A folder or object store by URL is missing, refuses, does not answer, or lacks a file."""
