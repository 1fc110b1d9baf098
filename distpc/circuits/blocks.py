"""Block-diagonal sums as batches of small dense ones: how units and weights are regrouped.

A sum with b blocks mixes units of one block only (`Region.blocks`). Its tables T and blocks b are
then one batch of T * b matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of a sum.

    Attributes:
        count: b; 1 for a dense sum, for which everything here is a view.
        strided: whether a block is every b-th unit, or consecutive units.
    """

    count: int = 1
    strided: bool = False

    def split_units(self, values: Tensor, num_tables: int) -> Tensor:
        """(E, B, K) -> (T * b, E / T * B, K / b)."""
        units = values.shape[-1]
        if self.count == 1:
            return values if len(values) == num_tables else values.reshape(num_tables, -1, units)
        if self.strided:
            grouped = values.reshape(num_tables, -1, units // self.count, self.count)
            grouped = grouped.permute(0, 3, 1, 2)
        else:
            grouped = values.reshape(num_tables, -1, self.count, units // self.count)
            grouped = grouped.permute(0, 2, 1, 3)
        return grouped.reshape(num_tables * self.count, -1, units // self.count)

    def join_units(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `split_units`: (T * b, E / T * B, K / b) -> (E, B, K), given `shape`."""
        if self.count == 1:
            return values if values.shape == shape else values.view(shape)
        grouped = values.view(-1, self.count, *values.shape[1:])
        grouped = grouped.permute(0, 2, 3, 1) if self.strided else grouped.permute(0, 2, 1, 3)
        return grouped.reshape(shape)

    def split_rows(self, weights: Tensor) -> Tensor:
        """(T, K', fan-in) -> (T * b, K' / b, fan-in)."""
        if self.count == 1:
            return weights
        num_tables, units, fan_in = weights.shape
        if self.strided:
            weights = weights.view(num_tables, -1, self.count, fan_in).transpose(1, 2)
        return weights.reshape(num_tables * self.count, units // self.count, fan_in)

    def join_rows(self, weights: Tensor, num_tables: int) -> Tensor:
        """The inverse of `split_rows`."""
        if self.count == 1:
            return weights
        fan_in = weights.shape[-1]
        if self.strided:
            weights = weights.view(num_tables, self.count, -1, fan_in).transpose(1, 2)
        return weights.reshape(num_tables, -1, fan_in)
