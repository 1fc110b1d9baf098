import pytest
import torch
from hidden_trees import hidden_tree

from distpc.circuits.circuit import Circuit
from distpc.errors import TrainingError
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Smoothing, make_rule


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
    statistics, other = parameter(1.0), parameter(1.0)
    optimizer = CircuitOptimizer({"em": [statistics], "gradient": [other]}, step_size=0.5)
    optimizer.set_step_size(0.25)
    optimizer.step()
    assert statistics.tolist() == [0.75] and other.tolist() == [1.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.01]


def test_parameters_that_follow_gradients_take_clipped_adam_steps() -> None:
    ours, theirs, statistics = parameter(1.0, -2.0), parameter(1.0, -2.0), parameter(1.0)
    optimizer = CircuitOptimizer(
        {"em": [statistics], "gradient": [ours]}, gradient_learning_rate=0.05, gradient_clip=0.5
    )
    adam = torch.optim.Adam([theirs], lr=0.05)
    for gradient in ([0.3, -7.0], [-0.2, 4.0], [1e-4, 0.0]):
        ours.grad = torch.tensor(gradient)
        theirs.grad = torch.tensor(gradient).clamp(-0.5, 0.5)
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-6, atol=1e-7)
    assert statistics.tolist() == pytest.approx([0.9**3])


def test_gradients_and_a_rule_on_statistics_share_one_optimizer_and_its_state() -> None:
    def build() -> tuple[Circuit, torch.nn.Parameter, CircuitOptimizer]:
        circuit, other = Circuit(hidden_tree(3, 2), [3] * 3, seed=0), parameter(1.0, 2.0)
        rule = make_rule("anemone", circuit, Smoothing(0.1, 0.1, 100))
        rule.start()
        groups = {**circuit.parameter_groups(), "gradient": [other]}
        return circuit, other, CircuitOptimizer(groups, rule=rule, step_size=0.4)

    def steps(circuit: Circuit, other: torch.nn.Parameter, optimizer: CircuitOptimizer) -> None:
        x = torch.randint(0, 3, (20, 3), generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            optimizer.zero_grad()
            (other.square().sum() - circuit(x).mean()).backward()
            optimizer.step()

    built = first, second = build(), build()
    steps(*first)
    second[0].load_state_dict(first[0].state_dict())
    second[1].data.copy_(first[1])
    states = [[optimizer.state[p] for p in (*c.parameters(), o)] for c, o, optimizer in built]
    assert [len(state) for state in states[0]] == [2] * len(list(first[0].parameters())) + [4]
    for ours, theirs in zip(*states, strict=True):
        theirs.update({name: value.clone() for name, value in ours.items()})
    for one in built:
        steps(*one)
    for ours, theirs in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first[1], second[1]) and first[1][0].item() < 0.97


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


def test_updates_in_backward_hold_one_flow_at_a_time_and_change_nothing_else() -> None:
    x = torch.randint(0, 3, (50, 7), generator=torch.Generator().manual_seed(0))
    x[:, 6] = -1
    circuits = [Circuit(hidden_tree(7, 4), [3] * 7, seed=0) for _ in range(2)]
    plain, fused = (CircuitOptimizer(c.parameter_groups(), step_size=0.3) for c in circuits)
    held: list[int] = []

    def count(_: torch.nn.Parameter) -> None:
        held.append(sum(p.grad is not None for p in circuits[1].parameters()))

    for parameter_ in circuits[1].parameters():
        parameter_.register_post_accumulate_grad_hook(count)
    with fused.updates_in_backward():
        for part in x.split(10):
            for circuit, optimizer in zip(circuits, (plain, fused), strict=True):
                optimizer.zero_grad()
                (-circuit(part).mean()).backward()
                optimizer.step()
            assert all(p.grad is None for p in circuits[1].parameters())
    assert set(held) == {1} and len(held) == 5 * len(list(circuits[1].parameters()))
    for ours, theirs in zip(*(c.parameters() for c in circuits), strict=True):
        assert torch.equal(ours, theirs)
    # Outside nothing is updated before the step.
    (-circuits[1](x).mean()).backward()
    assert all(p.grad is not None for p in circuits[1].parameters())


def test_rules_on_whole_rows_cannot_update_in_backward() -> None:
    circuit = Circuit(hidden_tree(3, 2), [3] * 3)
    rule = make_rule("anemone", circuit, Smoothing(0.1, 0.1, 100))
    optimizer = CircuitOptimizer(circuit.parameter_groups(), rule=rule)
    with pytest.raises(TrainingError, match="backward") as caught, optimizer.updates_in_backward():
        pass
    assert caught.value.found == "anemone"
