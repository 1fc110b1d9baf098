import pytest
import torch

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


def test_step_size_is_set_for_statistics_alone() -> None:
    statistics, weight = parameter(1.0), parameter(1.0)
    optimizer = CircuitOptimizer({"em": [statistics], "gradient": [weight]}, learning_rate=0.01)
    optimizer.set_step_size(0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.01]


def test_adam_group_equals_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = CircuitOptimizer({"gradient": [ours]}, learning_rate=0.05)
    reference = torch.optim.Adam([theirs], lr=0.05)
    for _ in range(5):
        gradient = torch.randn(7, generator=generator)
        for weight, rule in ((ours, optimizer), (theirs, reference)):
            weight.grad = gradient.clone()
            rule.step()
    torch.testing.assert_close(ours, theirs)


def test_moments_move_to_another_process() -> None:
    gradients = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    undisturbed, interrupted = (parameter(0.0, 0.0, 0.0, 0.0) for _ in range(2))
    first = CircuitOptimizer({"gradient": [undisturbed]})
    second = CircuitOptimizer({"gradient": [interrupted]})
    for step, gradient in enumerate(gradients):
        if step == 3:
            moments = [
                {name: value.clone() for name, value in values.items()}
                for values in second.moments()
            ]
            second = CircuitOptimizer({"gradient": [interrupted]})
            second.restore_moments(moments)
        for weight, rule in ((undisturbed, first), (interrupted, second)):
            weight.grad = gradient.clone()
            rule.step()
    assert torch.equal(undisturbed, interrupted)


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
