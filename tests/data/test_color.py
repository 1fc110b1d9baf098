"""Colour spaces against their definitions, value by value."""

from __future__ import annotations

import numpy as np
import pytest

from distpc.data import color


def random_rgb() -> np.ndarray:
    rng = np.random.default_rng(0)
    corners = np.array(np.meshgrid([0, 255], [0, 255], [0, 255])).reshape(3, -1).T
    return np.concatenate([rng.integers(0, 256, (100_000, 3)), corners])


def test_ycocg_r_is_a_bijection_within_its_categories() -> None:
    rgb = random_rgb()
    values = color.ycocg_r_forward(rgb)
    assert np.array_equal(color.ycocg_r_inverse(values), rgb)
    assert values.min() >= 0
    assert (values.max(axis=0) < np.array(color.NUM_CATEGORIES["ycocg_r"])).all()
    assert len(np.unique(values, axis=0)) == len(np.unique(rgb, axis=0))


def test_ycocg_r_of_known_colours() -> None:
    rgb = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    expected = [
        [0, 256, 256],
        [255, 256, 256],
        [63, 511, 129],  # Co 255, t 127, Cg -127, Y 127 - 64
        [127, 256, 511],
        [63, 1, 129],  # Co -255, t 255 - 128 = 127, Cg -127, Y 127 - 64
    ]
    assert color.ycocg_r_forward(rgb).tolist() == expected


def test_ycocg_r_accepts_bytes_without_overflow() -> None:
    rgb = random_rgb().astype(np.uint8)
    assert np.array_equal(color.ycocg_r_inverse(color.ycocg_r_forward(rgb)), rgb)


def test_lossy_loses_little_and_its_inverse_is_a_section() -> None:
    rgb = random_rgb()
    values = color.ycocg_lossy_forward(rgb)
    back = color.ycocg_lossy_inverse(values)
    assert values.min() >= 0 and values.max() <= 255
    assert np.abs(back - rgb).max() <= 5
    assert len(np.unique(values, axis=0)) < len(np.unique(rgb, axis=0))
    again = color.ycocg_lossy_forward(back)
    assert np.abs(again - values).max() <= 2


def test_from_rgb_names() -> None:
    rgb = random_rgb()[:10]
    assert np.array_equal(color.from_rgb(rgb, "as_is"), rgb)
    with pytest.raises(ValueError, match="colour space"):
        color.from_rgb(rgb, "hsv")


@pytest.mark.parametrize(("space", "off"), [("as_is", 0), ("ycocg_r", 0), ("ycocg_lossy", 6)])
def test_pixels_come_back_from_every_colour_space(space: str, off: int) -> None:
    rgb = random_rgb()
    pixels = color.to_rgb(color.from_rgb(rgb, space), space)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - rgb).max() <= off


def test_values_of_no_colour_are_clipped() -> None:
    assert color.to_rgb(np.array([255, 511, 511]), "ycocg_r").tolist() == [255, 255, 1]
    with pytest.raises(ValueError, match="unknown colour space"):
        color.to_rgb(np.zeros(3), "cmyk")
