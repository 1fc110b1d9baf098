"""Features of the pixels about a patch, against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.teachers import build_teacher
from distpc.teachers.pixels import PixelTeacher

from .cases import samples


def window(image: np.ndarray, top: int, left: int, size: int, radius: int, sigma: float):
    """Values of one window, pixel by pixel: image (H, W, C) in [0, 1]."""
    height, width, _ = image.shape
    inside = [(y, x) for y in range(top, top + size) for x in range(left, left + size)]
    found = []
    for y in range(top - radius, top + size + radius):
        for x in range(left - radius, left + size + radius):
            square = min((y - i) ** 2 + (x - j) ** 2 for i, j in inside)
            value = image[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
            found.append(np.exp(-square / (2 * sigma**2)) * value)
    return np.concatenate(found)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "radius", "sigma"), [(1, 1, 1.0), (1, 2, 1.5), (2, 1, 0.7), (3, 2, 1.0)]
)
def test_features_are_weighted_windows(channels: int, size: int, radius: int, sigma: float) -> None:
    shape = 6, 9 if size == 3 else 4, channels
    number = int(np.prod(shape))
    categories = tuple((17, 256, 511)[variable % channels] for variable in range(number))
    spec = DatasetSpec("pictures", "image", number, categories, image_shape=shape)
    config = TeacherConfig(kind="pixels", pixels={"radius": radius, "sigma": sigma})
    teacher = build_teacher(config, spec, size, seed=0)
    x = samples(spec, 3)
    features = teacher.encode(x)
    assert features.shape[2] == teacher.feature_width == (size + 2 * radius) ** 2 * channels
    images = (x.numpy() / (np.array(categories) - 1)).reshape(3, *shape)
    for image, found in zip(images, features.numpy(), strict=True):
        corners = [(y, z) for y in range(0, shape[0], size) for z in range(0, shape[1], size)]
        expected = [window(image, *corner, size, radius, sigma) for corner in corners]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_patch_alone_is_what_it_was() -> None:
    """Fingerprints and revisions of runs without surroundings stay."""
    spec = DatasetSpec("pictures", "image", 16, (17,) * 16, image_shape=(4, 4, 1))
    for sigma in (1.0, 2.0):
        config = TeacherConfig(kind="pixels", pixels={"sigma": sigma})
        teacher = build_teacher(config, spec, 2, seed=0)
        assert isinstance(teacher, PixelTeacher)
        assert config.of_kind() is None
        assert (teacher.settings, teacher.sees) == ({}, "its patch")
        assert not teacher.state_dict()
    around = PixelTeacher(spec, 2, radius=1)
    assert around.revision != teacher.revision
    assert around.sees == "its patch and 1 pixel around it"
