"""What a teacher is: features of every unit (patch or token) of discrete samples.

Shapes: B batch, V variables, Z latents (one a patch or a token), D feature width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from distpc.artifacts.files import file_digest, fingerprint, write_json
from distpc.artifacts.tensors import write_tensors
from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError

FORMAT_VERSION = 1
DESCRIPTION = "teacher.json"
WEIGHTS = "teacher.safetensors"


class Grid(Protocol):
    """Where the latents lie; text is one row."""

    @property
    def size(self) -> int:
        """Side of a unit, in pixels or tokens."""

    @property
    def rows(self) -> int:
        """Latents in a column."""

    @property
    def columns(self) -> int:
        """Latents in a row."""


class Teacher(nn.Module, ABC):
    """Maps every unit of a sample to a feature vector, each sample by itself.

    Args:
        spec: the data set that it reads.
        grid: the units, one latent each.
    """

    kind: ClassVar[str]

    def __init__(self, spec: DatasetSpec, grid: Grid) -> None:
        super().__init__()
        self.spec = spec
        self._grid = grid

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
        """D, width of a feature."""

    @property
    @abstractmethod
    def sees(self) -> str:
        """What of a sample the feature of one latent may depend on, in words."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Features of all units: x (B, V) integers -> (B, Z, D) float32, without gradients.

        A sample's features do not depend on what else is in the batch.

        Raises:
            TeacherError: x does not fit the data set that the teacher was made for.
        """

    def present(self, x: Tensor) -> Tensor | None:
        """(B, Z) bool, the units of x (B, V) that there are: a unit that is missing has no
        feature, whatever `encode` gives for it. None where all are there."""
        return None

    @property
    def grid(self) -> Grid:
        """Where the latents lie."""
        return self._grid

    @property
    def num_latents(self) -> int:
        """Z, features of a sample."""
        return self.grid.rows * self.grid.columns

    @property
    def name(self) -> str:
        """What to call it in reports."""
        return self.kind

    @property
    def revision(self) -> str:
        """16 hexadecimal digits that differ wherever kind, settings, data or weights do."""
        weights = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            weights.update(name.encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        facts = [self.kind, self.settings, self.spec.to_json(), self.grid.size]
        return fingerprint([*facts, weights.hexdigest()])

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(weight.numel() for weight in self.parameters() if weight.requires_grad)

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
            "name": self.name,
            "revision": self.revision,
            "sees": self.sees,
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
        """Refuse data of another kind, shape or colour space, other categories or patch size.

        Raises:
            TeacherError: the teacher was made for other data.
        """
        # Text has no patches: there the configured size means nothing.
        size = self.grid.size if spec.kind == "text" else patch_size
        if (_facts(self.spec), self.grid.size) != (_facts(spec), size):
            raise TeacherError(
                "the teacher was made for other data",
                where=f"teacher {self.kind}",
                found=_summary(spec, size),
                expected=_summary(self.spec, self.grid.size),
                fix="train the teacher on this data: `distpc teacher CONFIG`",
            )

    def check_batch(self, x: Tensor) -> None:
        """Refuse a batch of another width or type.

        Raises:
            TeacherError: x is not (B, V) integers.
        """
        if x.ndim != 2 or x.shape[1] != self.spec.num_variables or x.is_floating_point():
            raise TeacherError(
                "a batch does not fit the teacher",
                where=f"teacher {self.kind}",
                found=f"{x.dtype} of shape {tuple(x.shape)}",
                expected=f"integers of shape (B, {self.spec.num_variables})",
                fix="give it samples of the data set that it was made for",
            )

    def refuse_values(self, x: Tensor, expected: str) -> TeacherError:
        """The error for a batch with values that are no categories."""
        return TeacherError(
            "a batch has values that the teacher cannot read",
            where=f"teacher {self.kind}",
            found=f"values {int(x.min())} .. {int(x.max())}",
            expected=expected,
            fix="give it samples of the data set that it was made for, none of them missing",
        )


def _facts(spec: DatasetSpec) -> tuple[Any, ...]:
    return spec.kind, spec.image_shape, spec.num_categories, spec.color, spec.tokenizer


def _summary(spec: DatasetSpec, patch_size: int) -> str:
    counts = sorted({0 if count is None else count for count in spec.num_categories})
    if spec.image_shape is None:
        return f"{spec.name}: {spec.num_variables} {spec.kind} variables, categories {counts}"
    return (
        f"{spec.name}: image shape {spec.image_shape}, categories {counts}, color {spec.color}, "
        f"patches of {patch_size} pixels"
    )
