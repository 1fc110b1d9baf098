"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels with values 0 .. 16."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from distpc.config.sources import DigitsSource
from distpc.data.sources.base import Source
from distpc.data.spec import DatasetSpec

NUM_VALUES = 17


class Digits(Source):
    """The digits that scikit-learn ships; no download."""

    def __init__(self, config: DigitsSource) -> None:
        from sklearn.datasets import load_digits

        self._images = load_digits().images.astype(np.uint8)
        self.num_samples, height, width = self._images.shape
        self.spec = DatasetSpec(
            name="digits",
            kind="image",
            num_variables=height * width,
            num_categories=(NUM_VALUES,) * (height * width),
            image_shape=(height, width, 1),
        )

    def read(self, position: int) -> np.ndarray:
        """(64,) uint8."""
        return self._images[position].reshape(-1)

    def identity(self) -> dict[str, Any]:
        """The digest of all pixels."""
        return {"sha256": hashlib.sha256(self._images.tobytes()).hexdigest()}
