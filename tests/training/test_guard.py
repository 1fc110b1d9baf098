import math

import pytest
import torch

from distpc.errors import TrainingError
from distpc.training.figures import Figures
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
    guard, best = Guard(max_divergence_bits=0.5), {"bits": 3.0, "impossible": 1}
    guard.check_validation(9, validated(3.4), best)
    with pytest.raises(TrainingError, match="diverges") as caught:
        guard.check_validation(9, validated(bits), best)
    assert caught.value.where == "step 9"


def test_does_not_compare_models_that_rule_out_other_samples() -> None:
    guard, best = Guard(max_divergence_bits=0.5), {"bits": 3.0, "impossible": 5}
    guard.check_validation(9, validated(9.0, impossible=0), best)
    guard.check_validation(9, validated(9.0, impossible=7), best)
    guard.check_validation(9, validated(9.0), None)


def test_refuses_a_validation_that_is_no_number() -> None:
    with pytest.raises(TrainingError, match="validation split are not finite") as caught:
        Guard(0.5).check_validation(9, validated(3.0, not_a_number=2), None)
    assert caught.value.where == "validation after step 9"
    assert caught.value.found == "2 of 10 samples are NaN or +infinity"


def validated(bits: float, impossible: int = 1, not_a_number: int = 0) -> Figures:
    return Figures(-bits * math.log(2) * 8, 8.0, 10, impossible, not_a_number)
