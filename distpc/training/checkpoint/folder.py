"""The folder of a training's checkpoints, each complete or absent.

    checkpoints/step-00000120/shard-00000.safetensors   element ranges that one rank wrote
                              shard-00001.safetensors
                              state.json                 written last: facts, ranges, sizes, digests

A checkpoint is made in a hidden folder, which is renamed when all of it is on the disk.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpc.artifacts.files import file_digest, read_json
from distpc.errors import ArtifactError
from distpc.parallel.collectives import broadcast_object, gather_objects
from distpc.parallel.mesh import Mesh
from distpc.parallel.places import Split
from distpc.training.checkpoint.cuts import read_in_order, read_part
from distpc.training.checkpoint.facts import TrainingFacts
from distpc.training.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Range,
    check_ranges,
    overlapping,
    table_of,
)
from distpc.training.checkpoint.shard import SLOT, read_range

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on the disk, read by name and element range.

    Attributes:
        path: its folder.
        facts: where the training stood.
        shapes: of all parameters and buffers, by name.
        slots: by name, what the optimizer keeps beside a parameter: shapes by its own names.
        table: where the elements of every key are.
        splits: by key, how elements are counted of tensors that ranks shared.
    """

    path: Path
    facts: TrainingFacts
    shapes: dict[str, tuple[int, ...]]
    slots: dict[str, dict[str, tuple[int, ...]]]
    table: dict[str, list[Range]]
    splits: dict[str, Split]

    def read(self, key: str, start: int, stop: int, split: Split | None = None) -> Tensor:
        """Elements start .. stop - 1 of the tensor `key`, on the CPU.

        Args:
            key: names the tensor.
            start, stop: of its elements as `split` counts them; None: flattened.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        if split == self.splits.get(key):
            return self._read(key, start, stop)
        whole = self.whole(key, self._shape_of(key))
        return (whole.reshape(-1) if split is None else split.flattened(whole))[start:stop]

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        parts = [
            read_range(self.path / file, key, first, max(first, start), min(last, stop))
            for first, last, file in overlapping(self.table[key], start, stop)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def part(self, name: str, split: Split | None, number: int) -> Tensor:
        """One part of a parameter or buffer, or all of it: see `circuits.fill.Source`.

        Nothing larger than the part is read, however the ranks that wrote it shared the tensor.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        stored, shape = self.splits.get(name), self.shapes[name]
        return read_part(self._reader(name), shape, stored, split, number)

    def in_order(self, name: str) -> Iterator[Tensor]:
        """All elements of a parameter or buffer, some at a time, flattened."""
        return read_in_order(self._reader(name), self.shapes[name], self.splits.get(name))

    def _reader(self, key: str) -> Callable[[int, int], Tensor]:
        return lambda start, stop: self._read(key, start, stop)

    def whole(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor, on the CPU."""
        elements, split = self._read(key, 0, math.prod(shape)), self.splits.get(key)
        return elements.reshape(shape) if split is None else split.joined(elements, shape)

    def _shape_of(self, key: str) -> tuple[int, ...]:
        name, _, slot = key.partition(SLOT)
        return self.slots[name][slot] if slot else self.shapes[name]

    def statistics(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, on the CPU."""
        return {name: self.whole(name, shape) for name, shape in self.shapes.items()}

    def rule_state(self) -> dict[str, Tensor]:
        """The optimizer's own tensors by `parameter#name`, on the CPU; empty where it has none."""
        return {
            f"{name}{SLOT}{slot}": self.whole(f"{name}{SLOT}{slot}", shape)
            for name, slots in self.slots.items()
            for slot, shape in slots.items()
        }


class Checkpoints:
    """The checkpoints of one training, in one folder that all ranks share.

    Args:
        folder: where they live.
        identity: what must be equal for a checkpoint to continue this training (JSON values).
        keep: newest checkpoints that are kept, beside the best of each.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int = 2) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.keep = keep

    def resume(self, mesh: Mesh) -> Checkpoint | None:
        """The checkpoint to go on from, the same on every rank, or None; a collective.

        Drafts that a killed process left are removed, and damaged checkpoints that are newer set
        aside: they must not count as new ones.

        Raises:
            ArtifactError: as `newest`.
        """
        if mesh.is_main:
            for draft in self.folder.glob(".step-*"):
                shutil.rmtree(draft)
        found = self.newest(mesh)
        if mesh.is_main and found is not None:
            for path in self.paths():
                if path.name > found.path.name:
                    path.rename(_free_name(path.with_name(f"damaged-{path.name}")))
        return found

    def newest(self, mesh: Mesh | None = None) -> Checkpoint | None:
        """The newest complete checkpoint, or None where there is none at all.

        Args:
            mesh: given, it is a collective: ranks share the work of reading every byte.

        Raises:
            ArtifactError: it belongs to another training, with what differs; or there are
                checkpoints, but not one that is whole, with what is wrong with the newest.
        """
        mesh = mesh or Mesh(0, 1, 0, torch.device("cpu"))
        first: ArtifactError | None = None
        for path in broadcast_object(self.paths(), mesh):
            checkpoint, damage = self._read(path, mesh)
            if checkpoint is not None:
                return checkpoint
            assert damage is not None
            if mesh.is_main:
                _log.warning("a checkpoint is left out, the one before it is tried:\n%s", damage)
            first = first or damage
        if first is not None:
            raise ArtifactError(
                f"no checkpoint is whole; of the newest: {first.what}",
                where=first.where,
                found=first.found,
                expected=first.expected,
                fix="restore its files, or remove the stage's folder to train from the start",
            )
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            ArtifactError: missing or cut, or of another training.
        """
        path = self.folder / step_name(step)
        checkpoint, damage = self._read(path, Mesh(0, 1, 0, torch.device("cpu")))
        if checkpoint is None:
            assert damage is not None
            raise ArtifactError(
                f"a checkpoint is missing or cut: {damage.what}",
                where=damage.where,
                found=damage.found,
                expected=damage.expected,
                fix="remove the stage's folder and run the same command again",
            )
        return checkpoint

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def adopt(self, draft: Path, step: int) -> None:
        """Make a finished draft the checkpoint of a step, and remove older ones.

        For one process alone.
        """
        path = self.folder / step_name(step)
        sync_folder(draft)
        aside = self.folder / f".{path.name}.replaced"
        if path.exists():
            path.rename(aside)
        draft.rename(path)
        sync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        newest_first = self.paths()
        # Should the newest be damaged, the one before it continues, and needs its own best.
        needed = {_best_of(path) for path in newest_first[: self.keep]}
        for path in newest_first[self.keep :]:
            if path.name not in needed:
                shutil.rmtree(path)

    def _read(self, path: Path, mesh: Mesh) -> tuple[Checkpoint | None, ArtifactError | None]:
        """A checkpoint, or what is wrong with it; every rank looks at its share of the files."""
        checkpoint: Checkpoint | None = None
        damage: ArtifactError | None = None
        try:
            manifest = read_json(path / MANIFEST)
            if _is_same(manifest, self.identity):
                checkpoint = _parse(path, manifest)
                for name in sorted(manifest["files"])[mesh.rank :: mesh.world_size]:
                    _check_file(path / name, manifest["files"][name])
        except ArtifactError as error:
            damage = error
        # Every rank gets here, whatever it alone has found.
        found = [error for error in gather_objects(damage, mesh) if error is not None]
        if found:
            return None, found[0]
        if checkpoint is None:
            raise _another_training(path, manifest, self.identity)
        return checkpoint, None


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_same(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    return manifest.get("format_version") == FORMAT_VERSION and manifest.get("identity") == identity


def _another_training(
    path: Path, manifest: Mapping[str, Any], ours: Mapping[str, Any]
) -> ArtifactError:
    if manifest.get("format_version") != FORMAT_VERSION:
        return ArtifactError(
            "a checkpoint has a format version that this code does not read",
            where=path,
            found=manifest.get("format_version"),
            expected=FORMAT_VERSION,
            fix="use the distpc that wrote it, or remove the stage's folder",
        )
    theirs = manifest["identity"]
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ArtifactError(
        f"a checkpoint belongs to another training: {', '.join(keys)} differ",
        where=path,
        found={key: theirs.get(key) for key in keys},
        expected={key: ours.get(key) for key in keys},
        fix="remove the stage's folder, or choose another --out",
    )


def _parse(path: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    table = table_of(manifest["files"])
    check_ranges(manifest["tensors"], table, path)
    shapes: dict[str, tuple[int, ...]] = {}
    slots: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, kind in manifest["tensors"].items():
        name, is_slot, slot = key.partition(SLOT)
        if is_slot:
            slots.setdefault(name, {})[slot] = tuple(kind["shape"])
        else:
            shapes[name] = tuple(kind["shape"])
    splits = {
        k: Split(*kind["split"]) for k, kind in manifest["tensors"].items() if "split" in kind
    }
    return Checkpoint(path, TrainingFacts(**manifest["facts"]), shapes, slots, table, splits)


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != facts["bytes"]:
        raise ArtifactError(
            "a shard of a checkpoint is missing" if size is None else "a shard is cut",
            where=path,
            found="no such file" if size is None else f"{size} bytes",
            expected=f"{facts['bytes']} bytes",
        )
    digest = file_digest(path)
    if digest != facts["sha256"]:
        raise ArtifactError(
            "a shard of a checkpoint has changed since it was written",
            where=path,
            found=f"SHA-256 {digest[:16]}",
            expected=facts["sha256"][:16],
        )


def _best_of(path: Path) -> str | None:
    """Name of the checkpoint that one counts as the best; None if it names none."""
    if not (path / MANIFEST).is_file():
        return None
    best = read_json(path / MANIFEST)["facts"]["best"]
    return None if best is None else step_name(int(best["step"]))


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
