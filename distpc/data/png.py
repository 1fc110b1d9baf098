"""PNG of 8-bit grey and RGB images, written so that reading needs no loop over rows.

PNG filters each row by one of five rules before compressing. An image written here uses one rule
for all its rows, out of the three whose inverse is a running sum (none, left neighbour, upper
neighbour), whichever promises to compress best: any program shows the files, and decoding small
ones is several times faster than through an image library. Files of other make are left to Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NONE, LEFT, UP = range(3)
COLOR_TYPES = {1: 0, 3: 2}
MODES = {1: "L", 3: "RGB"}


class SizeMismatchError(Exception):
    """An image of another size or kind: what was found, what was expected."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found, expected)
        self.found = found
        self.expected = expected


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of (height, width, 1 or 3) uint8 pixels."""
    height, width, channels = pixels.shape
    pixels = np.ascontiguousarray(pixels)
    filtered = [pixels, pixels.copy(), pixels.copy()]
    filtered[LEFT][:, 1:] -= pixels[:, :-1]
    filtered[UP][1:] -= pixels[:-1]
    # The PNG specification's rule of thumb: the smallest differences compress best.
    sizes = [np.abs(values.view(np.int8), dtype=np.int16).sum() for values in filtered]
    rule = int(np.argmin(sizes))
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = rule
    rows[:, 1:] = filtered[rule].reshape(height, -1)
    head, tail = _frame(height, width, channels)
    return head + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + tail


def decode_png(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """(height, width, channels) uint8 pixels of a PNG file of that shape.

    Pixels are never decompressed beyond what `shape` needs.

    Raises:
        SizeMismatchError: the image is of another size or has other channels.
        OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error: not a whole PNG.
    """
    pixels = _decode_own(data, shape)
    return _decode_any(data, shape) if pixels is None else pixels


def _decode_own(data: bytes, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Pixels of a file that `encode_png` wrote; None for any other."""
    height, width, channels = shape
    head, tail = _frame(height, width, channels)
    start = len(head) + 8
    stop = len(data) - len(tail) - 4
    if (
        not data.startswith(head)
        or not data.endswith(tail)
        or data[start - 8 : start] != struct.pack(">I4s", max(stop - start, 0), b"IDAT")
    ):
        return None
    if zlib.crc32(data[start - 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
        raise ValueError("the checksum of the pixels is wrong")
    size = height * (1 + width * channels)
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(data[start:stop], size + 1)
    if len(raw) != size or not unpacker.eof:
        raise ValueError("the file holds more or fewer pixels than it says")
    rows = np.frombuffer(raw, np.uint8).reshape(height, -1)
    rule = rows[0, 0]
    if rule > UP or (rows[:, 0] != rule).any():
        return None
    pixels = rows[:, 1:].reshape(height, width, channels)
    if rule == NONE:
        return pixels
    return np.add.accumulate(pixels, axis=1 if rule == LEFT else 0, dtype=np.uint8)


def _decode_any(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL.PngImagePlugin import PngImageFile

    height, width, channels = shape
    # Pillow shows what it has of a cut file.
    if not data.endswith(_chunk(b"IEND", b"")):
        raise EOFError("the file is cut before its end mark")
    with PngImageFile(io.BytesIO(data)) as image:
        # Before pixels are decompressed, so that no file unfolds into gigabytes.
        if (image.height, image.width, image.mode) != (height, width, MODES[channels]):
            raise SizeMismatchError(
                f"{image.height} x {image.width} pixels, mode {image.mode}",
                f"{height} x {width} pixels, mode {MODES[channels]}",
            )
        return np.asarray(image).reshape(shape)


@lru_cache(maxsize=16)
def _frame(height: int, width: int, channels: int) -> tuple[bytes, bytes]:
    """What stands before and behind the pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, COLOR_TYPES[channels], 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header), _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
