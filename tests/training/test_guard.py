import math

import pytest
import torch

from distpc.errors import TrainingError
from distpc.training.guard import Guard, locate_nonfinite


def test_names_parameter_and_row_of_a_nan() -> None:
    state = {"inputs.0": torch.ones(2, 3), "sums.1": torch.ones(4, 5, 6)}
    state["sums.1"][2, 3, 1] = math.nan
    with pytest.raises(TrainingError) as caught:
        Guard(1.0).check_statistics(17, state)
    assert caught.value.where == "step 17, parameter 'sums.1', row [2, 3]"


def test_large_finite_entries_are_no_nan() -> None:
    assert locate_nonfinite({"s": torch.full((4,), 3e38)}) is None


def test_stops_at_likelihoods_that_are_no_number() -> None:
    guard = Guard(1.0)
    guard.check_batch(3, not_a_number=0, impossible=2, size=8)
    with pytest.raises(TrainingError, match="not finite") as caught:
        guard.check_batch(3, not_a_number=1, impossible=0, size=8)
    assert caught.value.where == "step 3"


def test_stops_where_no_sample_is_possible() -> None:
    with pytest.raises(TrainingError, match="rules out every sample"):
        Guard(1.0).check_batch(3, not_a_number=0, impossible=8, size=8)


@pytest.mark.parametrize("bits", [3.6, math.inf, math.nan])
def test_stops_at_divergence(bits: float) -> None:
    guard = Guard(max_divergence_bits=0.5)
    guard.check_validation(9, 3.4, 3.0)
    with pytest.raises(TrainingError, match="diverges") as caught:
        guard.check_validation(9, bits, 3.0)
    assert caught.value.where == "step 9"
