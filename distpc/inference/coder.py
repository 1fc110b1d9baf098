"""Range coding of categories with given distributions, quantised to whole numbers.

The coder itself is constriction's (https://bamler-lab.github.io/constriction), of 24-bit
precision; coder and decoder give it the same whole numbers, so they agree to the last bit.
"""

from __future__ import annotations

import zlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.evidence import MISSING
from distpc.errors import DataError, EvidenceError, ResourceError

PRECISION = 24
MAX_CATEGORIES = 2**20
"""More would leave less than 16 counts a category."""


def constriction() -> ModuleType:
    """The library, which an extra installs.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import constriction
    except ImportError as error:
        raise ResourceError(
            "lossless compression needs a library that is not installed",
            found=error,
            expected="constriction",
            fix="pip install 'distpc[compress]'",
        ) from error
    return constriction


def quantise(distribution: Tensor) -> Tensor:
    """Counts (B, C), whole numbers in float64, each at least 1, that sum to 2**24 in every row.

    Args:
        distribution: (B, C) float64, rows that sum to one.
    """
    spare = 2**PRECISION - distribution.shape[1]
    counts = (distribution * spare).floor_().add_(1)
    # What rounding down leaves goes where it changes least.
    rest = 2**PRECISION - counts.sum(1, keepdim=True)
    return counts.scatter_add_(1, counts.argmax(1, keepdim=True), rest)


class Tables:
    """Distributions as tables of counts, with a symbol more for missing values if there are any.

    Attributes:
        checksum: of the coded symbols and their counts so far: equal on both sides, or one of them
            computed other tables.
        bits: -log2 of the model's own probabilities of what was coded.
    """

    def __init__(self, num_samples: int, missing_fraction: float) -> None:
        self.num_samples = num_samples
        self.missing_fraction = missing_fraction
        self.checksum = 0
        self.bits = 0.0
        self._family = constriction().stream.model.Categorical(perfect=False)

    def _counts(self, distribution: Tensor) -> Tensor:
        """(B, C), or (B, C + 1), of all samples of the batch, the ones that pad it too."""
        if self.missing_fraction:
            rate = distribution.new_full((len(distribution), 1), self.missing_fraction)
            distribution = torch.cat([distribution * (1 - self.missing_fraction), rate], 1)
        return quantise(distribution)

    def _columns(self, counts: Tensor) -> np.ndarray:
        """As the coder takes them: whole numbers below 2**24 are exact in float32."""
        return counts[: self.num_samples].float().cpu().numpy()

    def _count(self, symbols: np.ndarray, counts: Tensor) -> None:
        chosen = torch.from_numpy(symbols).long().unsqueeze(1)
        used = counts[: self.num_samples].cpu().gather(1, chosen).int()
        self.checksum = zlib.crc32(
            used.numpy().tobytes(), zlib.crc32(symbols.tobytes(), self.checksum)
        )


class Encoder(Tables):
    """Codes one batch; used as the `choose` of `Incremental.run`.

    Args:
        x: (B, V) int64 values, -1 where missing; rows from `num_samples` on are padding.
        num_samples: rows that are coded.
        missing_fraction: probability of the escape symbol of a missing value; 0: none is missing.
    """

    def __init__(self, x: Tensor, num_samples: int, missing_fraction: float) -> None:
        super().__init__(num_samples, missing_fraction)
        self.x = x
        self._coder: Any = constriction().stream.queue.RangeEncoder()

    def __call__(self, variable: int, distribution: Tensor) -> Tensor:
        values = self.x[:, variable]
        counts = self._counts(distribution)
        num_categories = distribution.shape[1]
        escaped = torch.where(values == MISSING, num_categories, values)
        symbols = escaped[: self.num_samples].int().cpu().numpy()
        # A variable of one category needs no bits, and the coder takes none.
        if counts.shape[1] > 1:
            self._coder.encode(symbols, self._family, self._columns(counts))
        self._count(symbols, counts)
        self.bits += self._cost(values, distribution)
        return values

    def words(self) -> np.ndarray:
        """The code: 32-bit words."""
        return self._coder.get_compressed()

    def _cost(self, values: Tensor, distribution: Tensor) -> float:
        there = (values != MISSING)[: self.num_samples].nonzero()[:, 0]
        chances = distribution[there, values[there]]
        return float(-chances.log2().sum())


class Decoder(Tables):
    """The reverse of `Encoder`: fills `x` as it goes.

    Args:
        words: the code.
        shape: (B, V) of the batch.
        num_samples: rows that were coded.
        missing_fraction: as when they were coded.
    """

    def __init__(
        self, words: np.ndarray, shape: tuple[int, int], num_samples: int, missing_fraction: float
    ) -> None:
        super().__init__(num_samples, missing_fraction)
        self.x = torch.zeros(shape, dtype=torch.int64)
        self._coder: Any = constriction().stream.queue.RangeDecoder(words)

    def __call__(self, variable: int, distribution: Tensor) -> Tensor:
        counts = self._counts(distribution)
        symbols = np.zeros(self.num_samples, np.int32)
        if counts.shape[1] > 1:
            symbols = self._decode(counts)
        self._count(symbols, counts)
        values = torch.from_numpy(symbols).long()
        self.x[: self.num_samples, variable] = torch.where(
            values == distribution.shape[1], MISSING, values
        )
        return self.x[:, variable].to(distribution.device)

    def _decode(self, counts: Tensor) -> np.ndarray:
        try:
            return self._coder.decode(self._family, self._columns(counts))
        except Exception as error:
            # The library's own kinds of errors are not part of what it promises.
            raise DataError("the code is not one of these tables", found=error) from error


def check_categories(num_categories: tuple[int | None, ...]) -> None:
    """Refuse variables that cannot be coded.

    Raises:
        EvidenceError: a variable that is real, or has too many categories.
    """
    for variable, count in enumerate(num_categories):
        if count is None or count > MAX_CATEGORIES:
            raise EvidenceError(
                "lossless compression codes categories",
                where=f"variable {variable}",
                found="a real variable, whose values have densities" if count is None else count,
                expected=f"at most {MAX_CATEGORIES:,} categories",
                fix="train on whole numbers: bin what is real",
            )
