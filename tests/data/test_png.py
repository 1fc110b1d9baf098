"""PNG both ways, and what is no whole PNG."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from distpc.data.png import SizeMismatchError, decode_png, encode_png


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    slope = np.add.outer(np.arange(20), 3 * np.arange(30)).astype(np.uint8)
    return [
        rng.integers(0, 256, (8, 8, 1), dtype=np.uint8),
        rng.integers(0, 256, (1, 1, 3), dtype=np.uint8),
        np.repeat(slope[..., None], 3, axis=2),
        np.repeat(np.arange(20, dtype=np.uint8)[:, None], 30, axis=1)[..., None] * 7,
        np.zeros((5, 3, 1), np.uint8),
    ]


@pytest.mark.parametrize("number", range(5))
def test_round_trip_and_pillow_agree(number: int) -> None:
    pixels = pictures()[number]
    data = encode_png(pixels)
    assert np.array_equal(decode_png(data, pixels.shape), pixels)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def test_another_size_or_mode_is_refused() -> None:
    data = encode_png(pictures()[0])
    for shape in ((8, 9, 1), (8, 8, 3), (4, 16, 1)):
        with pytest.raises(SizeMismatchError):
            decode_png(data, shape)


def test_every_cut_and_flipped_byte_is_noticed() -> None:
    pixels = pictures()[2]
    data = encode_png(pixels)
    errors = (SizeMismatchError, OSError, SyntaxError, ValueError, EOFError, zlib.error)
    for length in range(0, len(data), 7):
        with pytest.raises(errors):
            decode_png(data[:length], pixels.shape)
    for position in range(45, len(data) - 16, 3):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        with pytest.raises(errors):
            decode_png(bytes(broken), pixels.shape)
