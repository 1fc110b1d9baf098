import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hidden_trees import hidden_tree

from distpc.circuits.circuit import Circuit
from distpc.errors import ConfigError, DataError, TrainingError
from distpc.structures import hclt
from distpc.training.fit import as_samples, fit

V, C = 6, 5


def tree(seed: int = 0) -> Circuit:
    return Circuit(hidden_tree(V, 4), [C] * V, seed=seed)


def samples(count: int, seed: int = 0) -> np.ndarray:
    """Rows that count up by 0 or 1 from a random start: neighbours tell of each other."""
    generator = np.random.default_rng(seed)
    start = generator.integers(0, C, (count, 1))
    return (start + generator.integers(0, 2, (count, V)).cumsum(1)) % C


def bits(circuit: Circuit, x: np.ndarray) -> float:
    return -float(circuit.log_prob(x).double().mean()) / V / math.log(2)


def test_fits_an_array() -> None:
    circuit, x = tree(), samples(600)
    before = bits(circuit, x)
    history = fit(circuit, x, epochs=15, batch_size=50, progress=False)
    assert [row["epoch"] for row in history] == list(range(1, 16))
    assert history[-1]["train_bits"] < history[0]["train_bits"] < before + 0.1
    assert bits(circuit, x) < before - 0.2
    assert all(row["impossible"] == 0 for row in history)


def test_the_same_seed_gives_the_same_circuit() -> None:
    first, second = tree(), tree()
    for circuit in (first, second):
        fit(circuit, samples(100), epochs=2, batch_size=32, progress=False, seed=3)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ends_with_the_best_on_validation() -> None:
    circuit, valid = tree(), samples(80, seed=1)
    # Few samples and next to no smoothing: later epochs fit the training samples too closely.
    history = fit(
        circuit,
        samples(20),
        epochs=30,
        batch_size=20,
        step_size=0.9,
        final_step_size=0.9,
        pseudocount=1e-3,
        leaf_pseudocount=1e-3,
        valid=valid,
        progress=False,
    )
    best = min(row["valid_bits"] for row in history)
    assert best < history[-1]["valid_bits"]
    assert bits(circuit, valid) == pytest.approx(best, abs=1e-5)


def test_missing_values_are_left_out() -> None:
    x = samples(300).astype(np.float64)
    x[np.random.default_rng(0).random(x.shape) < 0.2] = np.nan
    history = fit(tree(), x, epochs=10, batch_size=50, progress=False)
    assert history[-1]["train_bits"] < history[0]["train_bits"]


def test_refuses_data_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="does not fit"):
        as_samples(tree(), samples(4)[:, :3], "data")
    x = samples(4)
    x[2, 1] = C
    with pytest.raises(DataError) as caught:
        as_samples(tree(), x, "data")
    assert (
        caught.value.where == "data, row 2, column 1"
        and caught.value.expected == f"0 .. {C - 1}, or -1 where missing"
    )


def test_missing_is_a_value_of_every_column_and_other_negatives_are_not() -> None:
    graph = hidden_tree(3, 2)
    circuit = Circuit(graph, [1, 20, None])
    x = np.array([[0, 3, -7.5], [-1, -1, -1]])
    found = as_samples(circuit, x, "data")
    assert torch.isnan(found).tolist() == [[False] * 3, [True, True, False]]
    integers = as_samples(circuit, x.astype(np.int64), "data")
    torch.testing.assert_close(integers[1], found[1], equal_nan=True)
    whole = Circuit(graph, [1, 20, 20])
    rows = [[0, -1, -1], [-1] * 3]
    assert as_samples(whole, np.array(rows), "data").tolist() == rows
    x = np.zeros((4, 3), dtype=np.int64)
    x[3, 1] = -7
    for values in (x, x.astype(np.float32)):
        with pytest.raises(DataError) as caught:
            as_samples(whole, values, "data")
        assert caught.value.where == "data, row 3, column 1"
        assert float(caught.value.found or 0) == -7


@pytest.mark.parametrize("missing", [-1, np.nan])
def test_refuses_a_table_without_any_value(missing: float) -> None:
    with pytest.raises(DataError, match="no value at all") as caught:
        fit(tree(), np.full((4, V), missing), progress=False)
    assert caught.value.found == f"{4 * V} missing values"


def test_stops_at_poisoned_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    circuit = tree()
    with torch.no_grad():
        next(circuit.parameters()).view(-1)[0] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        fit(circuit, samples(50), epochs=2)
    # The bar ends with the training.
    assert capsys.readouterr().err.startswith("fit: 0/100 samples")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fits_on_the_device_of_the_circuit() -> None:
    circuit, x = tree().to("cuda"), samples(200)
    history = fit(circuit, x, epochs=3, batch_size=50, valid=x[:40], progress=False)
    assert history[-1]["valid_bits"] < history[0]["valid_bits"]
    assert next(circuit.parameters()).is_cuda


def test_refuses_a_validation_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Circuit.forward

    def broken(self: Circuit, x: torch.Tensor) -> torch.Tensor:
        # Only validation runs without gradients.
        return forward(self, x) if torch.is_grad_enabled() else torch.full((len(x),), math.nan)

    monkeypatch.setattr(Circuit, "forward", broken)
    with pytest.raises(TrainingError, match="validation split") as caught:
        fit(tree(), samples(50), epochs=2, valid=samples(20), progress=False)
    assert caught.value.where == "validation of epoch 1"


def test_fits_real_values_of_any_scale() -> None:
    circuit = Circuit(hidden_tree(3, 2), [None] * 3, seed=0)
    x = np.random.default_rng(0).normal(200.0, 0.1, size=(400, 3))
    history = fit(circuit, x, epochs=5, batch_size=50, progress=False)
    # The entropy of that Gaussian is -1.28 bits a value.
    assert history[-1]["train_bits"] == pytest.approx(-1.28, abs=0.15)


def test_refuses_infinite_values() -> None:
    x = np.zeros((40, 3))
    x[7, 1] = -math.inf
    with pytest.raises(DataError) as caught:
        fit(Circuit(hidden_tree(3, 2), [None] * 3), x, epochs=2, progress=False)
    assert caught.value.where == "data, row 7, column 1"


def test_needs_neither_deepspeed_nor_ray() -> None:
    code = (
        "import sys; from distpc.training.fit import fit\n"
        "print([m for m in ('deepspeed', 'ray', 'webdataset') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": -1},
        {"batch_size": 0},
        {"step_size": 5.0},
        {"final_step_size": 0.0},
        {"pseudocount": -1.0},
        {"leaf_pseudocount": float("nan")},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    data = np.zeros((4, 2), dtype=np.int64)
    circuit = Circuit(hclt(data, num_states=2), [2, 2])
    with pytest.raises(ConfigError, match=next(iter(setting))):
        fit(circuit, data, **setting)  # type: ignore[arg-type]


def test_a_failed_training_leaves_the_circuit_as_it_was() -> None:
    data = np.zeros((4, 2), dtype=np.int64)
    circuit = Circuit(hclt(data, num_states=2), [2, 2])
    before = {name: value.clone() for name, value in circuit.state_dict().items()}
    next(circuit.parameters()).register_hook(lambda flow: flow * float("nan"))
    with pytest.raises(TrainingError):
        fit(circuit, data, epochs=2, progress=False)
    for name, value in circuit.state_dict().items():
        assert torch.equal(value, before[name])
