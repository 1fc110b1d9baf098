"""The control `random`: one random layer, never trained, on each patch by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.teachers.base import Teacher
from distpc.teachers.images import ImageTeacher
from distpc.teachers.random_text import RandomTextTeacher


class RandomTeacher(ImageTeacher):
    """Features tanh(W (v - 1/2) + b) of patch values v in [0, 1], with Gaussian W and b.

    Says how much of a teacher's worth needs no learning at all.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels.
        width: D, width of a feature.
        seed: of W and b, which are kept as weights so that a later torch reads the same ones.
    """

    kind = "random"
    projection: Tensor
    offset: Tensor

    def __init__(self, spec: DatasetSpec, patch_size: int, *, width: int, seed: int) -> None:
        super().__init__(spec, patch_size)
        self.width = width
        self.seed = seed
        num_values = self.grid.variables_per_patch
        generator = torch.Generator().manual_seed(seed)
        # Values around 1/2 with spread at most 1/2: this scale reaches into tanh's bend.
        projection = torch.randn(num_values, width, generator=generator) * 3 / num_values**0.5
        self.register_buffer("projection", projection)
        self.register_buffer("offset", torch.randn(width, generator=generator) / 2)

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> Teacher:
        """Width from `random_width`; of text, what is seen from `sees`."""
        if spec.kind == "text":
            return RandomTextTeacher.from_config(config, spec, patch_size, seed)
        return cls(spec, patch_size, width=config.random_width, seed=seed)

    @property
    def settings(self) -> dict[str, Any]:
        """Width and seed."""
        return {"width": self.width, "seed": self.seed}

    @property
    def feature_width(self) -> int:
        """D."""
        return self.width

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, D) float32 in (-1, 1)."""
        return torch.tanh((self.patches(x) - 0.5) @ self.projection + self.offset)
