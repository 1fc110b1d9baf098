"""Values as pixels and back, and pictures in a grid."""

from __future__ import annotations

import numpy as np
import pytest

from distpc.data import color
from distpc.data.pictures import from_display, three_channels, to_display, to_grid
from distpc.data.spec import DatasetSpec


def spec(categories: int, channels: int = 1) -> DatasetSpec:
    count = 4 * 2 * channels
    return DatasetSpec("toy", "image", count, (categories,) * count, (4, 2, channels))


def colored(space: str) -> DatasetSpec:
    return DatasetSpec("toy", "image", 24, color.NUM_CATEGORIES[space] * 8, (4, 2, 3), color=space)


def test_few_categories_are_stretched_to_white_and_rounded() -> None:
    pixels = to_display(np.array([[0, 8, 16, 16, 0, 0, 0, 16]]), spec(17))
    assert pixels.shape == (1, 4, 2, 1) and pixels.dtype == np.uint8
    assert pixels[0, :2, :, 0].tolist() == [[0, 128], [255, 255]]


@pytest.mark.parametrize("categories", [2, 17, 256])
def test_shown_values_come_back(categories: int) -> None:
    values = np.random.default_rng(0).integers(0, categories, (9, 8))
    assert np.array_equal(
        from_display(to_display(values, spec(categories)), spec(categories)), values
    )


@pytest.mark.parametrize(("space", "off"), [("as_is", 0), ("ycocg_r", 0), ("ycocg_lossy", 6)])
def test_colour_spaces_are_inverted(space: str, off: int) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (50, 4, 2, 3)).astype(np.uint8)
    shown = to_display(from_display(rgb, colored(space)), colored(space))
    assert shown.dtype == np.uint8 and shown.shape == rgb.shape
    assert np.abs(shown.astype(int) - rgb).max() <= off


def test_missing_values_are_grey() -> None:
    pixels = to_display(np.array([[0, -1, 3, 3, 0, 0, 0, -1]]), spec(4))
    assert pixels[0, 0, 1, 0] == 128 and pixels[0, 3, 1, 0] == 128 and pixels[0, 1, 0, 0] == 255
    x = from_display(np.zeros((1, 4, 2, 3), dtype=np.uint8), colored("ycocg_r"))
    x[0, 1] = -1
    assert (to_display(x, colored("ycocg_r"))[0, 0, 0] == 128).all()


def test_only_images_are_shown() -> None:
    with pytest.raises(ValueError, match="images"):
        to_display(np.zeros((1, 2)), DatasetSpec("t", "array", 2, (3, 3)))


def test_grey_pictures_get_three_channels() -> None:
    grey = np.arange(8, dtype=np.uint8).reshape(1, 4, 2, 1)
    assert three_channels(grey).shape == (1, 4, 2, 3)
    assert (three_channels(grey) == grey).all()
    assert three_channels(three_channels(grey)).shape == (1, 4, 2, 3)


def test_grid_places_images_row_by_row() -> None:
    images = np.zeros((5, 4, 2, 3), dtype=np.uint8)
    images[4] = 255
    grid = to_grid(images, columns=3, gap=1, min_side=1)
    assert grid.shape == (1 + 2 * 5, 1 + 3 * 3, 3)
    assert (grid[6:10, 4:6] == 255).all() and (grid[1:5, 1:3] == 0).all()
    assert (grid[6:10, 7:9] == 128).all()


def test_small_images_are_enlarged() -> None:
    assert to_grid(np.zeros((1, 4, 2, 1), dtype=np.uint8), gap=0, min_side=56).shape == (56, 28, 1)
