"""A bank: the parameters of one fold, and what training and queries ask of them.

`statistics` holds running means of sufficient statistics per sample (see the module
`statistics`), several tables of equal kind in one parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distpc.circuits.statistics import random_statistics


class Bank(nn.Module, ABC):
    """Base of the banks.

    Attributes:
        statistics: the parameter; an empty buffer where there is nothing to learn. It takes no
            memory (it is on torch's meta device) until `fill.fill_` gives it values.
        learns_by: "em": backward leaves flows in its `.grad`; "gradient": a true gradient. What is
            said of statistics, uses and smoothing below is about "em" alone.
    """

    statistics: Tensor
    learns_by: Literal["em", "gradient"] = "em"

    def draw(self, noise: float, generator: torch.Generator) -> Tensor:
        """Random statistics, not yet on the scale of their uses."""
        return random_statistics(tuple(self.statistics.shape), noise, generator)

    @abstractmethod
    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """Smooth the read-out by a pseudocount in samples a row (a unit of an input)."""

    @abstractmethod
    def statistics_of(self, table: int) -> Tensor:
        """A view of one table's statistics, a row a unit; writing to it writes the parameter."""

    @abstractmethod
    def weights_of(self, table: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What one table means, a row a unit: weights, probabilities, or mean and variance."""

    @abstractmethod
    def totals(self, values: Tensor) -> Tensor:
        """The uses of each entry's row, for values laid out as the statistics.

        Of flows: how often a unit was used; of statistics: how often a sample is expected to use
        it. Shape: broadcasts against the statistics.
        """

    @abstractmethod
    def pseudo_samples(self, pseudocount: float) -> Tensor:
        """The statistics of `pseudocount` imaginary uses of every row (a prior); broadcasts."""

    @abstractmethod
    def rescale_(self, uses: Sequence[Tensor]) -> None:
        """Keep what the tables mean, with statistics whose rows are used `uses[table]` (units,)
        times a sample."""
