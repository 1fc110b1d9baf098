"""What a circuit is made from is checked in words."""

import numpy as np
import pytest

from distpc.circuits import Circuit
from distpc.errors import DataError, StructureError
from distpc.structures import hclt

DATA = np.array([[0, 1], [1, 0], [1, 1]])


@pytest.mark.parametrize("given", [2, [2], [2, 2, 2], [2, 0], [2, 1.5], [2, "2"], None])
def test_wrong_categories(given: object) -> None:
    with pytest.raises(StructureError, match="num_categories"):
        Circuit(hclt(DATA, num_states=2), num_categories=given)  # type: ignore[arg-type]


def test_numpy_categories() -> None:
    circuit = Circuit(hclt(DATA, num_states=2), num_categories=np.array([2, 2]))  # type: ignore[arg-type]
    assert circuit.num_categories == (2, 2)


@pytest.mark.parametrize("data", [DATA[0], DATA[:0], np.zeros((2, 2, 2), int)])
def test_a_structure_needs_a_table(data: np.ndarray) -> None:
    with pytest.raises(DataError, match="table"):
        hclt(data, num_states=2)


def test_a_circuit_shows_itself_in_one_line() -> None:
    shown = repr(Circuit(hclt(DATA, num_states=2), num_categories=[2, 2]))
    assert shown.startswith("Circuit(2 variables, 2 latents") and "\n" not in shown
