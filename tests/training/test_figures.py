import math

import pytest
import torch

from distpc.training.figures import Figures, bits_per_value, count_values, tally


def test_impossible_and_undefined_samples_are_counted_apart() -> None:
    x = torch.tensor([[0, -1], [1, 1], [0, 0], [1, 0]])
    nats = torch.tensor([-math.log(2), -2 * math.log(2), -math.inf, math.nan])
    figures = Figures.of(tally(nats, x))
    assert (figures.samples, figures.impossible, figures.not_a_number) == (4, 1, 1)
    assert figures.values == 3 and figures.bits == pytest.approx(1.0)


def test_characters_of_text_are_not_its_bytes() -> None:
    rows = torch.full((2, 12), -1)
    for row, text in zip(rows, ("na\u00efve \u20ac", "\U0001f600"), strict=True):
        values = torch.tensor(list(text.encode()))
        row[: len(values)] = values
    assert count_values(rows, "characters").tolist() == [7, 1]
    assert count_values(rows).tolist() == [10, 4]
    assert Figures.of(
        tally(torch.full((2,), -8 * math.log(2)), rows, "characters")
    ).bits == pytest.approx(2.0)


def test_no_value_is_no_figure() -> None:
    figures = Figures.of(tally(torch.tensor([-math.inf]), torch.zeros(1, 2, dtype=torch.int64)))
    assert figures.bits == math.inf == bits_per_value(0.0, 0.0)
