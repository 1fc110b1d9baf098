"""Pictures for people: upscaled grids with hidden parts tinted and uncertainty in colour.

Arrays of pictures are (n, height, width, channels) uint8, one channel (grey) or three (RGB).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distpc.artifacts.files import atomic_path
from distpc.data.pictures import from_display, three_channels, to_display, to_grid
from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError
from distpc.inference.model import image_shape

HIDDEN_TINT = (88, 110, 140)
"""RGB of hidden pixels: a blue-grey that neither grey digits nor most photographs contain."""
HEAT = ((8, 6, 20), (70, 18, 96), (170, 45, 88), (240, 120, 40), (252, 236, 150))
"""Anchors of the uncertainty's colour scale: from none (dark) to the most (pale yellow)."""
HEADER_PIXELS = 18
GAP = 2


def to_pictures(values: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """(n, height, width, channels) uint8 pictures of (n, V) values in the model's colour space.

    Raises:
        EvidenceError: the model is not one of images.
    """
    image_shape(spec)
    return to_display(np.asarray(values), spec)


def tint_hidden(pictures: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """RGB pictures whose `hidden` pixels, (n, height, width) bool, carry the tint."""
    return np.where(
        hidden[..., None], np.array(HIDDEN_TINT, dtype=np.uint8), three_channels(pictures)
    )


def heat_map(amount: np.ndarray, top: float) -> np.ndarray:
    """(n, height, width) numbers in 0..top as (n, height, width, 3) colours of HEAT."""
    position = (amount / max(top, 1e-12)).clip(0, 1) * (len(HEAT) - 1)
    anchors = np.array(HEAT, dtype=float)
    channels = [np.interp(position, range(len(HEAT)), anchors[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def tile(pictures: np.ndarray, columns: int, headers: Sequence[tuple[int, str]] = ()) -> np.ndarray:
    """One RGB picture of all `pictures`, row by row, upscaled, with thin separators.

    Args:
        pictures: (n, height, width, channels) uint8.
        columns: pictures in a row; a short last row is left blank at its end.
        headers: (column, text) pairs written above the columns.

    Returns:
        (height', width', 3) uint8, of the size that `tile_size` says.
    """
    height, width = pictures.shape[1:3]
    size = pixel_size(height, width)
    side = size * max(height, width)
    grid = to_grid(three_channels(pictures), columns=columns, gap=GAP, min_side=side)
    return _with_headers(grid, headers, width * size + GAP) if headers else grid


def pixel_size(height: int, width: int) -> int:
    """Screen pixels that a pixel's side becomes, so that small pictures can be seen."""
    return max(1, min(8, 128 // max(height, width)))


def tile_size(
    count: int, columns: int, height: int, width: int, headers: bool = False
) -> tuple[int, int]:
    """(height', width') of `tile`'s picture of `count` pictures of height x width pixels."""
    size, rows = pixel_size(height, width), math.ceil(count / columns)
    top = HEADER_PIXELS if headers else 0
    return top + GAP + rows * (height * size + GAP), GAP + columns * (width * size + GAP)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a (height, width, 3) picture, whole or not at all."""
    from PIL import Image

    with atomic_path(path) as partial, partial.open("wb") as handle:
        Image.fromarray(picture).save(handle, format="PNG", optimize=True)


def read_pictures(folder: Path, spec: DatasetSpec) -> np.ndarray:
    """(n, V) values of the .png files of `folder`, by name, or of one file.

    Raises:
        EvidenceError: no .png file, one that cannot be decoded, or one of another size.
    """
    from PIL import Image

    height, width, channels = image_shape(spec)
    files = sorted(folder.glob("*.png")) if folder.is_dir() else [folder]
    if not files:
        raise EvidenceError("no pictures were found", where=folder, expected="files named *.png")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise EvidenceError("a picture cannot be read", where=file, found=error) from error
        if pixels.shape[:2] != (height, width):
            raise EvidenceError(
                "a picture has another size than the model's images",
                where=file,
                found=f"{pixels.shape[0]} x {pixels.shape[1]} pixels (height x width)",
                expected=f"{height} x {width}",
            )
        pictures.append(pixels.reshape(height, width, channels))
    return from_display(np.stack(pictures), spec)


def _with_headers(grid: np.ndarray, headers: Sequence[tuple[int, str]], step: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (grid.shape[1], grid.shape[0] + HEADER_PIXELS), "white")
    image.paste(Image.fromarray(grid), (0, HEADER_PIXELS))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=11)
    for column, text in headers:
        draw.text((GAP + column * step, 3), text, fill=(40, 40, 40), font=font)
    return np.asarray(image)
