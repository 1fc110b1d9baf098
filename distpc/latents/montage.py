"""What clusters look like: patches in their surroundings, or tokens in their text."""

from __future__ import annotations

import numpy as np

from distpc.data.patches import PatchGrid
from distpc.data.pictures import three_channels, to_display
from distpc.data.spec import MISSING, DatasetSpec
from distpc.data.tokenizers import Tokenizer

_AROUND = 2
_DIMMED = 0.6
_GROUND = 60
_FRAME = (255, 220, 0)
_MIN_SIDE = 80
_GAP = 2
_SNIPPET_UNITS = 24
_END = "\u23f9"
_VISIBLE = str.maketrans({"\n": "\u23ce", "\r": "", "\t": "\u21e5"})


def patch_montage(
    x: dict[int, np.ndarray], units: dict[int, list[int]], spec: DatasetSpec, size: int
) -> np.ndarray:
    """One row a cluster: patches, framed, in the middle of the 5 x 5 patches around, dimmed.

    Args:
        x: (M, V) samples of the members of each cluster.
        units: the M members' patches.
        spec: of the data set of images.
        size: side of a patch in pixels.

    Returns:
        (height, width, 3) uint8.
    """
    grid = PatchGrid.of(spec, size)
    columns = max(len(members) for members in units.values())
    wide = (2 * _AROUND + 1) * size
    factor = max(1, _MIN_SIDE // wide)
    side = wide * factor
    sheet = np.full(
        (_GAP + len(units) * (side + _GAP), _GAP + columns * (side + _GAP), 3), 255, dtype=np.uint8
    )
    for number, (cluster, members) in enumerate(units.items()):
        top = _GAP + number * (side + _GAP)
        pictures = three_channels(to_display(x[cluster], spec))
        for column, (picture, unit) in enumerate(zip(pictures, members, strict=True)):
            left = _GAP + column * (side + _GAP)
            sheet[top : top + side, left : left + side] = _tile(picture, unit, grid, factor)
    return sheet


def _tile(picture: np.ndarray, unit: int, grid: PatchGrid, factor: int) -> np.ndarray:
    """(side, side, 3): the patch and what is around it, enlarged."""
    size, margin = grid.size, _AROUND * grid.size
    dimmed = (picture * _DIMMED).astype(np.uint8)
    wide = np.pad(dimmed, ((margin, margin), (margin, margin), (0, 0)), constant_values=_GROUND)
    row, column = divmod(unit, grid.columns)
    top, left = row * size, column * size
    tile = wide[top : top + 2 * margin + size, left : left + 2 * margin + size].copy()
    inner = slice(margin, margin + size)
    tile[inner, inner] = picture[top : top + size, left : left + size]
    large = tile.repeat(factor, axis=0).repeat(factor, axis=1)
    first, last = margin * factor - 1, (margin + size) * factor
    large[[first, last], first : last + 1] = _FRAME
    large[first : last + 1, [first, last]] = _FRAME
    return large


def snippet(
    x: np.ndarray,
    unit: int,
    tokenizer: Tokenizer,
    end_token: int | None = None,
    units: int = _SNIPPET_UNITS,
) -> str:
    """A token in its text: up to `units` tokens before and behind it, itself in [brackets].

    Args:
        x: (V,) tokens.
        unit: which of them.
        tokenizer: that made them.
        end_token: the one that ends a document, which the tokenizer need not know.
    """
    parts = [x[max(0, unit - units) : unit], x[unit : unit + 1], x[unit + 1 : unit + 1 + units]]
    before, token, behind = (_text(part, tokenizer, end_token) for part in parts)
    return f"{before}[{token}]{behind}"


def _text(tokens: np.ndarray, tokenizer: Tokenizer, end_token: int | None) -> str:
    # Missing ones, behind a short document's end, have no text.
    kept = tokens[(tokens != MISSING) & (tokens != end_token)].tolist()
    text = tokenizer.decode(kept) + _END * bool((tokens == end_token).any())
    return text.translate(_VISIBLE)
