"""Reads boxes of a tensor whose elements lie part by part, whoever cut it and into how many parts.

A tensor is seen as (outer, length, inner), cut along `length`; what ranks wrote of it is counted
part by part (`places.Split`). All reads are of bounded size, whatever the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distpc.parallel.places import Split

ENTRIES_AT_ONCE = 2**22

Read = Callable[[int, int], Tensor]
"""(start, stop) -> those elements, in the order in which they are stored."""


@dataclass(frozen=True)
class Cut:
    """How a stored tensor lies.

    Attributes:
        outer, length, inner: its shape, with the cut dimension in the middle.
        parts: it is stored in.
    """

    outer: int
    length: int
    inner: int
    parts: int

    @classmethod
    def of(cls, shape: Sequence[int], stored: Split | None, dim: int) -> Cut:
        """The view that a cut along `dim` needs of a tensor that is stored whole or cut there."""
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        return cls(outer, shape[dim], inner, 1 if stored is None else stored.parts)

    def box(self, read: Read, outers: range, wanted: range) -> Tensor:
        """(outers, wanted, inner), where `outers` is one number or all lie close together."""
        size = self.length // self.parts
        found = []
        for part in range(wanted.start // size, (wanted.stop - 1) // size + 1):
            first, begin = part * size, part * size * self.outer * self.inner
            here = range(max(wanted.start, first) - first, min(wanted.stop, first + size) - first)
            if len(outers) == 1:
                start = begin + (outers.start * size + here.start) * self.inner
                values = read(start, start + len(here) * self.inner)
                found.append(values.view(1, len(here), self.inner))
            else:
                start, row = begin + outers.start * size * self.inner, size * self.inner
                values = read(start, start + len(outers) * row)
                rows = values.view(len(outers), size, self.inner)
                found.append(rows[:, here.start : here.stop])
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def boxes(self, wanted: range) -> Iterator[tuple[range, range]]:
        """(outers, part of wanted) of bounded boxes that make up all of `wanted`, in order."""
        together = ENTRIES_AT_ONCE // max(1, self.length * self.inner)
        if together >= 1:
            for first in range(0, self.outer, together):
                yield range(first, min(first + together, self.outer)), wanted
            return
        step = max(1, ENTRIES_AT_ONCE // self.inner)
        for outer in range(self.outer):
            for first in range(wanted.start, wanted.stop, step):
                yield range(outer, outer + 1), range(first, min(first + step, wanted.stop))


def read_part(
    read: Read, shape: Sequence[int], stored: Split | None, split: Split | None, number: int
) -> Tensor:
    """One part of a tensor, or all of it, in the shape that it has.

    Args:
        read: of its elements.
        shape: of the whole.
        stored: how its elements are counted.
        split: how it is to be cut now, along the same dimension; None: not at all.
        number: of the part.
    """
    cutting = split or stored
    if cutting is None:
        return read(0, math.prod(shape)).reshape(tuple(shape))
    cut = Cut.of(shape, stored, cutting.dim)
    size = cut.length // (split.parts if split else 1)
    wanted = range(number * size, (number + 1) * size) if split else range(size)
    out: Tensor | None = None
    for outers, piece in cut.boxes(wanted):
        values = cut.box(read, outers, piece)
        if out is None:
            out = values.new_empty(cut.outer, len(wanted), cut.inner)
        place = slice(piece.start - wanted.start, piece.stop - wanted.start)
        out[outers.start : outers.stop, place] = values
    assert out is not None
    return out.reshape(*shape[: cutting.dim], len(wanted), *shape[cutting.dim + 1 :])


def read_in_order(read: Read, shape: Sequence[int], stored: Split | None) -> Iterator[Tensor]:
    """All elements of a tensor as a plain file keeps them, some at a time, flattened."""
    if stored is None:
        total = math.prod(shape)
        for start in range(0, total, ENTRIES_AT_ONCE):
            yield read(start, min(start + ENTRIES_AT_ONCE, total))
        return
    cut = Cut.of(shape, stored, stored.dim)
    for outers, piece in cut.boxes(range(cut.length)):
        yield cut.box(read, outers, piece).reshape(-1)
