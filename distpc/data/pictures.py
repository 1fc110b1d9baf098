"""Pictures of image data: values back to pixels, and many images in one grid.

Shapes: N images, V variables; pictures are (N, height, width, channels) uint8 with one channel
(grey) or three (RGB).
"""

from __future__ import annotations

import math

import numpy as np

from distpc.data.color import from_rgb, to_rgb
from distpc.data.spec import MISSING, DatasetSpec

GREY_FRAME = 128


def to_display(x: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Samples of an image data set as pixels.

    Values of fewer than 256 categories are stretched over black to white; colour spaces are turned
    back into RGB. Missing values show as grey.

    Args:
        x: (N, V) integers, MISSING allowed.
        spec: of the data set.

    Returns:
        (N, height, width, channels) uint8.
    """
    if spec.image_shape is None:
        raise ValueError("only images can be displayed")
    values = x.reshape(len(x), *spec.image_shape)
    missing = values == MISSING
    categories = np.array([count or 256 for count in spec.num_categories])
    categories = categories.reshape(spec.image_shape)
    known = np.clip(np.where(missing, categories // 2, values), 0, categories - 1)
    if spec.color == "as_is":
        pixels = np.rint(known * (255.0 / np.maximum(categories - 1, 1))).astype(np.uint8)
    else:
        pixels = to_rgb(known, spec.color)
    # A pixel with one unknown component has no colour that could be shown.
    unknown = missing.any(axis=-1, keepdims=True)
    return np.where(unknown, np.uint8(GREY_FRAME), pixels)


def from_display(pictures: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """(N, V) int64 values that `to_display` shows as these (N, height, width, channels) pictures,
    or as near to them as the data set can."""
    if spec.color != "as_is":
        values = from_rgb(pictures, spec.color)
    else:
        top = np.array([(count or 256) - 1 for count in spec.num_categories])
        values = np.rint(pictures * (top.reshape(pictures.shape[1:]) / 255))
    return values.reshape(len(pictures), -1).astype(np.int64)


def three_channels(pictures: np.ndarray) -> np.ndarray:
    """Grey pictures with three equal channels; RGB ones as they are."""
    return pictures if pictures.shape[-1] == 3 else np.repeat(pictures, 3, axis=-1)


def to_grid(
    images: np.ndarray, *, columns: int | None = None, gap: int = 1, min_side: int = 56
) -> np.ndarray:
    """Images side by side, row by row, on a grey ground; small ones are enlarged.

    Args:
        images: (N, height, width, channels) uint8.
        columns: images in a row; default: the grid is about square.
        gap: pixels between images.
        min_side: images with a smaller longer side are enlarged by a whole factor to about it.

    Returns:
        (height', width', channels) uint8.
    """
    factor = max(1, min_side // max(images.shape[1:3]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full(
        (gap + rows * (height + gap), gap + columns * (width + gap), channels),
        GREY_FRAME,
        dtype=np.uint8,
    )
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
