"""Patches of an image: the units that teachers encode and patch latents explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError


@dataclass(frozen=True)
class PatchGrid:
    """Non-overlapping square patches of an image, row by row.

    Attributes:
        height, width, channels: the image's shape; variables run (row, column, channel).
        size: side of a patch in pixels.
    """

    height: int
    width: int
    channels: int
    size: int

    @classmethod
    def of(cls, spec: DatasetSpec, size: int) -> PatchGrid:
        """The grid of a data set of images.

        Raises:
            ConfigError: the data are no images, or the size does not divide them.
        """
        if spec.image_shape is None:
            raise ConfigError(
                "patches need images",
                where="data.source",
                found=f"{spec.kind} data",
                fix="choose a teacher of text (causal_lm, masked_lm, hf_text, onehot, random) and "
                "structure.kind=hmm, or teacher.kind=none and structure.kind=hclt",
            )
        height, width, channels = spec.image_shape
        if height % size or width % size:
            raise ConfigError(
                "the patch size does not divide the images",
                where="data.patch_size_pixels",
                found=f"{size} for images of {height} x {width} pixels",
                expected="a common divisor of height and width",
            )
        return cls(height, width, channels, size)

    @property
    def rows(self) -> int:
        """Patches in a column of patches."""
        return self.height // self.size

    @property
    def columns(self) -> int:
        """Patches in a row of patches."""
        return self.width // self.size

    @property
    def num_patches(self) -> int:
        """Z, latents of an image."""
        return self.rows * self.columns

    @property
    def variables_per_patch(self) -> int:
        """Values in a patch: size * size * channels."""
        return self.size * self.size * self.channels

    def variables(self) -> np.ndarray:
        """(Z, size * size * channels) index of every patch's variables in the flat image.

        Within a patch, variables run (row, column, channel), the same in every patch.
        """
        return self.windows(0)

    def windows(self, radius: int) -> np.ndarray:
        """(Z, S * S * channels) index of the variables of every patch and of `radius` pixels on
        all its sides, S = size + 2 * radius, in the order of `variables`.

        Beyond the image's edge its outermost pixels stand once more.
        """
        reach = np.arange(-radius, self.size + radius)
        rows = self.size * np.arange(self.rows)[:, None] + reach
        columns = self.size * np.arange(self.columns)[:, None] + reach
        rows, columns = rows.clip(0, self.height - 1), columns.clip(0, self.width - 1)
        pixels = rows[:, None, :, None] * self.width + columns[None, :, None, :]
        index = pixels[..., None] * self.channels + np.arange(self.channels)
        return index.reshape(self.num_patches, -1)
