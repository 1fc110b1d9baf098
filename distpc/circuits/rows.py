"""Rows of folded messages: a slice where they are consecutive, an index tensor elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Rows(nn.Module):
    """A selection of rows (first axis) of a tensor.

    Args:
        rows: the rows, in order; repeats allowed.
    """

    index: Tensor | None

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        start = rows[0]
        consecutive = list(rows) == list(range(start, start + len(rows)))
        self.slice = slice(start, start + len(rows)) if consecutive else None
        self.register_buffer(
            "index", None if consecutive else torch.tensor(list(rows)), persistent=False
        )

    def take(self, tensor: Tensor) -> Tensor:
        """The selected rows; a view where they are consecutive."""
        if self.slice is not None:
            return tensor[self.slice]
        assert self.index is not None
        return tensor.index_select(0, self.index)

    def put_(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite the selected rows."""
        if self.slice is not None:
            tensor[self.slice].copy_(values)
        else:
            assert self.index is not None
            tensor.index_copy_(0, self.index, values)

    def add_(self, tensor: Tensor, values: Tensor) -> None:
        """Add to the selected rows; repeats add up."""
        if self.slice is not None:
            tensor[self.slice].add_(values)
        else:
            assert self.index is not None
            tensor.index_add_(0, self.index, values)

    def multiply_(self, tensor: Tensor, values: Tensor) -> None:
        """Multiply the selected rows, none of which repeats."""
        if self.slice is not None:
            tensor[self.slice].mul_(values)
        else:
            assert self.index is not None
            tensor.index_copy_(0, self.index, self.take(tensor).mul_(values))
