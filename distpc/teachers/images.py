"""Teachers of images: every latent is a square patch.

Shapes: B batch, V variables, Z patches, P values in a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distpc.data.patches import PatchGrid
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.base import Teacher


class ImageTeacher(Teacher):
    """Maps every patch of an image to a feature vector.

    Args:
        spec: the data set that it reads: images whose values are all discrete.
        patch_size: side of a patch in pixels.

    Raises:
        TeacherError: the data have real columns.
        ConfigError: the data are no images, or the patch size does not divide them.
    """

    patch_variables: Tensor
    largest_values: Tensor

    def __init__(self, spec: DatasetSpec, patch_size: int) -> None:
        super().__init__(spec, PatchGrid.of(spec, patch_size))
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

    @property
    def grid(self) -> PatchGrid:
        """The patches."""
        assert isinstance(self._grid, PatchGrid)
        return self._grid

    @property
    def sees(self) -> str:
        """The patch by itself, unless a kind says otherwise."""
        return "its patch"

    def patches(self, x: Tensor) -> Tensor:
        """Patch values scaled to [0, 1]: x (B, V) integers -> (B, Z, P) float32; see `scaled`."""
        return self.scaled(x)[:, self.patch_variables]

    def scaled(self, x: Tensor) -> Tensor:
        """Values scaled to [0, 1]: x (B, V) integers -> (B, V) float32.

        Raises:
            TeacherError: wrong width or type, or a value that is missing or no category.
        """
        self.check_batch(x)
        scaled = x.to(self.largest_values.device, torch.float32) / self.largest_values
        if x.shape[0] and not 0 <= float(scaled.min()) <= float(scaled.max()) <= 1:
            largest = int(self.largest_values.max())
            raise self.refuse_values(x, f"complete samples, values 0 .. {largest}")
        return scaled
