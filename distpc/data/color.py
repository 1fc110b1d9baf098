"""Colour spaces of RGB images: lossless YCoCg-R and the literature's lossy YCoCg.

YCoCg-R (Malvar and Sullivan, 2003) is a bijection between RGB triples and the triples it yields, so
a probability of one is a probability of the other and bits per dimension compare with RGB. The
lossy YCoCg that the literature on probabilistic circuits reports on merges colours when it rounds,
so its bits per dimension are lower for no merit of the model.

All functions take arrays (..., 3) with the channels last and are vectorised.
"""

from __future__ import annotations

import numpy as np

CHROMA_OFFSET = 256
"""Added to Co and Cg of YCoCg-R, which lie in -255 .. 255, so that values start at 0."""

NUM_CATEGORIES: dict[str, tuple[int, int, int]] = {
    "as_is": (256, 256, 256),
    "ycocg_r": (256, 2 * CHROMA_OFFSET, 2 * CHROMA_OFFSET),
    "ycocg_lossy": (256, 256, 256),
}
"""Values that each channel of an 8-bit RGB image takes in every colour space."""


def ycocg_r_forward(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) RGB in 0..255 -> (..., 3) int16: Y in 0..255, Co and Cg shifted by 256."""
    red, green, blue = _channels(rgb)
    orange = red - blue
    base = blue + (orange >> 1)
    greenness = green - base
    luma = base + (greenness >> 1)
    return np.stack([luma, orange + CHROMA_OFFSET, greenness + CHROMA_OFFSET], axis=-1)


def ycocg_r_inverse(values: np.ndarray) -> np.ndarray:
    """The exact inverse of `ycocg_r_forward`; int16 RGB.

    Values that no RGB triple has (a model may sample them) come out outside 0..255: clip them
    for display.
    """
    luma, orange, greenness = _channels(values)
    orange = orange - CHROMA_OFFSET
    greenness = greenness - CHROMA_OFFSET
    base = luma - (greenness >> 1)
    green = greenness + base
    blue = base - (orange >> 1)
    return np.stack([blue + orange, green, blue], axis=-1)


def ycocg_lossy_forward(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) RGB in 0..255 -> (..., 3) int16 in 0..255, many colours to one value.

    With RGB scaled to [0, 1]: Co = R - B, t = B + Co/2, Cg = G - t, Y = 2 (t + Cg/2) - 1, and each
    v in [-1, 1] becomes floor((v + 1) / 2 * 256), at most 255 (Liu et al., 2023).
    """
    red, green, blue = np.moveaxis(np.asarray(rgb, dtype=np.float64) / 255, -1, 0)
    orange = red - blue
    base = blue + orange / 2
    greenness = green - base
    luma = 2 * (base + greenness / 2) - 1
    scaled = np.stack([luma, orange, greenness], axis=-1)
    return np.floor((scaled + 1) / 2 * 256).clip(0, 255).astype(np.int16)


def ycocg_lossy_inverse(values: np.ndarray) -> np.ndarray:
    """An RGB triple in 0..255 (int16) near those that have these lossy values, for display."""
    middle = (np.asarray(values, dtype=np.float64) + 0.5) / 256 * 2 - 1
    luma, orange, greenness = np.moveaxis(middle, -1, 0)
    base = (luma + 1) / 2 - greenness / 2
    green = greenness + base
    blue = base - orange / 2
    rgb = np.stack([blue + orange, green, blue], axis=-1)
    return np.rint(rgb * 255).clip(0, 255).astype(np.int16)


def from_rgb(pixels: np.ndarray, color: str) -> np.ndarray:
    """Pixels (..., 3) in 0..255 as values of colour space `color` (int16)."""
    if color == "ycocg_r":
        return ycocg_r_forward(pixels)
    if color == "ycocg_lossy":
        return ycocg_lossy_forward(pixels)
    if color == "as_is":
        return np.asarray(pixels).astype(np.int16)
    raise ValueError(f"unknown colour space {color!r}")


def to_rgb(values: np.ndarray, color: str) -> np.ndarray:
    """Values (..., 3) of colour space `color` as pixels (uint8), for display.

    The inverse of `from_rgb`, near it where that is lossy; values that no pixel has are clipped.
    """
    if color == "ycocg_r":
        pixels = ycocg_r_inverse(values)
    elif color == "ycocg_lossy":
        pixels = ycocg_lossy_inverse(values)
    elif color == "as_is":
        pixels = np.asarray(values)
    else:
        raise ValueError(f"unknown colour space {color!r}")
    return pixels.clip(0, 255).astype(np.uint8)


def _channels(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(pixels).astype(np.int16), -1, 0)
