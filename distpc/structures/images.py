"""Rectangles of pixels: the nodes of image hierarchies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distpc.errors import StructureError
from distpc.structures.layers import check_size


class Rectangle(NamedTuple):
    """Pixels of rows `top` .. and columns `left` .., `height` x `width` of them."""

    top: int
    left: int
    height: int
    width: int

    def cut_rows(self, offset: int) -> tuple[Rectangle, Rectangle]:
        """The upper `offset` rows, and the rest."""
        top, left, height, width = self
        return (
            Rectangle(top, left, offset, width),
            Rectangle(top + offset, left, height - offset, width),
        )

    def cut_columns(self, offset: int) -> tuple[Rectangle, Rectangle]:
        """The left `offset` columns, and the rest."""
        top, left, height, width = self
        return (
            Rectangle(top, left, height, offset),
            Rectangle(top, left + offset, height, width - offset),
        )

    def variables(self, image_width: int, channels: int) -> list[int]:
        """Variables of its pixels, in the order (row, column, channel) of images."""
        return [
            (row * image_width + column) * channels + channel
            for row in range(self.top, self.top + self.height)
            for column in range(self.left, self.left + self.width)
            for channel in range(channels)
        ]


def check_image(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """(height, width, channels) from a shape with or without channels.

    Raises:
        StructureError: naming the argument.
    """
    shape = tuple(check_size("image_shape", size) for size in image_shape)
    if len(shape) not in (2, 3):
        raise StructureError(
            "an image has another shape",
            where="image_shape",
            found=shape,
            expected="(height, width) or (height, width, channels)",
        )
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    return height, width, channels
