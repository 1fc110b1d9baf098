import pytest
import torch

from distpc.errors import TrainingError
from distpc.training.optimizer import CircuitOptimizer


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def test_online_em_is_a_running_mean_of_flows() -> None:
    statistics = parameter(0.5, 0.25, 0.25)
    optimizer = CircuitOptimizer({"em": [statistics], "gradient": []}, step_size=0.2)
    flow = torch.tensor([1.0, 0.0, 0.5])
    statistics.grad = -flow
    optimizer.step()
    # 0.8 * S + 0.2 * flow, by hand.
    torch.testing.assert_close(statistics.data, torch.tensor([0.6, 0.2, 0.3]))
    assert not optimizer.state


def test_no_gradient_means_no_flow() -> None:
    statistics = parameter(0.5, 1.0)
    CircuitOptimizer({"em": [statistics]}, step_size=0.5).step()
    assert statistics.tolist() == [0.25, 0.5]


def test_step_size_can_be_changed() -> None:
    statistics = parameter(1.0)
    optimizer = CircuitOptimizer({"em": [statistics], "gradient": []}, step_size=0.5)
    optimizer.set_step_size(0.25)
    optimizer.step()
    assert statistics.tolist() == [0.75]


def test_refuses_parameters_that_follow_gradients() -> None:
    with pytest.raises(TrainingError, match="cannot train") as caught:
        CircuitOptimizer({"em": [parameter(1.0)], "gradient": [parameter(1.0)]})
    assert caught.value.found == "1 parameters that follow gradients"


def test_watch_finds_what_a_step_poisons() -> None:
    statistics = parameter(1.0, 1.0)
    optimizer = CircuitOptimizer({"em": [statistics]})
    for flow, poisoned in ((0.5, False), (float("inf"), True)):
        statistics.grad = -torch.tensor([0.5, flow])
        optimizer.watch()
        optimizer.step()
        assert optimizer.end_watch() is poisoned


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="sgd"):
        CircuitOptimizer({"sgd": [parameter(1.0)]})
