"""PNG of 8-bit grey and RGB images, through Pillow, with the size checked before decompression."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

MODES = {1: "L", 3: "RGB"}
END = b"IEND\xaeB`\x82"


class SizeMismatchError(Exception):
    """An image of another size or kind: what was found, what was expected."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found, expected)
        self.found = found
        self.expected = expected


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of (height, width, 1 or 3) uint8 pixels."""
    buffer = io.BytesIO()
    grey = pixels.shape[2] == 1
    Image.fromarray(pixels[:, :, 0] if grey else pixels).save(buffer, "png")
    return buffer.getvalue()


def decode_png(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """(height, width, channels) uint8 pixels of a PNG file of that shape.

    Pixels are never decompressed beyond what `shape` needs.

    Raises:
        SizeMismatchError: the image is of another size or has other channels.
        OSError, SyntaxError, ValueError, EOFError: not a whole PNG.
    """
    height, width, channels = shape
    # Pillow shows what it has of a cut file.
    if not data.endswith(END):
        raise EOFError("the file is cut before its end mark")
    with PngImageFile(io.BytesIO(data)) as image:
        # Decoding skips the checksum of the pixels.
        image.verify()
    with PngImageFile(io.BytesIO(data)) as image:
        # Before pixels are decompressed, so that no file unfolds into gigabytes.
        if (image.height, image.width, image.mode) != (height, width, MODES[channels]):
            raise SizeMismatchError(
                f"{image.height} x {image.width} pixels, mode {image.mode}",
                f"{height} x {width} pixels, mode {MODES[channels]}",
            )
        return np.asarray(image).reshape(shape)
