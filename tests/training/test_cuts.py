"""Parts of tensors that other numbers of ranks wrote, read in pieces of bounded size."""

from itertools import product

import pytest
import torch
from torch import Tensor

from distpc.parallel.places import Split, unravelled
from distpc.training.checkpoint import cuts
from distpc.training.checkpoint.cuts import read_in_order, read_part

SHAPES = [((3, 12, 5), 1), ((1, 12, 40), 1), ((7, 12), 1), ((2, 3, 12), 2), ((12, 4), 0)]


@pytest.mark.parametrize("at_once", [1, 25, 10_000])
def test_parts_whoever_cut_the_tensor(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "ENTRIES_AT_ONCE", at_once)
    for (shape, dim), stored, wanted in product(SHAPES, (None, 1, 2, 3, 4), (None, 1, 2, 3, 6)):
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        old = None if stored is None else Split(dim, stored)
        new = None if wanted is None else Split(dim, wanted)
        elements = whole.reshape(-1) if old is None else old.flattened(whole)
        largest = 0

        def read(start: int, stop: int, elements: Tensor = elements) -> Tensor:
            nonlocal largest
            largest = max(largest, stop - start)
            return elements[start:stop].clone()

        for number in range(wanted or 1):
            expected = whole if new is None else new.part(whole, number)
            assert torch.equal(read_part(read, shape, old, new, number), expected)
        if old is not None or new is not None:
            assert largest <= max(at_once, shape[-1] if dim < len(shape) - 1 else 1)
        assert torch.equal(torch.cat(list(read_in_order(read, shape, old))), whole.reshape(-1))


def test_where_an_element_lies() -> None:
    shape, split = (2, 6, 3), Split(1, 3)
    whole = torch.arange(36).view(shape)
    for place, value in enumerate(split.flattened(whole).tolist()):
        assert int(whole[split.index_of(place, shape)]) == value
        assert int(whole[unravelled(value, shape)]) == value
