"""Masks hide what their name says."""

from __future__ import annotations

import pytest
import torch

from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError
from distpc.inference.masks import MASKS, observed_mask

SPEC = DatasetSpec("rgb", "image", 6 * 8 * 3, (256,) * 144, (6, 8, 3))


def hidden(mask: str, seed: int = 0) -> torch.Tensor:
    return ~observed_mask(mask, SPEC, seed).reshape(6, 8, 3)


@pytest.mark.parametrize("mask", MASKS)
def test_channels_of_a_pixel_are_hidden_together(mask):
    assert torch.equal(hidden(mask).all(dim=-1), hidden(mask).any(dim=-1))


def test_halves_and_centre():
    assert hidden("left")[:, :4].all()
    assert not hidden("left")[:, 4:].any()
    assert torch.equal(hidden("right"), ~hidden("left"))
    assert hidden("top")[:3].all()
    assert not hidden("top")[3:].any()
    assert torch.equal(hidden("bottom"), ~hidden("top"))
    assert hidden("centre")[1:5, 2:6].all()
    assert hidden("centre").sum() == 4 * 4 * 3


def test_random_hides_half_and_follows_the_seed():
    assert hidden("random").sum() == 144 // 2
    assert torch.equal(hidden("random", 1), hidden("random", 1))
    assert not torch.equal(hidden("random", 1), hidden("random", 2))


def test_an_unknown_mask_names_the_known_ones():
    with pytest.raises(EvidenceError, match="centre"):
        observed_mask("middle", SPEC)
