"""Teachers read back from their folders, every file checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpc.artifacts.files import file_digest, read_json
from distpc.artifacts.tensors import read_tensors
from distpc.data.spec import DatasetSpec
from distpc.errors import DistpcError, TeacherError
from distpc.teachers.base import DESCRIPTION, FORMAT_VERSION, WEIGHTS, Teacher
from distpc.teachers.registry import teacher_class


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of teacher.json, its format version and the weights file's digest checked.

    Raises:
        TeacherError: a file is missing, cut, changed, or of another format version.
    """
    path = folder / DESCRIPTION
    try:
        description = read_json(path)
    except DistpcError as error:
        raise TeacherError(
            "a teacher cannot be read", where=path, found=error.what, fix="run its stage again"
        ) from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise TeacherError(
            "a teacher has a format version that this code does not read",
            where=path,
            found=version,
            expected=FORMAT_VERSION,
            fix="use the distpc that wrote it, or run the teacher stage again",
        )
    weights = description["weights"]
    if weights is not None:
        _check_file(folder / WEIGHTS, weights)
    found: dict[str, Any] = description
    return found


def _check_file(file: Path, listed: dict[str, Any]) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != listed["bytes"] or file_digest(file) != listed["sha256"]:
        raise TeacherError(
            "a teacher's weights are missing, cut or changed",
            where=file,
            found="no file" if size is None else f"{size} bytes that differ from its description",
            expected=f"{listed['bytes']} bytes, sha256 {listed['sha256']}",
            fix="remove the teacher's folder and run its stage again",
        )


def load_teacher(folder: Path, device: torch.device | str = "cpu") -> Teacher:
    """Read the teacher in `folder`, ready to encode on `device`.

    Raises:
        TeacherError: a file is missing, cut, of another version, or does not fit its description.
    """
    folder = Path(folder)
    description = read_description(folder)
    try:
        teacher = teacher_class(description["kind"])(
            DatasetSpec.from_json(description["dataset"]),
            description["patch_size_pixels"],
            **description["settings"],
        )
        weights: dict[str, Tensor] = {}
        if description["weights"] is not None:
            weights, _ = read_tensors(folder / WEIGHTS, holds="teacher weights", error=TeacherError)
        teacher.load_state_dict(weights)
    except (RuntimeError, TypeError, KeyError) as error:
        raise TeacherError(
            "a teacher's weights do not fit its description",
            where=folder,
            found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            expected="the weights that its kind and settings ask for",
            fix="remove the teacher's folder and run its stage again",
        ) from error
    return teacher.to(device).eval()
