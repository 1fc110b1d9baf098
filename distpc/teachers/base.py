"""What a teacher is: patch features of discrete images, a registry, and files on disk.

Shapes: B batch, V variables, Z patches, P values in a patch, D feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distpc.artifacts.files import file_digest, read_json, write_json
from distpc.artifacts.tensors import read_tensors, write_tensors
from distpc.config.schema import TeacherConfig
from distpc.data.patches import PatchGrid
from distpc.data.spec import DatasetSpec
from distpc.errors import DistpcError, TeacherError

FORMAT_VERSION = 1
DESCRIPTION = "teacher.json"
WEIGHTS = "teacher.safetensors"

# A new kind of teacher is one line here; its module is imported when it is asked for.
_KINDS = {
    "mae": "distpc.teachers.mae:MaskedAutoencoder",
    "pixels": "distpc.teachers.pixels:PixelTeacher",
    "random": "distpc.teachers.random:RandomTeacher",
}


class Teacher(nn.Module, ABC):
    """Maps every patch of an image to a feature vector.

    Args:
        spec: the data set that it reads: images whose values are all discrete.
        patch_size: side of a patch in pixels.

    Raises:
        TeacherError: the data have real columns.
        ConfigError: the data are no images, or the patch size does not divide them.
    """

    kind: ClassVar[str]
    patch_variables: Tensor
    largest_values: Tensor

    def __init__(self, spec: DatasetSpec, patch_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.grid = PatchGrid.of(spec, patch_size)
        sizes = [count for count in spec.num_categories if count is not None]
        if len(sizes) != spec.num_variables:
            raise TeacherError(
                "teachers read images of discrete values",
                where=f"data set {spec.name}",
                found=f"{spec.num_variables - len(sizes)} real variables",
                expected="a number of categories for every variable",
            )
        largest = torch.tensor(sizes, dtype=torch.float32) - 1
        variables = torch.from_numpy(self.grid.variables())
        self.register_buffer("patch_variables", variables, persistent=False)
        self.register_buffer("largest_values", largest.clamp(min=1), persistent=False)

    @classmethod
    @abstractmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> Teacher:
        """A fresh teacher of this kind; what is random in it comes from `seed`."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Keyword arguments (JSON values) that, after spec and patch_size, rebuild this object."""

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """D, width of a patch feature."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Features of all patches: x (B, V) integers -> (B, Z, D) float32, without gradients.

        Raises:
            TeacherError: x does not fit the data set that the teacher was made for.
        """

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(weight.numel() for weight in self.parameters())

    def patches(self, x: Tensor) -> Tensor:
        """Patch values scaled to [0, 1]: x (B, V) integers -> (B, Z, P) float32.

        Raises:
            TeacherError: wrong width or type, or a value that is missing or no category.
        """
        if x.ndim != 2 or x.shape[1] != self.spec.num_variables or x.is_floating_point():
            raise TeacherError(
                "a batch does not fit the teacher",
                where=f"teacher {self.kind}",
                found=f"{x.dtype} of shape {tuple(x.shape)}",
                expected=f"integers of shape (B, {self.spec.num_variables})",
                fix="give it samples of the data set that it was made for",
            )
        scaled = x.to(self.largest_values.device, torch.float32) / self.largest_values
        if x.shape[0] and not 0 <= float(scaled.min()) <= float(scaled.max()) <= 1:
            raise TeacherError(
                "a batch has values that the teacher cannot read",
                where=f"teacher {self.kind}",
                found=f"values {int(x.min())} .. {int(x.max())}",
                expected=f"complete samples, values 0 .. {int(self.largest_values.max())}",
                fix="give it samples of the data set that it was made for, none of them missing",
            )
        return scaled[:, self.patch_variables]

    def save(self, folder: Path, training: dict[str, Any] | None = None) -> None:
        """Write teacher.safetensors (if there are weights), then teacher.json, into `folder`.

        The description is written last and carries the digest of the weights, so a folder with a
        description that fits is whole. `training` is kept in it as facts (JSON values).

        Raises:
            ResourceError: the disk is full.
        """
        weights = self.state_dict()
        listed = None
        if weights:
            file = folder / WEIGHTS
            num_bytes = write_tensors(file, weights)
            listed = {"file": WEIGHTS, "bytes": num_bytes, "sha256": file_digest(file)}
        description = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "settings": self.settings,
            "dataset": self.spec.to_json(),
            "patch_size_pixels": self.grid.size,
            "feature_width": self.feature_width,
            "num_parameters": self.num_parameters,
            "weights": listed,
            "training": training or {},
        }
        write_json(folder / DESCRIPTION, description)

    def check_data(self, spec: DatasetSpec, patch_size: int) -> None:
        """Refuse data of another shape, other categories, another colour space or patch size.

        Raises:
            TeacherError: the teacher was made for other data.
        """
        made_for = (self.spec.image_shape, self.spec.num_categories, self.spec.color)
        if made_for != (spec.image_shape, spec.num_categories, spec.color) or (
            patch_size != self.grid.size
        ):
            raise TeacherError(
                "the teacher was made for other data",
                where=f"teacher {self.kind}",
                found=_summary(spec, patch_size),
                expected=_summary(self.spec, self.grid.size),
                fix="train the teacher on this data: `distpc teacher CONFIG`",
            )


def _summary(spec: DatasetSpec, patch_size: int) -> str:
    counts = sorted({0 if count is None else count for count in spec.num_categories})
    return (
        f"{spec.name}: image shape {spec.image_shape}, categories {counts}, color {spec.color}, "
        f"patches of {patch_size} pixels"
    )


def teacher_kinds() -> tuple[str, ...]:
    """Names of all kinds of teacher."""
    return tuple(_KINDS)


def teacher_class(kind: str) -> type[Teacher]:
    """The class of a kind of teacher.

    Raises:
        TeacherError: there is no such kind.
    """
    if kind not in _KINDS:
        raise TeacherError(
            "unknown kind of teacher",
            where="teacher.kind",
            found=kind,
            expected=f"one of {', '.join(_KINDS)}",
        )
    module, name = _KINDS[kind].split(":")
    found: type[Teacher] = getattr(import_module(module), name)
    return found


def build_teacher(config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int) -> Teacher:
    """A fresh (untrained) teacher of the configured kind.

    Raises:
        TeacherError: unknown kind, or data that teachers do not read.
    """
    return teacher_class(config.kind).from_config(config, spec, patch_size, seed)


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
