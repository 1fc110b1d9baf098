"""The control `pixels`: a patch's feature is its own values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.teachers.images import ImageTeacher


class PixelTeacher(ImageTeacher):
    """Features are the patch's values scaled to [0, 1]: the latents see nothing but the data."""

    kind = "pixels"

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> PixelTeacher:
        """Nothing in it is configured or random."""
        return cls(spec, patch_size)

    @property
    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    @property
    def feature_width(self) -> int:
        """D = P, values in a patch."""
        return self.grid.variables_per_patch

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, P) float32 in [0, 1]."""
        return self.patches(x)
