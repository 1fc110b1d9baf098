"""Which pixels of an image are hidden: halves, the centre, or a random half."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError
from distpc.inference.model import image_shape

Mask = Literal["left", "right", "top", "bottom", "centre", "random"]
MASKS: tuple[str, ...] = get_args(Mask)


def observed_mask(mask: str, spec: DatasetSpec, seed: int = 0) -> torch.Tensor:
    """(V,) bool: the variables that stay visible when the part named `mask` is hidden.

    `centre` hides the middle half of the rows and columns (a quarter of the pixels), `random` half
    of the pixels, drawn from `seed`. All channels of a pixel are hidden together.

    Raises:
        EvidenceError: an unknown mask, or data that are no images.
    """
    height, width, channels = image_shape(spec)
    hidden = np.zeros((height, width), dtype=bool)
    if mask == "left":
        hidden[:, : width // 2] = True
    elif mask == "right":
        hidden[:, width // 2 :] = True
    elif mask == "top":
        hidden[: height // 2] = True
    elif mask == "bottom":
        hidden[height // 2 :] = True
    elif mask == "centre":
        hidden[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    elif mask == "random":
        order = np.random.default_rng(seed).permutation(height * width)
        hidden.reshape(-1)[order[: height * width // 2]] = True
    else:
        raise EvidenceError(
            "an unknown mask", where="mask", found=mask, expected=f"one of: {', '.join(MASKS)}"
        )
    return torch.from_numpy(~np.repeat(hidden.reshape(-1), channels))
