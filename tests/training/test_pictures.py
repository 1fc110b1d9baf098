import numpy as np

from distpc.data.spec import DatasetSpec
from distpc.training.pictures import lower_half_hidden, to_display, to_grid


def spec(categories: int, channels: int = 1) -> DatasetSpec:
    count = 4 * 2 * channels
    return DatasetSpec("toy", "image", count, (categories,) * count, (4, 2, channels))


def test_few_categories_are_stretched_to_white() -> None:
    pixels = to_display(np.array([[0, 8, 16, 16, 0, 0, 0, 16]]), spec(17))
    assert pixels.shape == (1, 4, 2, 1) and pixels.dtype == np.uint8
    assert pixels[0, :2, :, 0].tolist() == [[0, 128], [255, 255]]


def test_missing_values_are_grey() -> None:
    pixels = to_display(np.array([[0, -1, 3, 3, 0, 0, 0, -1]]), spec(4))
    assert pixels[0, 0, 1, 0] == 128 and pixels[0, 3, 1, 0] == 128 and pixels[0, 1, 0, 0] == 255


def test_grid_places_images_row_by_row() -> None:
    images = np.zeros((5, 4, 2, 3), dtype=np.uint8)
    images[4] = 255
    grid = to_grid(images, columns=3, gap=1, min_side=1)
    assert grid.shape == (1 + 2 * 5, 1 + 3 * 3, 3)
    assert (grid[6:10, 4:6] == 255).all() and (grid[1:5, 1:3] == 0).all()
    assert (grid[6:10, 7:9] == 128).all()


def test_small_images_are_enlarged() -> None:
    assert to_grid(np.zeros((1, 4, 2, 1), dtype=np.uint8), gap=0, min_side=56).shape == (56, 28, 1)


def test_lower_half() -> None:
    observed = lower_half_hidden(spec(17, channels=3)).reshape(4, 2, 3)
    assert observed[:2].all() and not observed[2:].any()
