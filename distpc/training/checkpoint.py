"""Checkpoints that are complete or absent, of any ZeRO stage, resumable on any number of ranks.

    checkpoints/step-00000120/statistics.safetensors   whole parameters by name
                              rule.safetensors         the optimizer's own tensors, if it has any
                              state.json                written last: facts, sizes, digests

A folder is written under a temporary name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distpc.artifacts.files import file_digest, no_space, read_json, write_json
from distpc.errors import ArtifactError

FORMAT_VERSION = 1
STATISTICS = "statistics.safetensors"
RULE_STATE = "rule.safetensors"
STATE = "state.json"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class TrainingFacts:
    """Where a training stands, beside its parameters: all that a resumed run continues from.

    Attributes:
        step: updates done.
        samples: training samples consumed.
        loader: the loader's state after the last batch (JSON).
        best: step, epoch, bits and impossible samples of the best validation so far.
        sums: of the running epoch: nats, observed values, samples (for the training figure).
        train_bits: bits per dimension of the last whole epoch, each batch before its update.
        impossible: training samples of likelihood 0 met so far.
        valid: the last validation's figures, as `best`.
    """

    step: int = 0
    samples: int = 0
    loader: dict[str, int] = field(default_factory=dict)
    best: dict[str, float] | None = None
    sums: dict[str, float] = field(default_factory=dict)
    train_bits: float | None = None
    impossible: int = 0
    valid: dict[str, float] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on the disk."""

    path: Path
    facts: TrainingFacts

    def statistics(self) -> dict[str, Tensor]:
        """All parameters by name, on the CPU."""
        return _read_tensors(self.path / STATISTICS)

    def rule_state(self) -> dict[str, Tensor]:
        """The optimizer's own tensors, on the CPU; empty where it had none."""
        path = self.path / RULE_STATE
        return _read_tensors(path) if path.is_file() else {}


class Checkpoints:
    """The checkpoints of one training, in one folder.

    Args:
        folder: where they live; one process writes into it at a time.
        identity: what must be equal for a checkpoint to continue this training (JSON values).
        keep: newest checkpoints that are kept, beside the best of each.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int = 2) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.keep = keep

    def clean(self) -> None:
        """Remove drafts that a killed process left behind."""
        for draft in self.folder.glob(".step-*"):
            shutil.rmtree(draft)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None.

        Raises:
            ArtifactError: it belongs to another training; names what differs.
        """
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            checkpoint = self._read(path)
            if checkpoint is not None:
                return checkpoint
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            ArtifactError: missing or cut, or of another training.
        """
        path = self.folder / _step_name(step)
        checkpoint = self._read(path)
        if checkpoint is None:
            raise ArtifactError(
                "a checkpoint is missing or cut",
                where=path,
                fix="remove the stage's folder and run the same command again",
            )
        return checkpoint

    def save(
        self,
        facts: TrainingFacts,
        statistics: Mapping[str, Tensor],
        rule_state: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the checkpoint of `facts.step`, and remove older ones; for one process alone.

        Raises:
            ResourceError: the disk is full; the checkpoints that were there stay.
        """
        name = _step_name(facts.step)
        draft, path = self.folder / f".{name}", self.folder / name
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
        with _removed_on_error(draft):
            _write_tensors(draft / STATISTICS, statistics)
            if rule_state:
                _write_tensors(draft / RULE_STATE, rule_state)
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)}
                for file in sorted(draft.iterdir())
            }
            write_json(
                draft / STATE,
                {
                    "format_version": FORMAT_VERSION,
                    "identity": self.identity,
                    "facts": asdict(facts),
                    "files": files,
                },
            )
            _sync_folder(draft)
            if path.exists():
                shutil.rmtree(path)
            draft.rename(path)
            _sync_folder(self.folder)
        self._prune()
        return path

    def _prune(self) -> None:
        newest_first = sorted(self.folder.glob("step-*"), reverse=True)
        # Should the newest be damaged, the one before it continues, and needs its own best.
        needed = {_best_of(path) for path in newest_first[: self.keep]}
        for path in newest_first[self.keep :]:
            if path.name not in needed:
                shutil.rmtree(path)

    def _read(self, path: Path) -> Checkpoint | None:
        if not (path / STATE).is_file():
            return None
        state = read_json(path / STATE)
        self._check_same_training(path, state)
        for name, facts in state["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"]:
                return None
            if file_digest(file) != facts["sha256"]:
                return None
        return Checkpoint(path, TrainingFacts(**state["facts"]))

    def _check_same_training(self, path: Path, state: Mapping[str, Any]) -> None:
        if state.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                "a checkpoint has a format version that this code does not read",
                where=path,
                found=state.get("format_version"),
                expected=FORMAT_VERSION,
                fix="use the distpc that wrote it, or remove the stage's folder",
            )
        theirs = state["identity"]
        keys = [k for k in {**self.identity, **theirs} if self.identity.get(k) != theirs.get(k)]
        if keys:
            raise ArtifactError(
                f"a checkpoint belongs to another training: {', '.join(keys)} differ",
                where=path,
                found={key: theirs.get(key) for key in keys},
                expected={key: self.identity.get(key) for key in keys},
                fix="remove the stage's folder, or choose another --out",
            )


def check_shapes(where: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse parameters of other names or shapes than a circuit's.

    Raises:
        ArtifactError: naming the first parameter that differs and both shapes.
    """
    for name in sorted({*found, *expected}):
        theirs = tuple(found[name].shape) if name in found else None
        ours = tuple(expected[name].shape) if name in expected else None
        if theirs != ours:
            raise ArtifactError(
                f"a checkpoint belongs to another circuit: parameter '{name}' differs",
                where=where,
                found="no such parameter" if theirs is None else f"shape {theirs}",
                expected="no such parameter" if ours is None else f"shape {ours}",
                fix="remove the stage's folder, or choose another --out",
            )


def _best_of(path: Path) -> str | None:
    """Name of the checkpoint that one counts as the best; None if it names none."""
    if not (path / STATE).is_file():
        return None
    best = read_json(path / STATE)["facts"]["best"]
    return None if best is None else _step_name(int(best["step"]))


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


@contextmanager
def _removed_on_error(draft: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # A draft of hundreds of megabytes on a full disk would keep it full.
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path)
        _sync_file(path)
    except SafetensorError as error:
        # The library hands the operating system's error on as text alone.
        if any(f"os error {number})" in str(error) for number in _DISK_ERRORS):
            raise no_space(path) from error
        raise
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise no_space(path) from error
        raise


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, FileNotFoundError) as error:
        raise ArtifactError("a checkpoint's tensors cannot be read", where=path) from error


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
