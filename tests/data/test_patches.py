"""Patches cut images without loss, in the same order everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from distpc.data.patches import PatchGrid
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError


def test_patches_are_the_images_squares() -> None:
    spec = DatasetSpec("a", "image", 72, (256,) * 72, image_shape=(4, 6, 3))
    grid = PatchGrid.of(spec, 2)
    assert (grid.rows, grid.columns, grid.num_patches, grid.variables_per_patch) == (2, 3, 6, 12)
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3))
    patches = image.reshape(-1)[grid.variables()]
    assert np.array_equal(patches[4].reshape(2, 2, 3), image[2:4, 2:4])
    assert sorted(grid.variables().reshape(-1).tolist()) == list(range(72))


def test_what_has_no_patches() -> None:
    spec = DatasetSpec("a", "image", 24, (256,) * 24, image_shape=(4, 6, 1))
    with pytest.raises(ConfigError, match="does not divide"):
        PatchGrid.of(spec, 3)
    with pytest.raises(ConfigError, match="need images"):
        PatchGrid.of(DatasetSpec("t", "text", 4, (256,) * 4), 2)
