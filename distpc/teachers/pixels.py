"""The teacher `pixels`: a patch's feature is its own values, and what is around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.teachers.images import ImageTeacher


class PixelTeacher(ImageTeacher):
    """Features are values scaled to [0, 1], of the patch and of the pixels about it.

    Of the patch itself, it is the control: the latents see nothing but the data. Where patches are
    single pixels, a value alone says nothing about the others, and the pixels about it do.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels.
        radius: pixels on every side of the patch that count, too.
        sigma: their weight is exp(-d^2 / (2 sigma^2)) at d pixels from the patch, 1 inside it.
    """

    kind = "pixels"
    window_variables: Tensor
    weights: Tensor

    def __init__(
        self, spec: DatasetSpec, patch_size: int, *, radius: int = 0, sigma: float = 1.0
    ) -> None:
        super().__init__(spec, patch_size)
        self.radius = radius
        self.sigma = sigma
        windows = torch.from_numpy(self.grid.windows(radius))
        weights = torch.from_numpy(self._weights()).float()
        self.register_buffer("window_variables", windows, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> PixelTeacher:
        """Radius and sigma from `pixels`; nothing is random."""
        return cls(spec, patch_size, **(config.of_kind() or {}))

    @property
    def settings(self) -> dict[str, Any]:
        """Radius and sigma, where more counts than the patch."""
        return {"radius": self.radius, "sigma": self.sigma} if self.radius else {}

    @property
    def sees(self) -> str:
        """The patch, and how far around it."""
        pixels = "1 pixel" if self.radius == 1 else f"{self.radius} pixels"
        return f"its patch and {pixels} around it" if self.radius else super().sees

    @property
    def feature_width(self) -> int:
        """D, values in a window; P of the patch alone."""
        return int(self.window_variables.shape[1])

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, D) float32 in [0, 1]."""
        return self.scaled(x)[:, self.window_variables] * self.weights

    def _weights(self) -> np.ndarray:
        """(D,) of a window's values, channels of a pixel alike."""
        place = np.arange(-self.radius, self.grid.size + self.radius)
        away = np.maximum(0, np.maximum(-place, place - (self.grid.size - 1)))
        squares = np.square(away)[:, None] + np.square(away)
        weights = np.exp(-squares / (2 * self.sigma**2))
        return np.repeat(weights.ravel(), self.grid.channels)
